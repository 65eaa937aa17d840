"""The compensator: normal to the vein, nothing for tokens on it, a gate that learns, and that is hard in eval mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from layerwise.errors import UsageError
from layerwise.native import AttentionOptions, NormalCompensator, TVAAttention, VeinProjector, VFTFeedForward, adapt_threshold_

D, R = 16, 4


def pair(s: int = 2, **options: float) -> tuple[NormalCompensator, VeinProjector]:
    torch.manual_seed(0)
    vein = VeinProjector(D, R).double()
    c = NormalCompensator(D, s, projector=vein, **options).double()
    if s:
        torch.nn.init.normal_(c.u)
    return c, vein


def tokens() -> Tensor:
    return torch.randn(2, 9, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def written_out(c: NormalCompensator, vein: VeinProjector, h: Tensor) -> Tensor:
    """Token by token, as the formula stands, with the soft gate."""
    P = vein.U @ vein.V
    out = torch.zeros_like(h)
    for b in range(h.shape[0]):
        for t in range(h.shape[1]):
            x = h[b, t]
            n = x - P @ x
            alpha = 0.5 * torch.sigmoid(c.amount(torch.nn.functional.layer_norm(x, (D,))))
            delta = sum(alpha[j] * c.u[j] * (c.v[j] @ n) for j in range(c.s))
            gate = torch.sigmoid((n.norm() / (x.norm() + 1e-6) - c.tau) / c.temperature)
            out[b, t] = gate * (delta - P @ delta)
    return out


def test_it_is_its_formula() -> None:
    (c, vein), h = pair(), tokens()
    torch.testing.assert_close(c.train()(h), written_out(c, vein, h), atol=1e-6, rtol=1e-5)  # V was drawn in single precision


def test_it_starts_as_nothing_and_without_directions_it_is_nothing() -> None:
    vein, h = VeinProjector(D, R), tokens().float()
    for s in (0, 1):
        assert not NormalCompensator(D, s, projector=vein)(h).any()
    assert float(NormalCompensator(256, 8).v.var() * 256) == pytest.approx(1, rel=0.15)


def test_the_correction_is_normal_to_the_vein() -> None:
    (c, vein), h = pair(), tokens()
    delta = c.train()(h)
    assert float(delta.abs().max()) > 1e-3
    assert float((delta @ vein.U).abs().max()) < 1e-10


def test_a_token_on_the_vein_is_left_alone() -> None:
    c, vein = pair(threshold=-1.0)  # the gate is wide open
    on = vein.reconstruct(torch.randn(2, 3, R, dtype=torch.float64))
    assert float(c.train()(on).abs().max()) < 1e-10


def test_the_threshold_learns() -> None:
    (c, _), h = pair(threshold=0.8), tokens()
    c.train()(h).sum().backward()
    assert c.tau.grad is not None
    assert float(c.tau.grad.abs()) > 1e-6


def test_in_eval_mode_the_gate_is_hard_and_only_what_passes_is_computed() -> None:
    (c, vein), h = pair(), tokens()
    rate = vein.off_plane(h)[0]
    c.calibrate_(rate, 0.5)
    c.eval()
    seen: list[int] = []
    c.amount.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    delta = c(h)
    moved = delta.abs().amax(-1) > 0
    assert torch.equal(moved, rate > c.tau)
    assert seen == [int(moved.sum())]
    assert 0 < seen[0] < rate.numel()
    c.temperature = 1e-9  # the soft gate as steep as the hard one
    torch.testing.assert_close(c.train()(h), delta)


def test_calibrated_the_gate_lets_the_wanted_share_through() -> None:
    c, _ = pair()
    c.calibrate_(torch.linspace(0, 1, 101), 0.9)
    assert float(c.tau) == pytest.approx(0.9)


def test_a_fraction_keeps_the_tokens_farthest_off_in_each_sequence() -> None:
    c, vein = pair(threshold=-1.0)
    c.fraction = 1 / 3
    h = tokens()
    rate = vein.off_plane(h)[0]
    for mode in (True, False):
        moved = c.train(mode)(h).abs().amax(-1) > 0
        assert moved.sum(1).tolist() == [3, 3]
        assert bool((rate[moved].min() >= rate[~moved].max()) | (moved.sum() == 6))
    padding = torch.ones(2, 9, dtype=torch.bool)
    padding[0, int(rate[0].argmax())] = False
    assert not (c(h, key_padding=padding).abs().amax(-1) > 0)[0, int(rate[0].argmax())]


def test_a_causal_model_must_not_choose_a_fraction() -> None:
    c, _ = pair()
    c.fraction = 0.5
    with pytest.raises(UsageError, match="causal"):
        c(tokens(), is_causal=True)


def test_without_a_vein_it_says_so() -> None:
    shared = (
        NormalCompensator(D),
        VFTFeedForward(D, R, shared=True),
        TVAAttention(D, 2, R, options=AttentionOptions(shared=True)),
    )
    for part in shared:
        with pytest.raises(UsageError, match="projector="):
            part.double()(tokens())


@pytest.mark.parametrize("wrong", [{"s": -1}, {"temperature": 0.0}, {"fraction": 1.5}])
def test_settings_outside_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        NormalCompensator(D, **wrong)  # type: ignore[arg-type]  # s is an int there


@pytest.mark.parametrize(("load", "expected"), [(1.0, 0.18), (2.0, 0.171), (100.0, 0.05), (-100.0, 0.35)])
def test_the_policy_moves_the_threshold_while_training_and_never_in_eval_mode(load: float, expected: float) -> None:
    c, _ = pair()
    adapt_threshold_(c.eval(), load)
    assert float(c.tau) == pytest.approx(0.18)
    adapt_threshold_(c.train(), load)
    assert float(c.tau) == pytest.approx(expected, rel=1e-6)
