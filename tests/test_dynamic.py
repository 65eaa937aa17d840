"""How far to compress for target metrics: bisection where quality is monotone, the planner where it is not."""

from __future__ import annotations

from dataclasses import replace

import pytest

import layerwise as lw
from layerwise.compress.drop_layers import DropLayers
from layerwise.compress.weight_only import WeightOnly
from layerwise.errors import UsageError
from layerwise.planner import Ladder
from layerwise.planning.finals import Measured
from tests.test_planner import uneven

MENU = (DropLayers(), WeightOnly(8, 8), WeightOnly(4, 8), WeightOnly(2, 8))


def test_numbers_are_read_in_the_sense_of_their_metric() -> None:
    strategy = lw.DynamicCompressionStrategy({"accuracy": 0.9, "latency": 100, "loss": 0.5, "size": "<=0.4x"})
    assert [str(t) for t in strategy.targets()] == ["accuracy>=0.9", "latency<=100", "loss<=0.5", "size<=0.4x"]
    with pytest.raises(UsageError, match=r"Unknown target 'speed'"):
        lw.DynamicCompressionStrategy({"speed": 3}).targets()
    with pytest.raises(UsageError, match="No target metric"):
        lw.DynamicCompressionStrategy({}).targets()


def test_bisection_ends_at_a_small_model_that_keeps_the_quality() -> None:
    model, data = uneven()
    strategy = lw.DynamicCompressionStrategy({"accuracy": 0.9}, MENU)
    plan = strategy.optimize_compression(model, data)
    assert plan.predicted["accuracy"] >= 0.9
    assert plan.predicted["size"] < 0.5 * plan.before["size"]
    assert any(note.startswith(("Found by bisection", "Searched by the planner")) for note in plan.notes)
    assert lw.compress(model, plan, data).after.figures()["accuracy"] == plan.predicted["accuracy"]


def test_where_quality_rises_as_bytes_fall_the_planner_decides_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Ladder.at

    def odd(self: Ladder, ratio: float) -> Measured | None:
        """Smaller comes out better, as on a model of which some blocks only add noise."""
        found = real(self, ratio)
        if found is not None:
            found = replace(found, figures=found.figures | {"accuracy": 1 - 0.05 * ratio}, violation=0.0)
            self.points[-1] = (ratio, found)
        return found

    monkeypatch.setattr(Ladder, "at", odd)
    model, data = uneven()
    plan = lw.DynamicCompressionStrategy({"accuracy": 0.9}, [DropLayers(), WeightOnly(4, 8)]).optimize_compression(model, data)
    assert any("accuracy is not monotone in the size" in note for note in plan.notes)
    assert plan.predicted["accuracy"] >= 0.9


def test_a_ladder_goes_from_the_model_to_ever_fewer_bytes() -> None:
    model, data = uneven()
    strategy = lw.DynamicCompressionStrategy({"accuracy": 0.5}, MENU)
    rungs = strategy.ladder(model, data, rungs=4)
    sizes = [rung.figures["size"] for rung in rungs]
    assert len(rungs) >= 3
    assert not rungs[0].plan.steps
    assert sizes == sorted(sizes, reverse=True)
    climber = strategy.watch(rungs, patience=1)
    climber.at = 1
    climber.observe({"accuracy": 0.2})
    assert climber.plan is rungs[0].plan
