"""Estimates for models that were not measured: right on a known profile, better than a constant, and honest about their error."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import layerwise
from layerwise.data import Batch, Data
from layerwise.importance import ImportanceReport, LayerInfo
from layerwise.model import UniversalModel
from layerwise.ranks import shares, spearman
from layerwise.scores import LayerScore, Scores, Status
from layerwise.task import Fidelity
from layerwise.transfer import IGNORANCE, fit_kernel, transferred
from tests.models import ResidualNet


@dataclass(frozen=True)
class Known:
    layers: tuple[LayerInfo, ...]
    scores: Scores


def known(depth: int, noise: float = 0.0, seed: int = 0, kind: str = "mlp", sizes: bool = False) -> Known:
    """A model whose importance falls with depth (or grows with the layers' size, in random order)."""
    rng = np.random.default_rng(seed)
    parameters = [int(p) for p in np.exp(rng.uniform(3, 9, depth))] if sizes else [100] * depth
    layers = tuple(LayerInfo(f"b.{i}", i, kind, parameters[i], True, "b") for i in range(depth))
    truth = np.log(parameters) if sizes else -np.arange(depth) / max(depth - 1, 1)
    values = truth + noise * rng.normal(size=depth)
    entries = {x.name: LayerScore(float(v)) for x, v in zip(layers, values, strict=True)}
    return Known(layers, Scores("m", "nats", entries))


def pairs(*models: Known) -> list[tuple[tuple[LayerInfo, ...], Scores]]:
    return [(m.layers, m.scores) for m in models]


def test_a_profile_over_depth_maps_to_a_model_of_another_depth() -> None:
    found = transferred(fit_kernel(pairs(known(12))), known(24).layers)
    assert spearman(np.array(list(found.values())), -np.arange(24.0)) == pytest.approx(1.0)
    truth = shares(-np.arange(24.0))
    assert np.abs(np.array(list(found.values())) - truth).max() < 0.15  # a kernel mean draws the ends inwards


def test_a_profile_over_size_maps_where_depth_says_nothing() -> None:
    sources = [known(12, sizes=True, seed=s) for s in range(6)]
    target = known(14, sizes=True, seed=99)
    found = transferred(fit_kernel(pairs(*sources)), target.layers)
    assert spearman(np.array(list(found.values())), np.array(list(target.scores.values()))) > 0.8


def test_the_same_place_in_a_noiseless_world_is_sure_and_an_unknown_kind_is_not() -> None:
    kernel = fit_kernel(pairs(known(12), known(16)))
    near, far = (transferred(kernel, known(12, kind=k).layers) for k in ("mlp", "recurrent"))
    for name in near:
        assert near.entries[name].stderr < 0.15 < far.entries[name].stderr <= math.sqrt(IGNORANCE) + 0.2
        assert abs(far[name] - 0.5) < abs(near[name] - 0.5) + 1e-12


def test_the_error_grows_with_the_distance() -> None:
    kernel = fit_kernel(pairs(known(12)))
    apart = [LayerInfo("x", 0, "mlp", 10**k, True, "b") for k in (2, 4, 8, 16)]
    middle = [LayerInfo("m", 1, "mlp", 100, True, "b"), LayerInfo("n", 2, "mlp", 100, True, "b")]
    errors = [transferred(kernel, [x, *middle]).entries["x"].stderr for x in apart]
    assert errors == sorted(errors)
    assert errors[-1] == pytest.approx(math.sqrt(IGNORANCE), rel=0.05)


def test_the_error_covers_what_left_out_models_show() -> None:
    models = [known(10 + i, noise=0.25, seed=i) for i in range(12)]
    inside, total, squares, constant = 0, 0, 0.0, 0.0
    for i, target in enumerate(models):
        found = transferred(fit_kernel(pairs(*models[:i], *models[i + 1 :])), target.layers)
        truth = shares(np.array(list(target.scores.values())))
        for entry, value in zip(found.entries.values(), truth, strict=True):
            inside += abs(entry.value - value) <= 1.96 * entry.stderr
            squares += (entry.value - value) ** 2
            constant += (0.5 - value) ** 2
            total += 1
    assert 0.88 <= inside / total <= 0.99
    assert squares < 0.6 * constant


def test_scores_that_depend_on_nothing_known_are_no_better_than_a_constant_and_say_so() -> None:
    models = [known(12, noise=50.0, seed=i) for i in range(8)]
    found = transferred(fit_kernel(pairs(*models)), known(12).layers)
    assert all(e.stderr > 0.25 for e in found.entries.values())


def test_layers_without_a_score_are_no_evidence() -> None:
    source = known(12)
    entries = {**source.scores.entries, "b.0": LayerScore.missing(Status.FAILED, "why")}
    kernel = fit_kernel([(source.layers, Scores("m", "nats", entries))])
    assert len(kernel.shares) == 11
    alone = fit_kernel(pairs(known(1)))
    assert transferred(alone, known(3).layers).entries["b.1"].stderr > 0.2


def falling(depth: int) -> tuple[UniversalModel, Data]:
    """A net whose blocks do less and less: damage falls with depth."""
    torch.manual_seed(depth)
    net = ResidualNet(depth=depth, width=16, classes=6)
    for i, block in enumerate(net.blocks):
        block.down.weight.data *= 4.0 * 0.05 ** (i / (depth - 1))
        block.down.bias.data.zero_()
    inputs = torch.randn(96, 16)
    model = UniversalModel(net, task=Fidelity(), example=Batch((inputs[:2],)), name=f"net{depth}")
    return model, Data.of([inputs])


def test_real_nets_left_out_one_by_one_are_predicted_better_than_by_a_constant() -> None:
    nets = [falling(depth) for depth in (4, 5, 6, 8, 9)]
    reports = [layerwise.analyze(model, data, "layer_ablation") for model, data in nets]
    inside = []
    for i, (model, _) in enumerate(nets):
        first, *more = [r for j, r in enumerate(reports) if j != i]
        found = first.transfer_to(model, *more)
        truth = np.array(list(reports[i].consensus().values()))
        guess = np.array(list(found["transfer"].values()))
        assert spearman(guess, truth) > 0.7
        assert ((guess - truth) ** 2).mean() < 0.5 * ((0.5 - truth) ** 2).mean()
        inside += [abs(g - t) <= 2 * e.stderr for g, t, e in zip(guess, truth, found["transfer"].entries.values(), strict=True)]
    assert np.mean(inside) > 0.8


def test_the_estimate_is_a_report_that_says_what_it_is(tmp_path: object) -> None:
    model, data = falling(4)
    other, _ = falling(6)
    found = layerwise.analyze(model, data, "layer_correlation").transfer_to(other)
    assert found.notes == ("Estimated from the scores of net4; net6 itself was not measured.",)
    assert [x.name for x in found.layers] == [x.name for x in other.layers]
    assert found["transfer"].settings["estimated"]
    assert ImportanceReport.from_dict(found.to_dict()).scores == found.scores
