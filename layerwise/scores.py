"""`Scores`: what one method says of each layer. Plain frozen data; **higher always means more important**.

Decision: a layer without a score stays in the mapping with a status and a reason. Nothing is skipped silently, because a layer
that is missing from a ranking reads as "safe to compress".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """Whether a score can be used."""

    OK = "ok"
    NOT_APPLICABLE = "not_applicable"  # the method has no meaning for this layer
    COUPLED = "coupled"  # the layer cannot be changed without others
    FAILED = "failed"  # the computation broke down; the reason says how


@dataclass(frozen=True)
class LayerScore:
    """One layer's score in the method's unit, its standard error over samples (NaN: unknown) and its status."""

    value: float
    stderr: float = math.nan
    status: Status = Status.OK
    reason: str = ""

    @classmethod
    def missing(cls, status: Status, reason: str) -> LayerScore:
        """No score, and why."""
        return cls(math.nan, math.nan, status, reason)

    @classmethod
    def measured(cls, value: float, stderr: float = math.nan) -> LayerScore:
        """A score, or `failed` where the number is not finite."""
        if math.isfinite(value):
            return cls(float(value), float(stderr))
        return cls.missing(Status.FAILED, f"the score came out as {value}")


@dataclass(frozen=True)
class Scores(Mapping[str, float]):
    """Layer name → score of one `method` in `unit`; NaN where `entries[layer].status` is not ``ok``."""

    method: str
    unit: str
    entries: Mapping[str, LayerScore]
    samples: int = 0
    seconds: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, layer: str) -> float:
        return self.entries[layer].value

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def usable(self) -> dict[str, float]:
        """The layers whose status is ``ok``, in model order."""
        return {name: e.value for name, e in self.entries.items() if e.status is Status.OK}

    def ranks(self) -> dict[str, int]:
        """Layer → rank, 1 = most important, in that order; equal scores share the best of their ranks; no score, no rank."""
        usable = self.usable()
        ordered = sorted(usable, key=lambda name: -usable[name])
        first: dict[float, int] = {}
        return {name: first.setdefault(usable[name], place) for place, name in enumerate(ordered, start=1)}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the inverse of `from_dict`."""
        return {
            "method": self.method,
            "unit": self.unit,
            "samples": self.samples,
            "seconds": self.seconds,
            "settings": dict(self.settings),
            "layers": {
                name: {"value": e.value, "stderr": e.stderr, "status": str(e.status), "reason": e.reason}
                for name, e in self.entries.items()
            },
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Scores:
        """The inverse of `to_dict`."""
        entries = {
            name: LayerScore(e["value"], e["stderr"], Status(e["status"]), e["reason"]) for name, e in data["layers"].items()
        }
        return cls(data["method"], data["unit"], entries, data["samples"], data["seconds"], data["settings"])
