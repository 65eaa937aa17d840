"""Maps whose measures are known; slow twins that read transformers' own attentions; who is asked and who has nothing to say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.analyzer import ANALYZERS
from layerwise.analyzers.attention_analysis import (
    SLOPES,
    UNITS,
    AttentionAnalyzer,
    SlopeStatistic,
    disagreement,
    distance,
    focus,
)
from layerwise.attention_maps import AttentionCall, Explicit, Fused
from layerwise.data import Batch, Data
from layerwise.errors import UsageError
from layerwise.model import UniversalModel
from layerwise.observe import observe
from layerwise.scores import Status
from layerwise.sweep import Sweep
from layerwise.task import Classification, Fidelity
from tests.models import CASES, Attending, AttendingNet, vectors


def call_of(query: Tensor, key: Tensor, mask: Tensor | None = None, causal: bool = False) -> AttentionCall:
    call = Fused(query, key, torch.randn_like(key), mask, causal, 1.0)
    call.samples, call.first, call.keep = len(query), True, call.own_padding()
    return call


def mean(sums: Any) -> float:
    return float(sums[0].sum() / sums[1].sum())


def one_hot(targets: list[list[int]], keys: int) -> AttentionCall:
    """Heads whose queries look at one key each: targets[head][query]."""
    query = torch.nn.functional.one_hot(torch.tensor(targets), keys)[None] * 1e3
    return call_of(query.float(), torch.eye(keys).expand(1, len(targets), keys, keys))


@pytest.mark.parametrize("causal", [False, True])
def test_without_a_query_attention_is_uniform_on_what_is_visible_and_scores_0(causal: bool) -> None:
    call = call_of(torch.zeros(2, 3, 6, 4), torch.randn(2, 3, 6, 4), causal=causal)
    weights, visible = call.weights(slice(0, 6))
    torch.testing.assert_close(weights, (visible / visible.sum(-1, keepdim=True)).double().expand_as(weights))
    assert mean(focus(call)) == pytest.approx(0.0, abs=1e-12)
    entropy = torch.special.entr(weights).sum(-1)
    expected = torch.arange(1, 7).double().log() if causal else torch.full((6,), math.log(6)).double()
    torch.testing.assert_close(entropy, expected.expand_as(entropy))


def test_attention_to_one_key_scores_1() -> None:
    assert mean(focus(one_hot([[0, 2, 1], [1, 1, 0]], 3))) == pytest.approx(1.0, abs=1e-12)


def test_padding_is_neither_seen_nor_counted() -> None:
    mask = torch.ones(1, 1, 1, 5, dtype=torch.bool)
    mask[..., 3:] = False
    call = call_of(torch.zeros(1, 2, 5, 4), torch.randn(1, 2, 5, 4), mask)
    assert float(focus(call)[1]) == 2 * 3
    assert mean(focus(call)) == pytest.approx(0.0, abs=1e-12)


def test_a_query_that_sees_one_key_is_not_counted() -> None:
    assert float(focus(call_of(torch.randn(1, 1, 4, 2), torch.randn(1, 1, 4, 2), causal=True))[1]) == 3


def test_distance_is_that_of_the_positions() -> None:
    assert mean(distance(one_hot([[1, 2, 3, 2]], 4))) == pytest.approx(1.0, abs=1e-9)
    uniform = call_of(torch.zeros(1, 1, 7, 2), torch.randn(1, 1, 7, 2))
    assert mean(distance(uniform)) == pytest.approx((49 - 1) / (3 * 7))
    assert distance(call_of(torch.zeros(1, 1, 7, 2), torch.randn(1, 1, 6, 2))) is None


def test_heads_that_agree_score_0_and_heads_that_share_no_key_score_1() -> None:
    assert mean(disagreement(one_hot([[0, 1, 2], [0, 1, 2]], 3))) == pytest.approx(0.0, abs=1e-12)
    assert mean(disagreement(one_hot([[0, 1, 2], [1, 2, 0], [2, 0, 1]], 3))) == pytest.approx(1.0, abs=1e-12)
    assert disagreement(call_of(torch.zeros(1, 1, 7, 2), torch.randn(1, 1, 7, 2))) is None


def attentions(model: UniversalModel, batch: Batch) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """transformers' own maps, their gradients of the summed loss, and which positions are no padding."""
    model.module.set_attn_implementation("eager")
    output = model.module(**batch.kwargs, output_attentions=True)
    losses = Classification().likelihood(output.logits, batch, torch.Generator())
    maps = list(output.attentions)
    gradients = torch.autograd.grad(losses.sum(), maps)
    return [m.detach().double() for m in maps], [g.double() for g in gradients], batch.kwargs["attention_mask"].bool()


def naive(measure: str, maps: list[Tensor], gradients: list[Tensor], keep: Tensor) -> list[float]:
    """Sample by sample, head by head, query by query."""
    samples, heads, positions, _ = maps[0].shape
    flow = [torch.eye(positions, dtype=torch.float64) for _ in range(samples)]
    found = []
    for a, g in zip(maps, gradients, strict=True):
        values, weight = 0.0, 0.0
        for n in range(samples):
            rows = [i for i in range(positions) if keep[n, i]]
            before = flow[n]
            flow[n] = (0.5 * a[n].mean(0) + 0.5 * torch.eye(positions)) @ before
            if measure in {"gradient", "head_importance"}:
                for h in range(heads):
                    product = torch.stack([a[n, h, i] * g[n, h, i] for i in rows])
                    values += float(product.abs().sum() if measure == "gradient" else product.sum().abs())
                weight += 1
                continue
            for i in rows:
                p = [a[n, h, i][keep[n]] for h in range(heads)]
                entropies = [-float((x * x.log()).sum()) for x in p]
                middle = sum(p) / heads
                joint = -float((middle * middle.log()).sum())
                values += {
                    "entropy": sum(1 - e / math.log(len(rows)) for e in entropies) / heads,
                    "distance": sum(float(x[k]) * abs(i - j) for x in p for k, j in enumerate(rows)) / heads,
                    "redundancy": (joint - sum(entropies) / heads) / math.log(heads),
                    "rollout": float((flow[n][i] - before[i]).abs().sum()) / 2,
                }[measure]
                weight += 1
        found.append(values / weight)
    return found


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("measure", UNITS)
def test_scores_equal_the_naive_loop_over_the_models_own_maps(measure: Any, implementation: str) -> None:
    case = CASES["bert"]
    batch, model = case.batch(4), case.model(Classification())
    twin = case.model()
    for module in (model.module, twin.module):
        for name, parameter in module.named_parameters():
            if "query.weight" in name or "key.weight" in name:
                parameter.data *= 25  # maps of random weights are all but uniform, and then any two of them commute
    expected = naive(measure, *attentions(twin, batch))
    model.module.set_attn_implementation(implementation)
    scores = AttentionAnalyzer(measure=measure).analyze(model, Data.of([batch]))
    assert list(scores.values()) == pytest.approx(expected, rel=2e-4)
    assert scores.unit == UNITS[measure]


def test_head_importance_is_the_gradient_of_a_gate_on_each_head() -> None:
    class Gated(Attending):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.up(x).reshape(len(x), 3, 2, -1, 1).unbind(1)
            gate = torch.ones(len(x), 2, 1, 1, requires_grad=True)
            gates.append(gate)
            return x + self.down((gate * torch.nn.functional.scaled_dot_product_attention(q, k, v)).flatten(1))

    gates: list[Tensor] = []
    torch.manual_seed(0)
    net, batch = AttendingNet(), vectors()(6)
    scores = AttentionAnalyzer(measure="head_importance").analyze(
        UniversalModel(net, task=Classification(), example=batch), Data.of([batch])
    )
    for block in net.blocks:
        block.__class__ = Gated
    losses = Classification().likelihood(net(*batch.args), batch, torch.Generator())
    expected = [g.flatten(1).abs().sum(1).mean().item() for g in torch.autograd.grad(losses.sum(), gates)]
    assert list(scores.values()) == pytest.approx(expected, rel=1e-4)


def test_the_decoders_padding_is_left_out_of_its_attention_to_the_encoder() -> None:
    case = CASES["t5"]
    batch = case.batch(3)
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[1, 3:] = 0
    padded = Batch(batch.args, {**batch.kwargs, "decoder_attention_mask": mask})
    model = case.model(Fidelity())
    statistic = AttentionAnalyzer(measure="entropy").statistic(model)
    observe(model, Data.of([padded]), {"x": statistic})
    heads, encoder = 4, 9 + 9 + 7
    rows = 5 + 5 + 3
    assert float(statistic.moments.sums[1, 0]) == heads * encoder
    assert float(statistic.moments.sums[1, 3]) == heads * (rows - 3 + rows)  # each first decoder position sees only itself


@pytest.mark.parametrize(("measure", "backwards"), [("entropy", 0), ("rollout", 0), ("gradient", 1)])
def test_a_batch_costs_one_forward_and_for_gradients_one_backward(measure: Any, backwards: int) -> None:
    model = CASES["vit"].model(Classification())
    sweep = Sweep(model, [AttentionAnalyzer(measure=measure).statistic(model)])
    sweep.batch(CASES["vit"].batch(4), seed=0)
    assert (sweep.counts.forwards, sweep.counts.backwards) == (1, backwards)


def test_scores_do_not_depend_on_who_else_shares_the_pass() -> None:
    case = CASES["bert"]
    model = case.model(Classification())
    alone, shared = (AttentionAnalyzer().statistic(model) for _ in range(2))
    observe(model, case.data(), {"x": alone})
    other = ANALYZERS["fisher_information"]().statistic(model)
    assert other is not None
    observe(model, case.data(), {"x": shared, "y": other})
    torch.testing.assert_close(shared.state()["moments"], alone.state()["moments"])


def test_a_batch_that_failed_half_way_leaves_nothing() -> None:
    statistic = SlopeStatistic(2, "gradient")
    statistic._batch.add_(0, torch.ones(4), torch.ones(4))
    statistic.load_(statistic.state())
    assert not statistic._batch.found


@pytest.mark.parametrize("measure", SLOPES)
def test_a_row_without_keys_adds_nothing_to_a_slope(measure: str) -> None:
    scores = torch.randn(2, 2, 3, 3)
    scores[:, :, 1] = float("-inf")
    call = Explicit(scores.softmax(-1), None)
    call.samples, call.keep, call.gradient = 2, torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 2, 3, 3)
    call.gradient[:, :, 1] = math.nan
    assert SLOPES[measure](call).tolist() == pytest.approx([2 * 2.0] * 2)


def test_one_head_has_nobody_to_agree_with_and_that_is_said() -> None:
    from tests.models import images, timm_model

    build = timm_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=1)
    model = UniversalModel(build().eval(), task=Classification(), example=images()(2))
    scores = AttentionAnalyzer(measure="redundancy").analyze(model, Data.of([images()(4)]))
    assert {e.status for e in scores.entries.values()} == {Status.NOT_APPLICABLE}
    assert all("attention" in e.reason for e in scores.entries.values())


def test_an_unknown_measure_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="entropy"):
        AttentionAnalyzer(measure="entropi")  # type: ignore[arg-type]
