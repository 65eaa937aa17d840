"""The names under which pruning is asked for: both shapes of each, new models, honest figures."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layerwise.data import Data
from layerwise.errors import UsageError
from layerwise.model import UniversalModel
from layerwise.plugins.model_pruning import ModelPruningPlugin, cubic
from layerwise.sparsity import weights_of
from layerwise.zeros import pruning_statistics
from tests.models import CASES, ResidualNet

PLUGIN = ModelPruningPlugin(config={"learning_rate": 0.01, "epochs": 1})
DATA = CASES["residual"].data(8, 8)
RAW = [(b.args[0], b.labels) for b in DATA]


def model() -> UniversalModel:
    return CASES["residual"].model()


def share(found: UniversalModel) -> float:
    weights = [p for n, p in found.module.named_parameters() if n.startswith("blocks") and p.dim() > 1]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def test_both_shapes_of_magnitude_pruning_give_new_models() -> None:
    original = model()
    before = original.fingerprint
    assert share(PLUGIN.magnitude_pruning(original, 0.25).model) == 0.25
    assert share(PLUGIN.magnitude_pruning(original, sparsity=0.5, granularity="global").model) == 0.5
    assert share(PLUGIN.magnitude_pruning(original).model) == pytest.approx(0.3, abs=0.005)  # prune_ratio
    assert share(PLUGIN.magnitude_pruning(original, 0.5, "row", norm=2).model) == 0.5
    layers = PLUGIN.magnitude_pruning(original, 0.5, per_layer={"blocks.0": 0.0}).statistics.layers
    assert [layers[f"blocks.{i}"].sparsity for i in range(4)] == [0.0, 0.5, 0.5, 0.5]
    assert original.fingerprint == before
    with pytest.raises(UsageError, match="Did you mean 'global'"):
        PLUGIN.magnitude_pruning(original, 0.5, "globl")


def test_taylor_pruning_reads_plain_modules_and_loaders() -> None:
    torch.manual_seed(0)
    module = ResidualNet().eval()
    assert share(PLUGIN.taylor_pruning(module, RAW, 0.4).model) == pytest.approx(0.4, abs=0.001)
    assert share(PLUGIN.taylor_pruning(module, RAW, sparsity=0.4, scope="local").model) == pytest.approx(0.4, abs=0.005)


def test_a_lottery_ticket_needs_data_and_keeps_to_its_rate() -> None:
    assert share(PLUGIN.lottery_ticket_pruning(model(), RAW, 2, 0.5).model) == 0.75
    with pytest.raises(UsageError, match="found by training"):
        PLUGIN.lottery_ticket_pruning(model(), 3)
    with pytest.raises(UsageError, match="Did you mean 'learning_rate'"):
        PLUGIN.lottery_ticket_pruning(model(), RAW, 2, 0.5, learning_rat=0.1)


def test_fine_tuning_keeps_zeros_and_takes_an_optimizer_or_validation_data() -> None:
    pruned = PLUGIN.magnitude_pruning(model(), 0.5)
    tuned = PLUGIN.fine_tune_after_pruning(pruned, RAW, RAW, epochs=2)
    assert share(tuned.model) == 0.5
    assert tuned.model.fingerprint != pruned.model.fingerprint
    assert tuned.plan.steps[0].settings["patience"] == 2
    optimizer = torch.optim.SGD(pruned.model.module.parameters(), lr=0.02, momentum=0.5)
    settings = PLUGIN.fine_tune_after_pruning(pruned.model, RAW, optimizer).plan.steps[0].settings
    assert (settings["optimizer"], settings["learning_rate"], settings["momentum"]) == ("sgd", 0.02, 0.5)
    with pytest.raises(UsageError, match="no RMSprop"):
        PLUGIN.fine_tune_after_pruning(pruned, RAW, torch.optim.RMSprop(pruned.model.module.parameters()))


@pytest.mark.parametrize("method", ["magnitude", "taylor", "wanda", "progressive", "lottery"])
def test_the_pipeline_ends_at_the_target_and_has_watched(method: str) -> None:
    run = PLUGIN.prune_model(model(), RAW, RAW, 0.5, method, stages=3)
    assert share(run.model) == pytest.approx(0.5, abs=0.01)
    assert run.history[-1].target == 0.5
    assert [s.target for s in run.history] == (
        [0.0, *cubic(0.5, 3)] if method in ("magnitude", "taylor", "wanda") else [0.0, 0.5]
    )
    assert all("accuracy" in s.metrics for s in run.history)


def test_the_pipeline_stops_before_it_costs_too_much() -> None:
    start = PLUGIN.fine_tune_after_pruning(model(), RAW, RAW, epochs=30, learning_rate=0.02).model
    run = PLUGIN.prune_model(start, RAW, RAW, 1.0, "magnitude", stages=2, largest_drop=0.1, epochs=0)
    assert "would fall by more than 0.1" in run.stopped
    assert len(run.history) == 3 or share(run.model) == 0
    assert share(run.model) < 1
    assert share(run.model) == pytest.approx(run.history[-2].target, abs=0.01)


def test_what_is_no_method_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'taylor'"):
        PLUGIN.prune_model(model(), RAW, RAW, 0.5, "tailor")
    with pytest.raises(UsageError, match="at least 1"):
        cubic(0.5, 0)
    with pytest.raises(UsageError, match="treats no layer"):
        PLUGIN.structured_pruning(model(), 0.5, "channel", engine="torch_pruning")  # no convolution
    with pytest.raises(UsageError, match=r"unknown prune_type 'neurone'\. Did you mean 'neuron'"):
        PLUGIN.structured_pruning(model(), 0.5, "neurone")
    with pytest.raises(UsageError, match="takes out no heads"):
        PLUGIN.structured_pruning(model(), 0.5, "head", engine="torch_pruning")


@pytest.mark.parametrize("engine", ["layerwise", "torch_pruning"])
def test_structured_pruning_really_shrinks(engine: str) -> None:
    case = CASES["resnet"]
    found = PLUGIN.structured_pruning(case.model(), 0.5, "filter", engine=engine).statistics
    assert found["parameters"] < 0.7 * pruning_statistics(case.model())["parameters"]


def test_neurons_go_too() -> None:
    found = PLUGIN.structured_pruning(model(), 0.5, "neuron").model
    assert [b.up.out_features for b in found.module.blocks] == [8] * 4


def test_statistics_count_each_weight_once_and_say_what_zeros_are_worth() -> None:
    pruned = PLUGIN.magnitude_pruning(model(), 0.75)
    found, before = PLUGIN.get_pruning_statistics(pruned), PLUGIN.get_pruning_statistics(model())
    weights = weights_of(pruned.model.module, [f"blocks.{i}" for i in range(4)])
    assert found["zeros"] == sum(int((w == 0).sum()) for w in weights.values())
    assert found["parameters"] == sum(p.numel() for p in pruned.model.module.parameters())
    assert found["sparsity"] == found["zeros"] / found["prunable"]
    assert found["bytes"] == before["bytes"]
    assert found["compressed_bytes"] < 0.8 * before["compressed_bytes"]
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    wrapped = UniversalModel(tied, example=Data.of([torch.ones(2, 4)])[0])
    assert pruning_statistics(wrapped)["parameters"] == 16 + 8
