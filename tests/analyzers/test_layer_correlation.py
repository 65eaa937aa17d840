"""Similarity where it is known: rotations, scales, independent noise, identity blocks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from layerwise.analyzers.layer_correlation import LayerCorrelationAnalyzer, angle, gram, positions, unbiased_hsic
from layerwise.data import Batch, Data
from layerwise.errors import UsageError
from layerwise.model import UniversalModel
from layerwise.scores import Status
from layerwise.task import Classification
from tests.models import CASES, Residual, vectors


def cka(x: torch.Tensor, y: torch.Tensor) -> float:
    k, g = gram(x), gram(y)
    return float(unbiased_hsic(k, g) / (unbiased_hsic(k, k) * unbiased_hsic(g, g)).sqrt())


def test_cka_is_1_for_rotations_and_scales() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 12, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))
    assert cka(x, x @ q) == pytest.approx(1.0, abs=1e-12)
    assert cka(x, 3.5 * x) == pytest.approx(1.0, abs=1e-12)


def test_unbiased_cka_of_independent_noise_is_near_0_where_the_biased_one_is_near_1() -> None:
    torch.manual_seed(0)
    values = [cka(torch.randn(16, 2000), torch.randn(16, 2000)) for _ in range(20)]
    x, y = torch.randn(16, 2000).double(), torch.randn(16, 2000).double()
    k, g = gram(x - x.mean(0)), gram(y - y.mean(0))
    biased = float((k * g).sum() / ((k * k).sum() * (g * g).sum()).sqrt())
    assert abs(sum(values) / 20) < 0.05 < 0.8 < biased


def test_unbiased_hsic_follows_its_definition() -> None:
    torch.manual_seed(0)
    k, g = gram(torch.randn(6, 3)), gram(torch.randn(6, 4))
    total, n = 0.0, 6
    for i in range(n):
        for j in range(n):
            for q in range(n):
                for r in range(n):
                    if len({i, j, q, r}) == 4:
                        total += float(k[i, j] * (g[i, j] + g[q, r] - 2 * g[i, q]))
    assert float(unbiased_hsic(k, g)) == pytest.approx(total / (n * (n - 1) * (n - 2) * (n - 3)), rel=1e-9)


def test_minibatch_cka_of_one_batch_is_the_full_one() -> None:
    case = CASES["resnet"]
    model, batch = case.model(Classification()), case.batch(10)
    scores = LayerCorrelationAnalyzer(measure="cka").analyze(model, Data.of([batch]))
    with model.capture([x.name for x in model.layers]) as seen:
        model.predict(batch)
    for name, (entering, leaving) in seen.items():
        assert scores[name] == pytest.approx(1 - cka(entering, leaving), rel=1e-9)


def test_the_cka_standard_error_is_that_of_repeated_draws() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    model = UniversalModel(net, task=Classification(), example=vectors()(2))
    draws = [
        LayerCorrelationAnalyzer(measure="cka").analyze(model, Data.of([(torch.randn(16, 8),) for _ in range(20)])).entries["0"]
        for _ in range(40)
    ]
    spread = torch.tensor([d.value for d in draws]).std()
    assert sum(d.stderr for d in draws) / 40 == pytest.approx(float(spread), rel=0.35)


def test_block_influence_of_an_identity_block_is_0_and_of_a_turn_is_its_angle() -> None:
    class Turn(nn.Module):
        def __init__(self, angle: float) -> None:
            super().__init__()
            c, s = math.cos(angle), math.sin(angle)
            self.a = nn.Parameter(torch.tensor([[c, -s], [s, c]], dtype=torch.float64))
            self.b = nn.Parameter(torch.eye(2, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.a.T @ self.b

    net = nn.Sequential(Turn(0.0), Turn(0.5), Turn(math.pi / 2))
    x = torch.randn(9, 2, dtype=torch.float64)
    model = UniversalModel(net, task=Classification(), example=Batch((x,)))
    scores = LayerCorrelationAnalyzer().analyze(model, Data.of([x]))
    assert [scores[str(i)] for i in range(3)] == pytest.approx([0.0, 1 - math.cos(0.5), 1.0], abs=1e-12)
    angles = LayerCorrelationAnalyzer(measure="angular").analyze(model, Data.of([x]))
    assert [angles[str(i)] for i in range(3)] == pytest.approx([0.0, 0.5 / math.pi, 0.5], abs=1e-12)
    assert angles.unit == "angle / π"


def test_the_angle_keeps_its_digits_where_the_cosine_is_nearly_1() -> None:
    distance = torch.tensor([0.0, 1 - math.cos(1e-4), 2.0, 2.0 + 1e-15], dtype=torch.float64)
    assert angle(distance).tolist() == pytest.approx([0.0, 1e-4 / math.pi, 1.0, 1.0], rel=1e-7)


@pytest.mark.parametrize("measure", ["block_influence", "angular"])
@pytest.mark.parametrize("tokens", ["all", "last"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_measures_of_positions_equal_the_loop_over_tokens(measure: Any, tokens: Any, side: str) -> None:
    case = CASES["bert"]
    model, batch = case.model(Classification()), case.batch(4)
    if side == "left":
        batch.kwargs["attention_mask"] = batch.kwargs["attention_mask"].flip(1)
    scores = LayerCorrelationAnalyzer(measure=measure, tokens=tokens).analyze(model, Data.of([batch]))
    with model.capture([x.name for x in model.layers]) as seen:
        model.predict(batch)
    for name, (entering, leaving) in seen.items():
        values = []
        for x, y, mask in zip(entering.double(), leaving.double(), batch.kwargs["attention_mask"], strict=True):
            kept = [i for i in range(len(mask)) if mask[i]]
            for i in kept if tokens == "all" else kept[-1:]:
                cos = float(x[i] @ y[i] / (x[i].norm() * y[i].norm()))
                values.append(1 - cos if measure == "block_influence" else math.acos(cos) / math.pi)
        assert scores[name] == pytest.approx(sum(values) / len(values), rel=1e-9)


def test_cka_has_no_last_token() -> None:
    with pytest.raises(UsageError, match="angular"):
        LayerCorrelationAnalyzer(measure="cka", tokens="last")


def test_padding_does_not_count() -> None:
    case = CASES["bert"]
    model, batch = case.model(Classification()), case.batch(4)
    scores = LayerCorrelationAnalyzer().analyze(model, Data.of([batch]))
    with model.capture([x.name for x in model.layers]) as seen:
        model.predict(batch)
    keep = batch.kwargs["attention_mask"].bool()
    for name, (entering, leaving) in seen.items():
        cos = torch.cosine_similarity(positions(entering), positions(leaving), dim=-1)
        assert scores[name] == pytest.approx(float((1 - cos)[keep].mean()), rel=1e-9)


def test_layers_that_change_the_shape_have_no_block_influence_but_a_cka() -> None:
    case = CASES["resnet"]
    influence = LayerCorrelationAnalyzer().analyze(case.model(Classification()), case.data())
    assert influence.entries["layer2.0"].status is Status.NOT_APPLICABLE
    assert len(LayerCorrelationAnalyzer(measure="cka").analyze(case.model(Classification()), case.data()).usable()) == 8


def test_a_block_that_writes_into_its_input_is_not_taken_for_an_identity() -> None:
    class InPlace(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.add_(self.down(torch.relu(self.up(x))))

    torch.manual_seed(0)
    net = nn.Sequential(InPlace(8), InPlace(8))
    model = UniversalModel(net, task=Classification(), example=vectors()(2))
    assert min(LayerCorrelationAnalyzer().analyze(model, Data.of([vectors()(6)])).values()) > 1e-3


def test_batches_too_small_for_the_unbiased_estimator_are_said() -> None:
    case = CASES["vit"]
    scores = LayerCorrelationAnalyzer(measure="cka").analyze(case.model(Classification()), case.data(3))
    assert {e.reason for e in scores.entries.values()} == {"needs batches of at least 4 samples"}
