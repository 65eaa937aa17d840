"""TVA against dense attention written out in float64, masks, positions and the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.data import Batch
from layerwise.errors import UsageError
from layerwise.native import AttentionOptions, TVAAttention
from layerwise.native.costs import attention_parameters
from layerwise.native.rotary import rates, rotated
from layerwise.trace import traced

D, H, T = 24, 3, 7
SCOPES = ["latent", "head"]


def attention(scope: str = "latent", rank: int = 6, kv_heads: int = 0, **options: Any) -> TVAAttention:
    torch.manual_seed(0)
    return TVAAttention(D, H, rank, scope, AttentionOptions(kv_heads=kv_heads, **options)).double().eval()


def tokens(batch: int = 2, length: int = T) -> Tensor:
    return torch.randn(batch, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def softmaxed(q: Tensor, k: Tensor, v: Tensor, scale: float, keep: Tensor | None = None) -> Tensor:
    """Attention as the paper writes it; rows that may see nothing give zeros."""
    scores = (q @ k.mT) * scale
    if keep is None:
        return scores.softmax(-1) @ v
    weights = scores.masked_fill(~keep, float("-inf")).softmax(-1)
    return weights.nan_to_num(0.0) @ v


def dense(a: TVAAttention, h: Tensor, keep: Tensor | None = None) -> Tensor:
    """Multi-head attention with the dense matrices of a head-scope attention, its projectors left out."""
    core = a.core
    heads = [x.unflatten(-1, (-1, D // H)).transpose(1, 2) for x in (core.query(h), core.key(h), core.value(h))]
    q, k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in heads)
    return core.out(softmaxed(q, k, v, (D // H) ** -0.5, keep).transpose(1, 2).flatten(2))


def written_out(a: TVAAttention, h: Tensor, keep: Tensor | None = None) -> Tensor:
    """Latent scope, head by head: z = Vh, Ỹ = Σ softmax(zA(zB)ᵀ/√r)zC·D, Y = UỸ."""
    r, core = a.rank, a.core
    z = h @ a.projector.V.T
    total = torch.zeros_like(z)
    for i in range(H):
        A, B, C = (m.weight[i * r : (i + 1) * r].T for m in (core.query, core.key, core.value))
        D_i = core.mix.weight[:, i * r : (i + 1) * r].T
        total = total + softmaxed(z @ A, z @ B, z @ C, r**-0.5, keep) @ D_i
    return total @ a.projector.U.T


TRIANGLE = torch.ones(T, T).tril().bool()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [0, 1])
def test_at_full_rank_the_head_scope_is_dense_attention(causal: bool, kv_heads: int) -> None:
    a, h = attention("head", D // H, kv_heads, bias=True), tokens()
    for vein in (*a.core.vein, *a.core.value_vein):  # drawn in single precision
        vein.data.copy_(torch.linalg.qr(vein.data).Q)
    torch.testing.assert_close(a(h, is_causal=causal), dense(a, h, TRIANGLE if causal else None), atol=1e-12, rtol=0)


def test_below_full_rank_it_is_not() -> None:
    a, h = attention("head", D // H - 1), tokens()
    assert not torch.allclose(a(h), dense(a, h), atol=1e-3)


@pytest.mark.parametrize("causal", [False, True])
def test_the_latent_scope_is_its_formula(causal: bool) -> None:
    a, h = attention(), tokens()
    torch.testing.assert_close(a(h, is_causal=causal), written_out(a, h, TRIANGLE if causal else None), atol=1e-12, rtol=0)


def test_the_latent_scope_at_full_rank_can_be_any_dense_attention() -> None:
    """r = d: with V = U = I, A, B and C the dense matrices of one head and D its part of W_o."""
    a, h = attention(rank=D), tokens()
    with torch.no_grad():
        a.projector.V.copy_(torch.eye(D))
        a.projector.U.copy_(torch.eye(D))
    q, k, v = (m(h).unflatten(-1, (H, D)).transpose(1, 2) for m in (a.core.query, a.core.key, a.core.value))
    expected = a.core.mix(softmaxed(q, k, v, D**-0.5).transpose(1, 2).flatten(2))
    torch.testing.assert_close(a(h), expected, atol=1e-12, rtol=0)


def test_the_parameters_are_those_of_the_formula() -> None:
    a = TVAAttention(d_model=768, n_heads=12, rank=64)
    assert sum(p.numel() for p in a.parameters()) == attention_parameters(768, 12, 64) == 294_912


def test_the_multiply_accumulates_are_those_of_the_formula() -> None:
    a, length = TVAAttention(48, 4, 8).eval(), 10
    macs = traced(a, Batch((torch.randn(1, length, 48),))).macs
    assert macs == length * (2 * 48 * 8 + 4 * 4 * 8**2) + 2 * 4 * length**2 * 8


@pytest.mark.parametrize("scope", SCOPES)
def test_no_token_sees_a_later_one(scope: str) -> None:
    a, h = attention(scope), tokens()
    changed = h.clone()
    changed[:, 4:] += 1
    before, after = a(h, is_causal=True), a(changed, is_causal=True)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize("scope", SCOPES)
def test_masks_say_the_same_in_every_form(scope: str) -> None:
    a, h = attention(scope), tokens()
    keep = torch.rand(T, T, generator=torch.Generator().manual_seed(2)) > 0.4
    keep |= torch.eye(T, dtype=torch.bool)
    additive = torch.zeros(T, T, dtype=torch.float64).masked_fill(~keep, float("-inf"))
    found = a(h, mask=keep)
    torch.testing.assert_close(a(h, mask=additive), found)
    torch.testing.assert_close(a(h, mask=keep.expand(2, T, T)), found)
    torch.testing.assert_close(a(h, mask=keep.expand(2, H, T, T)), found)
    torch.testing.assert_close(a(h, is_causal=True, mask=keep), a(h, mask=keep & TRIANGLE))
    if scope == "latent":
        torch.testing.assert_close(found, written_out(a, h, keep), atol=1e-12, rtol=0)


@pytest.mark.parametrize("scope", SCOPES)
def test_padding_is_not_seen(scope: str) -> None:
    a, h = attention(scope), tokens()
    padding = torch.tensor([[1] * T, [1] * 4 + [0] * (T - 4)])
    torch.testing.assert_close(a(h, key_padding=padding)[1:, :4], a(h[1:, :4]))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("form", ["boolean", "infinite", "lowest", "padding"])
def test_a_query_that_sees_nothing_gives_zeros_and_finite_gradients(scope: str, form: str) -> None:
    a, h = attention(scope), tokens().requires_grad_()
    keep = torch.ones(T, T, dtype=torch.bool)
    keep[2] = False
    bias = torch.zeros(T, T, dtype=torch.float64)
    how: dict[str, Any] = {
        "boolean": {"mask": keep},
        "infinite": {"mask": bias.masked_fill(~keep, float("-inf"))},
        "lowest": {"mask": bias.masked_fill(~keep, torch.finfo(torch.float64).min)},
        "padding": {"key_padding": torch.tensor([[True] * T, [False] * T])},
    }[form]
    y = a(h, **how)
    dead = y[1] if form == "padding" else y[:, 2]
    assert torch.equal(dead, torch.zeros_like(dead))
    assert bool(y.any())
    y.square().sum().backward()
    assert bool(h.grad.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in a.parameters() if p.grad is not None)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("rope", [None, 100.0])
@pytest.mark.parametrize("kv_heads", [0, 1])
@pytest.mark.parametrize("window", [0, 3])
def test_token_by_token_equals_all_at_once(scope: str, rope: float | None, kv_heads: int, window: int) -> None:
    a, h = attention(scope, 6, kv_heads, rope_base=rope, window=window), tokens()
    full = a(h, is_causal=True)
    cache = a.new_cache()
    parts = [a(h[:, :3], is_causal=True, cache=cache), a(h[:, 3:5], is_causal=True, cache=cache)]
    parts += [a(h[:, i : i + 1], is_causal=True, cache=cache) for i in range(5, T)]
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-12, rtol=0)
    width = 6 if scope == "latent" else 2 * (kv_heads or H) * 6
    assert cache.floats == 2 * (window or T) * width
    assert cache.length == T


def test_the_window_is_what_a_band_shows() -> None:
    a, h = attention(window=3), tokens()
    band = TRIANGLE & ~torch.ones(T, T).tril(-3).bool()
    torch.testing.assert_close(a(h, is_causal=True), written_out(a, h, band), atol=1e-12, rtol=0)


def test_a_cache_of_beams_is_reordered() -> None:
    a, h = attention(), tokens()
    cache, order = a.new_cache(), torch.tensor([1, 0])
    a(h[:, :4], is_causal=True, cache=cache)
    cache.reorder_(order)
    found = a(h[:, 4:5], is_causal=True, cache=cache)
    swapped = torch.cat((h[order, :4], h[:, 4:5]), 1)
    torch.testing.assert_close(found, a(swapped, is_causal=True)[:, -1:], atol=1e-12, rtol=0)


def test_padding_in_the_cache_stays_unseen() -> None:
    a, h = attention(), tokens()
    keep = torch.tensor([[1] * T, [0] * 2 + [1] * (T - 2)]).bool()
    cache = a.new_cache()
    a(h[:, :6], is_causal=True, key_padding=keep[:, :6], cache=cache)
    found = a(h[:, 6:], is_causal=True, key_padding=keep, cache=cache)
    torch.testing.assert_close(found[1], a(h[1:, 2:], is_causal=True)[0, -1:], atol=1e-12, rtol=0)


@pytest.mark.parametrize("scope", SCOPES)
def test_under_rotary_positions_only_distances_count(scope: str) -> None:
    a, h = attention(scope, rope_base=100.0), tokens()
    at = torch.arange(T)
    torch.testing.assert_close(a(h, positions=at), a(h, positions=at + 50), atol=1e-12, rtol=0)
    assert not torch.allclose(a(h, positions=at), a(h, positions=at * 2), atol=1e-4)


def test_rotated_before_the_projection_distances_would_not_be_enough() -> None:
    """Why the rotation comes after: ⟨V R_i q, V R_j k⟩ depends on i itself when V keeps 4 of 8 directions."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    V, angles = torch.linalg.qr(torch.randn(8, 4, dtype=torch.float64)).Q.T, rates(8)

    def score(i: int, j: int) -> float:
        return float((rotated(q, torch.tensor([i]), angles) @ V.T * (rotated(k, torch.tensor([j]), angles) @ V.T)).sum())

    assert abs(score(1, 3) - score(11, 13)) > 1e-3


def test_half_precision_keeps_close() -> None:
    a, h = attention().float(), tokens().float()
    exact = a(h, is_causal=True)
    a.bfloat16()
    rough = a(h.bfloat16(), is_causal=True)
    assert rough.dtype == torch.bfloat16
    assert bool(rough.isfinite().all())
    assert float((rough.float() - exact).norm() / exact.norm()) < 0.03
    assert bool(a(1e4 * h.bfloat16(), is_causal=True).isfinite().all())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"scope": "latnt"}, "latent"),
        ({"n_heads": 5}, "do not divide"),
        ({"options": AttentionOptions(kv_heads=2)}, "do not divide"),
        ({"rank": 5, "options": AttentionOptions(rope_base=10.0)}, "odd"),
        ({"rank": 9, "scope": "head"}, "1 … 8"),
    ],
)
def test_what_makes_no_attention_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        TVAAttention(**{"d_model": D, "n_heads": H, "rank": 6, **arguments})
