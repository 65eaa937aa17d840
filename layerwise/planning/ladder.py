"""Compression that follows live metrics: plans from the mildest to the strongest, and who climbs up and down among them.

Decision: no search while serving. The rungs were planned and measured beforehand; live figures only choose among them. A move
needs the same reason several observations in a row, and a step back to a milder rung also needs the time it will cost to fit
with a margin, so that the controller does not swing between two rungs. Each move, and each refusal to move, is one line of audit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from layerwise.errors import UsageError
from layerwise.plan import CompressionPlan
from layerwise.target import Target

MILDER, STRONGER = -1, 1


@dataclass(frozen=True)
class Rung:
    """A plan and its `figures` as they were measured beforehand."""

    plan: CompressionPlan
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Move:
    """One line of the audit. `blocked`: it was called for and not made, and `reason` says why."""

    when: float
    before: int
    after: int
    reason: str
    metrics: Mapping[str, float]
    blocked: bool = False


@dataclass
class Climber:
    """Which of `rungs` (mildest first) to serve, as `observe` is told live metrics; `at` is the current one.

    `targets` are absolute or relative to the first rung's figures. `patience`: observations in a row that must agree; `margin`:
    share of a limit that must stay free after a step to a milder rung. `audit`: a file that gets one JSON line per move.
    """

    rungs: Sequence[Rung]
    targets: Sequence[Target]
    patience: int = 3
    margin: float = 0.1
    audit: Path | None = None
    clock: Callable[[], float] = time.time
    at: int = 0
    streak: int = field(default=0, init=False)
    wanted: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if not self.rungs or self.patience < 1 or not 0 <= self.margin < 1:
            raise UsageError("A ladder needs a rung, patience of at least 1 and a margin from 0 up to below 1.")

    @property
    def plan(self) -> CompressionPlan:
        """The plan to serve now."""
        return self.rungs[self.at].plan

    def observe(self, metrics: Mapping[str, float]) -> Move | None:
        """Takes live figures (``latency`` in ms, ``accuracy``, …; others are ignored); the move they lead to, if they do."""
        direction, reason = self._called_for(metrics)
        self.streak = self.streak + 1 if direction and direction == self.wanted else int(bool(direction))
        self.wanted = direction
        if self.streak < self.patience:
            return None
        self.streak = 0
        return self._moved(direction, reason, metrics)

    def _called_for(self, metrics: Mapping[str, float]) -> tuple[int, str]:
        """Which way, and why. Quality goes before costs: what answers wrongly need not be fast."""
        seen = [t for t in self.targets if t.metric in metrics]
        broken = [t for t in seen if not t.met(self._first(t), metrics[t.metric])]
        for target in sorted(broken, key=lambda t: t.is_cost):
            sign = STRONGER if target.is_cost else MILDER
            return sign, f"{target.metric} is {metrics[target.metric]:g}, asked for {target}"
        costs = [t for t in seen if t.is_cost]
        if self.at and costs and all(self._fits(t, metrics[t.metric]) for t in costs):
            return MILDER, "there is room: " + ", ".join(
                f"{t.metric} is {metrics[t.metric]:g} of {self._limit(t):g}" for t in costs
            )
        return 0, ""

    def _fits(self, target: Target, value: float) -> bool:
        """Whether the milder rung, by what it costs more than this one, would leave the margin free."""
        now, milder = (self.rungs[i].figures.get(target.metric) for i in (self.at, self.at - 1))
        factor = milder / now if now and milder else 1.0
        return value * max(factor, 1.0) <= self._limit(target) * (1 - self.margin)

    def _moved(self, direction: int, reason: str, metrics: Mapping[str, float]) -> Move:
        after = self.at + direction
        if not 0 <= after < len(self.rungs):
            return self._noted(self.at, f"{reason}; there is no {'stronger' if direction > 0 else 'milder'} rung", metrics)
        if direction == STRONGER and (worse := self._spoiled(after)):
            return self._noted(self.at, f"{reason}; the next rung was measured at {worse}", metrics)
        return self._noted(after, reason, metrics)

    def _spoiled(self, rung: int) -> str:
        """The quality targets that a rung missed when it was measured, in words."""
        figures = self.rungs[rung].figures
        asked = [t for t in self.targets if not t.is_cost and t.metric in figures]
        return ", ".join(f"{t.metric} {figures[t.metric]:g}" for t in asked if not t.met(self._first(t), figures[t.metric]))

    def _noted(self, after: int, reason: str, metrics: Mapping[str, float]) -> Move:
        move = Move(self.clock(), self.at, after, reason, dict(metrics), blocked=after == self.at)
        self.at = after
        if self.audit is not None:
            with self.audit.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(move) | {"plan": self.plan.digest}) + "\n")
        return move

    def _first(self, target: Target) -> float:
        return self.rungs[0].figures.get(target.metric, 0.0)

    def _limit(self, target: Target) -> float:
        return target.limit(self._first(target))


def read_audit(path: Path) -> list[dict[str, Any]]:
    """The moves of an audit file, oldest first."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


__all__ = ["Climber", "Move", "Rung", "read_audit"]
