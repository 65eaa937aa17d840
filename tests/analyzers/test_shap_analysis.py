"""Shapley values of layers against the definition, the shap package, and what they may cost."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from layerwise import games
from layerwise.analyzers.layer_ablation import LayerAblationAnalyzer
from layerwise.analyzers.shap_analysis import ExactValues, SampledValues, SHAPAnalyzer
from layerwise.data import Data
from layerwise.errors import UsageError
from layerwise.model import UniversalModel
from layerwise.observe import observe
from layerwise.scores import Status
from layerwise.task import Classification
from tests.models import CASES, ResidualNet, vectors
from tests.replicas import naive_skip


def deep(depth: int) -> UniversalModel:
    torch.manual_seed(0)
    return UniversalModel(ResidualNet(depth=depth), task=Classification(), example=vectors()(2))


def worth(model: UniversalModel, data: Data, active: frozenset[int]) -> float:
    """−mean loss with only the layers of `active` among those that can be skipped, by hooks."""
    assert model.task is not None
    total = weight = 0.0
    for batch in data:
        output = naive_skip(model, batch, [x for x in model.layers if x.skippable and x.index not in active])
        losses, weights = model.task.losses(output, batch, model.predict(batch))
        total, weight = total + float(losses.sum()), weight + float(weights.sum())
    return -total / weight


@pytest.mark.parametrize("name", ["vit", "resnet", "bert", "gpt2", "t5"])
def test_equals_the_definition_on_naively_skipped_layers(name: str) -> None:
    case = CASES[name]
    model, data = case.model(), case.data(4, 3)
    model.see(data[0])
    scores = SHAPAnalyzer().analyze(model, data)
    players = [x.index for x in model.layers if x.skippable]
    known = {
        s: torch.tensor(worth(model, data, frozenset(players[p] for p in s)), dtype=torch.float64)
        for s in games.coalitions(len(players), len(players))
    }
    expected = games.values(known, len(players))
    assert list(scores.usable().values()) == pytest.approx(expected.tolist(), abs=1e-10)
    everyone, nobody = known[frozenset(range(len(players)))], known[frozenset()]
    assert sum(scores.usable().values()) == pytest.approx(float(everyone - nobody), abs=1e-10)
    for layer in model.layers:
        if not layer.skippable:
            assert scores.entries[layer.name].status is Status.NOT_APPLICABLE
            assert layer.reason in scores.entries[layer.name].reason


def test_agrees_with_the_exact_and_the_kernel_explainer_of_shap() -> None:
    shap = pytest.importorskip("shap")
    model, data = deep(5), Data.of([vectors()(20)])
    found = list(SHAPAnalyzer().analyze(model, data).values())

    def play(rows: np.ndarray) -> np.ndarray:
        return np.array([worth(model, data, frozenset(np.flatnonzero(row).tolist())) for row in rows])

    nobody, everyone = np.zeros((1, 5)), np.ones((1, 5))
    exact = shap.explainers.Exact(play, shap.maskers.Independent(nobody))(everyone).values[0]
    kernel = shap.KernelExplainer(play, nobody).shap_values(everyone, silent=True)[0]
    assert found == pytest.approx(exact.tolist(), abs=1e-9)
    assert found == pytest.approx(kernel.tolist(), abs=1e-6)  # solved by least squares


def test_twelve_layers_exactly_cost_4095_block_calls_a_batch() -> None:
    model = deep(12)
    statistic = SHAPAnalyzer().statistic(model)
    assert isinstance(statistic, ExactValues)
    seen = observe(model, Data.of([vectors()(2)]), {"shap_analysis": statistic})
    assert seen.counts.block_calls == 2**12 - 1
    assert seen.counts.forwards == 2**12


@pytest.mark.parametrize("layers", [13, 24])
def test_sampled_orders_cost_less_than_the_uncached_ones_over_1_7(layers: int) -> None:
    model = deep(layers)
    statistic = SHAPAnalyzer(permutations=16).statistic(model)
    assert isinstance(statistic, SampledValues)
    seen = observe(model, Data.of([vectors()(2), vectors()(3)]), {"shap_analysis": statistic})
    uncached = 2 * 16 * layers * (layers + 1) / 2
    assert seen.counts.block_calls <= uncached / 1.7


def test_sampled_values_lie_within_four_standard_errors_of_the_exact_ones() -> None:
    model, data = deep(7), Data.of([vectors()(30), vectors()(20)])
    exact = SHAPAnalyzer().analyze(model, data)
    statistic = SHAPAnalyzer(estimator="permutation", permutations=40).statistic(model)
    observe(model, data, {"shap_analysis": statistic})
    for layer in model.layers:
        assert isinstance(statistic, SampledValues)
        samples, orders = statistic.errors(layer.index)
        entry = SHAPAnalyzer().score(model, statistic)[layer.name]
        assert abs(entry.value - exact[layer.name]) < 4 * orders  # on the same samples only the orders differ
        assert entry.stderr == pytest.approx(math.hypot(samples, orders))
        assert samples == pytest.approx(exact.entries[layer.name].stderr, rel=0.5)


def test_every_batch_is_valued_by_the_same_orders_and_the_seed_draws_them() -> None:
    model, data = deep(6), Data.of([vectors()(9)])
    parts = Data.of([vectors()(9).narrow(0, 4), vectors()(9).narrow(4, 9)])
    sampled = SHAPAnalyzer(estimator="permutation", permutations=4)
    whole, split = sampled.analyze(model, data), sampled.analyze(model, parts)
    for name in whole:
        assert split[name] == pytest.approx(whole[name], rel=1e-6)
    other = SHAPAnalyzer(estimator="permutation", permutations=4, seed=1).analyze(model, data)
    assert dict(other) != dict(whole)


def test_truncated_to_one_missing_layer_it_is_the_ablation() -> None:
    case = CASES["bert"]
    data = case.data(5, 4)
    ablation = LayerAblationAnalyzer().analyze(case.model(), data)
    scores = SHAPAnalyzer(truncate=1).analyze(case.model(), data)
    for name, entry in scores.entries.items():
        assert entry.value == pytest.approx(ablation[name], abs=1e-12)
        assert entry.stderr == pytest.approx(ablation.entries[name].stderr, rel=1e-9)


def test_a_truncated_game_stays_exact_for_many_layers() -> None:
    model = deep(20)
    assert isinstance(SHAPAnalyzer(truncate=2).statistic(model), ExactValues)
    with pytest.raises(UsageError, match="smaller truncate"):
        SHAPAnalyzer(truncate=5).statistic(model)
    with pytest.raises(UsageError, match="coalitions of 20 layers"):
        SHAPAnalyzer(index="banzhaf").statistic(model)


def test_a_layer_that_adds_nothing_is_worth_nothing() -> None:
    model = deep(5)
    model.module.blocks[3].down.weight.data.zero_()
    model.module.blocks[3].down.bias.data.zero_()
    for analyzer in (SHAPAnalyzer(), SHAPAnalyzer(index="banzhaf"), SHAPAnalyzer(estimator="permutation", permutations=4)):
        assert analyzer.analyze(model, Data.of([vectors()(6)]))["blocks.3"] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("name", ["state", "merge"])
def test_the_sampled_state_saves_and_merges(name: str) -> None:
    model, analyzer = deep(5), SHAPAnalyzer(estimator="permutation", permutations=6)
    batches = [vectors()(6), vectors()(5)]
    whole, first, second, blank = (analyzer.statistic(model) for _ in range(4))
    for statistic, part in ((whole, batches), (first, batches[:1]), (second, batches[1:])):
        observe(model, Data.of(part), {"x": statistic})
    if name == "state":
        blank.load_(whole.state())
    else:
        for part in (first, second):
            blank.merge_(part)
    for entry, expected in zip(analyzer.score(model, blank).values(), analyzer.score(model, whole).values(), strict=True):
        assert (entry.value, entry.stderr) == pytest.approx((expected.value, expected.stderr), rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "exakt"}, "Did you mean 'exact'"),
        ({"index": "banzaf"}, "Did you mean 'banzhaf'"),
        ({"permutations": 7}, "even number"),
        ({"truncate": 0}, "at least 1"),
        ({"estimator": "permutation", "truncate": 2}, "whole game"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SHAPAnalyzer(**settings)
