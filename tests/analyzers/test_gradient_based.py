"""First-order estimates where they are exact, and the loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from layerwise.analyzers.gradient_based import GradientBasedAnalyzer
from layerwise.data import Batch, Data
from layerwise.errors import UsageError
from layerwise.model import UniversalModel
from layerwise.task import Classification, Task
from tests.models import CASES
from tests.replicas import sample_gradients


class Mean(Task):
    """A loss that is linear in the output: its sum."""

    name = "mean"
    quality = "loss"
    higher_is_better = False

    def figures(self, output: Tensor, batch: Batch, reference: Tensor | None) -> dict:
        return {"loss": (output.sum(-1).double(), torch.ones(len(output), dtype=torch.float64))}

    def likelihood(self, output: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        return output.sum(-1)


@pytest.mark.parametrize("form", ["absolute", "signed", "norm"])
@pytest.mark.parametrize("name", ["vit", "resnet", "bert"])
def test_equals_the_loop_over_samples(name: str, form: str) -> None:
    case = CASES[name]
    model, batch = case.model(), case.batch(4)
    model.see(batch)
    scores = GradientBasedAnalyzer(form=form).analyze(model, Data.of([batch]))
    rows = sample_gradients(model, batch, seed=0)
    for layer in model.layers:
        weights = list(layer.module.parameters())
        per_sample = []
        for row in rows:
            pairs = [(g.double(), w.double()) for g, w in zip(row[layer.index], weights, strict=True)]
            per_sample.append(
                {
                    "absolute": sum(float((g * w).abs().sum()) for g, w in pairs),
                    "signed": abs(sum(float((g * w).sum()) for g, w in pairs)),
                    "norm": sum(float(g.square().sum()) for g, _ in pairs) ** 0.5,
                }[form]
            )
        assert scores[layer.name] == pytest.approx(sum(per_sample) / len(per_sample), rel=1e-4, abs=1e-7)


def test_is_the_exact_removal_for_a_loss_linear_in_the_weights() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    model = UniversalModel(net, task=Mean(), example=Batch((x,)))
    score = GradientBasedAnalyzer(form="signed").analyze(model, Data.of([x]))["0"]
    assert score == pytest.approx(float(net(x).sum(-1).abs().mean()), rel=1e-12)  # removing the weights gives 0


def test_the_signed_form_is_blind_to_weights_whose_scale_does_not_matter() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6, bias=False), nn.LayerNorm(6, eps=0.0, elementwise_affine=False), nn.Linear(6, 3)).double()
    batch = Batch((torch.randn(8, 6, dtype=torch.float64),), {}, torch.randint(0, 3, (8,)))
    model = UniversalModel(net, task=Classification(), example=batch)
    signed = GradientBasedAnalyzer(form="signed").analyze(model, Data.of([batch]))
    absolute = GradientBasedAnalyzer().analyze(model, Data.of([batch]))
    assert signed["0"] < 1e-6 < 1e-2 < absolute["0"]  # the loss is computed in float32


def test_the_activation_form_is_exact_for_a_branch_that_enters_linearly() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    torch.manual_seed(0)
    net, x = Branches().double(), torch.randn(5, 4, dtype=torch.float64)
    model = UniversalModel(net, task=Mean(), example=Batch((x,)))
    scores = GradientBasedAnalyzer(form="activation").analyze(model, Data.of([x]))
    for name in scores:
        with model.skipping([name]):
            change = model.predict(x).sum(-1)
        assert scores[name] == pytest.approx(float((model.predict(x).sum(-1) - change).abs().mean()), rel=1e-10)


def test_an_unknown_form_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'absolute'"):
        GradientBasedAnalyzer(form="absolut")  # type: ignore[arg-type]


def test_does_not_depend_on_the_batch_size() -> None:
    case = CASES["resnet"]
    model, batch = case.model(Classification()), case.batch(6)
    one = GradientBasedAnalyzer().analyze(model, Data.of([batch]))
    many = GradientBasedAnalyzer().analyze(model, Data.of([batch.narrow(i, i + 1) for i in range(6)]))
    for name in one:
        assert one[name] == pytest.approx(many[name], rel=1e-5)


def test_for_a_quadratic_loss_it_misses_the_removal_by_exactly_half_of_the_curvature() -> None:
    class Square(Mean):
        def likelihood(self, output: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
            return 0.5 * (output[:, 0] - batch.labels).square()

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 1, bias=False)).double()
    x, y = torch.randn(1, 4, dtype=torch.float64), torch.tensor([5.0], dtype=torch.float64)
    model = UniversalModel(net, task=Square(), example=Batch((x,), {}, y))
    score = GradientBasedAnalyzer(form="signed").analyze(model, Data.of([(x, y)]))["0"]
    output = float(net(x))
    removal = 0.5 * 5.0**2 - 0.5 * (output - 5.0) ** 2
    first_order = -(output - 5.0) * output  # ⟨g, −w⟩
    assert score == pytest.approx(abs(first_order), rel=1e-12)
    assert removal - first_order == pytest.approx(0.5 * output**2, rel=1e-12)  # ½ wᵀHw, with H = xxᵀ
