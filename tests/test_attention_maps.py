"""Watched attention: maps that reproduce the model's own outputs, and a model that does not notice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise import attention_maps
from layerwise.analyzer import Signal
from layerwise.analyzers.attention_analysis import MapStatistic, SlopeStatistic
from layerwise.attention_maps import AttentionCall, Explicit, Fused
from layerwise.data import Batch
from layerwise.model import UniversalModel
from layerwise.sweep import Seen, Sweep
from layerwise.task import Classification, Fidelity
from tests.models import CASES

SUBJECTS = {"vit": 4, "bert": 3, "gpt2": 3, "llama": 3, "t5": 9, "albert": 3, "encoder": 3, "attending": 4}


def subject(name: str, implementation: str = "") -> UniversalModel:
    model = CASES[name].model(Fidelity())
    if implementation:
        model.module.set_attn_implementation(implementation)
    return model


def noted(model: UniversalModel, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> list[tuple[AttentionCall, Tensor]]:
    """Every call that the watch saw in one sweep, with what the model's own function gave."""
    found: list[tuple[AttentionCall, Tensor]] = []

    def note(self: object, first: AttentionCall, second: AttentionCall, output: Tensor, split: object) -> None:
        found.append((first, output.detach()))
        original(self, first, second, output, split)

    original = attention_maps._Watch._note
    monkeypatch.setattr(attention_maps._Watch, "_note", note)
    Sweep(model, [MapStatistic(len(model.layers), "entropy")]).batch(batch, seed=0)
    return found


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_recomputed_map_times_the_values_is_the_output_of_the_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = noted(subject(name), CASES[name].batch(3), monkeypatch)
    assert len(found) == SUBJECTS[name]
    for call, output in found:
        weights, visible = call.weights(slice(0, call.shape[2]))
        sees = visible.any(-1).expand(weights.shape[:3])
        assert bool(sees[call.keep[:, None].expand_as(sees)].all())
        if isinstance(call, Fused):
            torch.testing.assert_close((weights @ call.value.double())[sees].float(), output[sees], atol=1e-5, rtol=1e-4)
        else:
            torch.testing.assert_close(weights[sees].float(), output[sees])


def test_grouped_and_causal_calls_were_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [call for call, _ in noted(subject("llama"), CASES["llama"].batch(3), monkeypatch)]
    assert all(call.shape[1] == 4 for call in calls)
    assert all(not bool(call.weights(slice(0, 9))[1].expand(3, 1, 9, 9).triu(1).any()) for call in calls)


@pytest.mark.parametrize(("name", "implementation"), [(n, "") for n in SUBJECTS] + [("bert", "eager"), ("gpt2", "eager")])
@pytest.mark.parametrize("kind", [MapStatistic, SlopeStatistic])
def test_watching_does_not_change_a_bit_of_the_output(name: str, implementation: str, kind: type) -> None:
    class Plain(kind):  # type: ignore[misc,valid-type]
        needs = kind.needs - {Signal.ATTENTION}

        def observe(self, seen: Seen) -> None:
            outputs.append(seen.output)

    class Watching(kind):  # type: ignore[misc,valid-type]
        def observe(self, seen: Seen) -> None:
            outputs.append(seen.output)

    outputs: list[Tensor | None] = []
    model, batch = subject(name, implementation), CASES[name].batch(3)
    measure = "entropy" if kind is MapStatistic else "gradient"
    for watcher in (Plain, Watching):
        Sweep(model, [watcher(len(model.layers), measure)]).batch(batch, seed=0)
    assert torch.equal(outputs[0], outputs[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_multihead_attention_is_seen_from_within(need_weights: bool, mask: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.out = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.ones(4, 4, dtype=torch.bool).triu(1)
            biases = {None: None, "bool": hidden, "float": torch.zeros(4, 4).masked_fill(hidden, float("-inf"))}
            mixed, given = self.attention(x, x, x, attn_mask=biases[mask], need_weights=need_weights, average_attn_weights=False)
            maps.append(given)
            return x + self.out(mixed)

    maps: list[Tensor | None] = []
    torch.manual_seed(0)
    net = nn.Sequential(Block(), Block(), nn.Flatten(), nn.Linear(32, 3)).eval()
    batch = Batch((torch.randn(5, 4, 8),))
    model = UniversalModel(net, task=Fidelity(), example=batch)
    assert len(model.layers) >= 2
    maps.clear()
    found = noted(model, batch, monkeypatch)
    assert [type(call) for call, _ in found] == [Explicit if need_weights else Fused] * 2
    for (call, output), given in zip(found, maps, strict=True):
        weights, visible = call.weights(slice(0, 4))
        assert bool(visible.expand_as(weights).triu(1).any()) == (mask is None)
        if isinstance(call, Fused):
            torch.testing.assert_close((weights @ call.value.double()).float(), output)
        else:
            torch.testing.assert_close(weights.float(), given)
    assert F.softmax.__module__ == "torch.nn.functional"


def test_a_row_without_keys_has_no_weights_and_no_nan() -> None:
    q, k, v = torch.randn(3, 2, 2, 4, 8).unbind(0)
    mask = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    mask[:, :, 1] = False
    for given in (mask, torch.zeros(2, 1, 4, 4).masked_fill(~mask, float("-inf")), torch.where(mask, 0.0, torch.finfo().min)):
        weights, visible = Fused(q, k, v, given, False, None).weights(slice(0, 4))
        assert torch.equal(weights[:, :, 1], torch.zeros(2, 2, 4, dtype=torch.float64))
        assert bool(weights.isfinite().all())
        assert torch.equal(visible, mask)
    scores = torch.zeros(2, 2, 4, 4).masked_fill(~mask, float("-inf"))
    for held in (scores, None):
        weights, _ = Explicit(scores.softmax(-1), held).weights(slice(0, 4))
        assert torch.equal(weights[:, :, 1], torch.zeros(2, 2, 4, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(3, 5, 4), (3, 2, 5, 4), (3, 2, 2, 5, 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_any_number_of_leading_dimensions_is_rows_and_heads(shape: tuple[int, ...], masked: bool) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, *shape).unbind(0)
    mask = torch.randn(*shape[:-2], 5, 5) > -0.5 if masked else None
    if mask is not None:
        mask[..., 0] = True
    call = Fused(q, k, v, mask, False, 0.7)
    mixed = call.weights(slice(0, 5))[0] @ call.value.double()
    torch.testing.assert_close(mixed.float().reshape(shape), F.scaled_dot_product_attention(q, k, v, mask, scale=0.7))


def test_grouped_keys_and_values_belong_to_neighbouring_queries() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 5, 4), torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4)
    call = Fused(q, k, v, None, True, None)
    mixed = call.weights(slice(0, 5))[0] @ call.value.double()
    torch.testing.assert_close(mixed.float(), F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


def test_the_same_call_in_smaller_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(3, 2, 2, 7, 8).unbind(0)
    mask = torch.randn(2, 1, 7, 7)
    call = Fused(q, k, v, mask, True, None)
    whole = call.weights(slice(0, 7))[0]
    monkeypatch.setattr(attention_maps, "BLOCK", 2 * 2 * 7 * 3)
    slices = list(call.blocks())
    assert [(s.start, s.stop) for s in slices] == [(0, 3), (3, 6), (6, 7)]
    torch.testing.assert_close(torch.cat([call.weights(s)[0] for s in slices], 2), whole)


def test_no_more_than_a_block_is_formed_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    original: Callable[[Fused, slice], tuple[Tensor, Tensor]] = Fused.weights

    def weights(self: Fused, rows: slice) -> tuple[Tensor, Tensor]:
        found = original(self, rows)
        sizes.append(found[0].numel())
        return found

    monkeypatch.setattr(attention_maps, "BLOCK", 200)
    monkeypatch.setattr(Fused, "weights", weights)
    model = CASES["vit"].model(Classification())
    statistics = [MapStatistic(4, "entropy"), SlopeStatistic(4, "gradient")]
    Sweep(model, statistics).batch(CASES["vit"].batch(3), seed=0)
    assert 0 < max(sizes) <= 200
