"""`Target`: one line of the user's budget, such as ``size<=0.5x`` or ``latency<=20ms``. Measured, never guessed."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from layerwise.errors import UsageError, nearest
from layerwise.metric import METRICS

# Metric → the unit a plain number is in. "x" after the number means: times the uncompressed model's figure.
COSTS = {"size": "bytes", "params": "", "macs": "", "latency": "ms", "energy": "J"}
QUALITIES = {name: metric.unit for name, metric in METRICS.items()}
SCALES = {
    "": 1.0,
    "k": 1e3,
    "kb": 1e3,
    "m": 1e6,
    "mb": 1e6,
    "g": 1e9,
    "gb": 1e9,
    "ms": 1.0,
    "s": 1e3,
    "j": 1.0,
    "mj": 1e-3,
    "%": 0.01,
}
PATTERN = re.compile(r"\s*([a-z_0-9]+)\s*(<=|>=)\s*([0-9.eE+-]+)\s*([a-zA-Z%]*)\s*")


@dataclass(frozen=True)
class Target:
    """`metric` `sense` `bound`; `relative` bounds are multiples of the uncompressed model's figure."""

    metric: str
    sense: str
    bound: float
    relative: bool

    @classmethod
    def parse(cls, text: str) -> Target:
        """Reads ``metric<=number[unit]`` or ``metric>=number[unit]``; the unit ``x`` means relative.

        Raises `UsageError` naming the part that is wrong.
        """
        match = PATTERN.fullmatch(text)
        if not match:
            raise UsageError(f"Cannot read the target {text!r}.", remedy="Write for example size<=0.5x or accuracy>=0.98x.")
        metric, sense, number, unit = match.groups()
        known = COSTS | QUALITIES
        if metric not in known:
            raise UsageError(f"Unknown target {metric!r} in {text!r}.", remedy=nearest(metric, known))
        try:
            bound = float(number)
        except ValueError:
            raise UsageError(f"{number!r} in the target {text!r} is not a number.") from None
        if not math.isfinite(bound) or bound < 0:
            raise UsageError(f"The target {text!r} needs a finite number that is not negative.")
        relative = unit in {"x", "X"}
        if not relative and unit.lower() not in SCALES:
            raise UsageError(f"Unknown unit {unit!r} in the target {text!r}.", remedy=nearest(unit, [*SCALES, "x"]))
        return cls(metric, sense, bound if relative else bound * SCALES[unit.lower()], relative)

    @property
    def is_cost(self) -> bool:
        """Whether this bounds what the model costs (size, params, macs, latency, energy) and not how good it is."""
        return self.metric in COSTS

    def limit(self, before: float) -> float:
        """The bound in the metric's own unit, given the uncompressed model's figure."""
        return self.bound * before if self.relative else self.bound

    def met(self, before: float, after: float) -> bool:
        """Whether the measured `after` keeps the bound."""
        limit = self.limit(before)
        return after <= limit if self.sense == "<=" else after >= limit

    def __str__(self) -> str:
        return f"{self.metric}{self.sense}{self.bound:g}{'x' if self.relative else ''}"
