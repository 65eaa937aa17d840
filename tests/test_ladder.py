"""Moving along a ladder of plans on a made-up stream of live metrics."""

from __future__ import annotations

from pathlib import Path

import pytest

from layerwise.errors import UsageError
from layerwise.plan import CompressionPlan, Step
from layerwise.planning.ladder import Climber, Rung, read_audit
from layerwise.target import Target

COSTS = [(0.98, 100.0), (0.96, 70.0), (0.93, 50.0), (0.80, 30.0)]  # accuracy and latency of each rung


def climber(*targets: str, audit: Path | None = None, patience: int = 3) -> Climber:
    rungs = [
        Rung(CompressionPlan((Step("drop_layers", (str(i),)),)), {"accuracy": a, "latency": ms})
        for i, (a, ms) in enumerate(COSTS)
    ]
    ticks = iter(range(10_000))
    return Climber(rungs, [Target.parse(t) for t in targets], patience, audit=audit, clock=lambda: float(next(ticks)))


def fed(subject: Climber, *latencies: float, accuracy: float = 0.95) -> list[int]:
    return [(subject.observe({"latency": ms, "accuracy": accuracy}), subject.at)[1] for ms in latencies]


def test_it_climbs_only_after_the_same_reason_three_times_in_a_row() -> None:
    subject = climber("latency<=80ms", "accuracy>=0.9")
    assert fed(subject, 100, 100, 79, 100, 100, 100) == [0, 0, 0, 0, 0, 1]


def test_a_noisy_stream_around_the_limit_does_not_make_it_swing() -> None:
    """Fails without the margin: at 70 ms a step back to 100 would be taken at once, and regretted."""
    subject = climber("latency<=80ms")
    fed(subject, 100, 100, 100)
    moves = fed(subject, *[70, 66, 74, 71, 69] * 20)
    assert set(moves) == {1}


def test_when_load_falls_it_steps_back_and_when_it_rises_it_goes_on() -> None:
    subject = climber("latency<=80ms", "accuracy>=0.9")
    assert fed(subject, *[140] * 6)[-1] == 2
    assert fed(subject, *[40] * 3)[-1] == 1  # 40 · 70/50 = 56 ≤ 72
    assert fed(subject, *[40] * 3)[-1] == 0  # 40 · 100/70 = 57 ≤ 72
    assert fed(subject, *[40] * 9)[-1] == 0


def test_quality_goes_before_costs_and_a_rung_that_misses_it_is_not_taken(tmp_path: Path) -> None:
    audit = tmp_path / "audit.jsonl"
    subject = climber("latency<=40ms", "accuracy>=0.9", audit=audit)
    assert fed(subject, *[200] * 12)[-1] == 2  # the last rung was measured at 0.80
    assert fed(subject, *[200] * 3, accuracy=0.85)[-1] == 1
    lines = read_audit(audit)
    assert [(x["before"], x["after"], x["blocked"]) for x in lines] == [
        (0, 1, False), (1, 2, False), (2, 2, True), (2, 2, True), (2, 1, False)
    ]  # fmt: skip
    assert "the next rung was measured at accuracy 0.8" in lines[2]["reason"]
    assert lines[-1]["reason"] == "accuracy is 0.85, asked for accuracy>=0.9"
    assert lines[-1]["metrics"] == {"latency": 200, "accuracy": 0.85}
    assert lines[-1]["plan"] == subject.plan.digest


def test_relative_targets_refer_to_the_first_rung() -> None:
    subject = climber("latency<=0.6x", patience=1)
    assert fed(subject, 70, 59) == [1, 1]


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UsageError):
        Climber([], [])
    with pytest.raises(UsageError):
        climber("latency<=1ms", patience=0)
