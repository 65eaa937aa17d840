"""Clouds whose topology is known, a slow twin by union and find, ripser, and samples that no sharding changes."""

from __future__ import annotations

import builtins
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from layerwise.analyzers.topology_analysis import MEASURES, TopologyAnalyzer, measured, pooled
from layerwise.data import Batch, Data
from layerwise.errors import MissingDependency, UsageError
from layerwise.model import UniversalModel
from layerwise.observe import observe
from layerwise.persistence import bar_distance, components, distances, focus, loops, scaled
from layerwise.scores import Status
from layerwise.sweep import Sweep
from layerwise.task import Classification, Fidelity
from tests.models import CASES, vectors

RNG = np.random.default_rng


def naive_components(distance: np.ndarray) -> list[float]:
    """Grow balls; each time an edge joins two components, one of them dies."""
    n = len(distance)
    component = list(range(n))
    bars = []
    for length, i, j in sorted((distance[a, b], a, b) for a in range(n) for b in range(a)):
        if component[i] != component[j]:
            bars.append(length)
            component = [component[i] if c == component[j] else c for c in component]
    return bars


def test_h0_equals_union_and_find_and_ripser() -> None:
    from ripser import ripser

    points = RNG(0).normal(size=(40, 5))
    points[7] = points[3]  # an edge of length 0 is an edge
    bars = components(distances(points))
    assert bars.tolist() == pytest.approx(naive_components(distances(points)), abs=1e-12)
    assert bars[0] == 0.0
    theirs = ripser(points, maxdim=0)["dgms"][0][:, 1]
    assert bars.tolist() == pytest.approx(sorted(theirs[np.isfinite(theirs)]), rel=1e-5, abs=1e-6)


def test_k_clusters_are_k_minus_1_long_bars() -> None:
    centres = RNG(0).normal(size=(4, 6)) * 100
    bars = components(distances(np.concatenate([c + RNG(1).normal(size=(20, 6)) for c in centres])))
    assert len(bars) == 79
    assert (bars > 50).sum() == 3
    assert bars[-4] < 10


def test_a_circle_is_one_long_loop() -> None:
    angles = np.linspace(0, 2 * math.pi, 60, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    bars = loops(distances(circle))
    # born when neighbours join, dead when three points span the circle: 2 sin(π/60) and √3
    assert bars[-1] == pytest.approx(math.sqrt(3) - 2 * math.sin(math.pi / 60), abs=0.05)
    assert bars[:-1].sum() < 0.1
    assert loops(distances(RNG(0).normal(size=(60, 2)) * 0.01 + [[1.0, 0.0]])).sum() < 0.2


def test_equal_bars_have_the_largest_entropy_and_one_long_bar_the_least() -> None:
    assert focus(np.ones(8)) == pytest.approx(0.0, abs=1e-12)
    assert focus(np.array([0.0] * 7 + [1.0])) == pytest.approx(1.0)


def test_bars_are_matched_as_the_transport_of_their_lengths() -> None:
    from scipy.stats import wasserstein_distance

    left, right = np.sort(RNG(0).random(30)), np.sort(RNG(1).random(30) * 2)
    assert bar_distance(left, right) == pytest.approx(wasserstein_distance(left, right))


@pytest.mark.parametrize("measure", MEASURES)
def test_rotation_and_scale_change_nothing(measure: Any) -> None:
    points = RNG(0).normal(size=(40, 6))
    turn, _ = np.linalg.qr(RNG(1).normal(size=(6, 6)))
    other = np.tanh(points)
    first = measured(MEASURES[measure], points, other)
    second = measured(MEASURES[measure], 3 * points @ turn, other @ turn / 7 + 5)
    assert first.value == pytest.approx(second.value, rel=1e-5)
    assert measured(MEASURES["change"], points, points @ turn * 2).value == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("measure", ["change", "total_persistence", "persistent_entropy"])
def test_the_standard_error_is_that_of_repeated_draws_or_up_to_twice_as_large(measure: str) -> None:
    def draw(seed: int) -> Any:
        points = RNG(seed).normal(size=(100, 3))
        return measured(MEASURES[measure], points, points * [1.0, 1.0, 0.05])

    draws = [draw(seed) for seed in range(60)]
    spread = np.std([d.value for d in draws], ddof=1)
    assert 0.9 < np.mean([d.stderr for d in draws]) / spread < 2.0


def test_scores_do_not_depend_on_how_the_samples_are_dealt_out() -> None:
    case = CASES["residual"]
    model, analyzer = case.model(Classification()), TopologyAnalyzer(landmarks=12)
    parts = [case.batch(n) for n in (7, 9, 6)]
    whole = analyzer.statistic(model)
    observe(model, Data.of(parts), {"x": whole})
    shards = [analyzer.statistic(model) for _ in parts]
    sweep_ids = [i * 100 for i in range(3)]
    for shard, part, first in zip(shards, parts, sweep_ids, strict=True):
        Sweep(model, [shard]).batch(part, seed=0, first=first)
    forwards, backwards = analyzer.statistic(model), analyzer.statistic(model)
    for order, merged in (((0, 1, 2), forwards), ((2, 0, 1), backwards)):
        for i in order:
            merged.merge_(shards[i])
    assert str(analyzer.score(model, forwards)) == str(analyzer.score(model, backwards))
    assert all(len(marks.rows()) == 12 for sides in whole.kept for marks in sides)


def test_the_state_does_not_grow_with_the_data() -> None:
    case = CASES["residual"]
    model = case.model(Classification())
    sizes = []
    for batches in (2, 6):
        statistic = TopologyAnalyzer(landmarks=10).statistic(model)
        observe(model, Data.of([case.batch(8 + i) for i in range(batches)]), {"x": statistic})
        sizes.append(sum(t.numel() for t in statistic.state().values()))
    assert sizes[0] == sizes[1] == 1 + 4 * 2 * 10 * (1 + 8)


def test_a_batch_costs_one_forward() -> None:
    model = CASES["vit"].model(Classification())
    sweep = Sweep(model, [TopologyAnalyzer().statistic(model)])
    sweep.batch(CASES["vit"].batch(4), seed=0)
    assert (sweep.counts.forwards, sweep.counts.backwards) == (1, 0)


def test_a_layer_that_splits_a_cloud_outranks_one_that_turns_it() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.eye(4)), nn.Parameter(torch.eye(4) * 20)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.a + torch.sign(x[:, :1]) @ self.b[:1]

    class Turn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.linalg.qr(torch.randn(4, 4))[0])
            self.b = nn.Parameter(torch.linalg.qr(torch.randn(4, 4))[0])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.a @ self.b

    torch.manual_seed(0)
    net, x = nn.Sequential(Turn(), Split(), Turn()), torch.randn(60, 4)
    model = UniversalModel(net, task=Fidelity(), example=Batch((x[:2],)))
    scores = TopologyAnalyzer().analyze(model, Data.of([x]))
    assert scores["1"] > 0.1
    assert max(scores["0"], scores["2"]) < 1e-6


def test_padding_is_left_out_of_the_mean_and_places_are_averaged_wherever_the_channels_are() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    stream = torch.arange(12.0).reshape(2, 3, 2)
    batch = Batch((), {"input_ids": torch.zeros(2, 3, dtype=torch.long), "attention_mask": mask})
    assert pooled(stream, batch).tolist() == [[1.0, 2.0], [8.0, 9.0]]
    image = torch.randn(2, 5, 4, 4)
    for stream in (image, image.permute(0, 2, 3, 1)):
        torch.testing.assert_close(pooled(stream, Batch((stream,))), image.double().mean((2, 3)))


def test_too_few_samples_and_samples_that_are_one_point_are_said() -> None:
    case = CASES["residual"]
    few = TopologyAnalyzer().analyze(case.model(Classification()), case.data(3))
    assert {e.reason for e in few.entries.values()} == {"needs at least 4 samples"}
    same = Data.of([Batch((torch.ones(8, 8),), {}, torch.zeros(8, dtype=torch.long))])
    scores = TopologyAnalyzer().analyze(case.model(Classification()), same)
    assert {e.status for e in scores.entries.values()} == {Status.FAILED}


def test_without_ripser_the_default_works_and_loops_say_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "ripser":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    original = builtins.__import__
    model = UniversalModel(CASES["residual"].build(), task=Classification(), example=vectors()(2))
    data = CASES["residual"].data()
    monkeypatch.setattr(builtins, "__import__", refuse)
    assert TopologyAnalyzer().analyze(model, data).usable()
    with pytest.raises(MissingDependency, match=r"layerwise\[topology\]"):
        TopologyAnalyzer(measure="loops").analyze(model, data)


def test_settings_are_checked() -> None:
    with pytest.raises(UsageError, match="total_persistence"):
        TopologyAnalyzer(measure="total")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="501"):
        TopologyAnalyzer(landmarks=501)
    assert scaled(np.zeros((3, 3))) is None
