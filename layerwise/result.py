"""What compression gives back: the model, the figures before and after on the same device, and the proofs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.plan import CompressionPlan

if TYPE_CHECKING:
    from layerwise.model import UniversalModel


@dataclass(frozen=True)
class Measurement:
    """Figures of one model on one data set and device.

    `size` counts the bytes of parameters and buffers, `nonzero` the parameters that are not 0, `macs` multiply-accumulates per
    sample, `latency` is the median milliseconds per batch of `batch_size` (`latency_spread`: half the interquartile range).
    `metrics` are means over `samples`, `stderr` their standard errors.
    """

    params: int
    nonzero: int
    size: int
    macs: int
    latency: float
    latency_spread: float
    batch_size: int
    metrics: Mapping[str, float]
    stderr: Mapping[str, float]
    samples: int
    device: str
    energy: float | None = None  # joules per batch, where it was asked for and the machine has counters

    def figures(self) -> dict[str, float]:
        """Every figure a `Target` can speak of, by its name there."""
        costs = {"params": self.params, "size": self.size, "macs": self.macs, "latency": self.latency}
        if self.energy is not None:
            costs["energy"] = self.energy
        return {name: float(v) for name, v in costs.items()} | dict(self.metrics)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measurement:
        return cls(**data)


@dataclass(frozen=True)
class Proof:
    """One check of the compressed model. `passed` is None where the check does not apply, and `detail` says why.

    `measured` and `bound` are in the check's own unit (see `detail`); `layer` is the first one that diverges.
    """

    name: str
    passed: bool | None
    detail: str
    measured: float = math.nan
    bound: float = math.nan
    layer: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Proof:
        return cls(**data)


@dataclass(frozen=True)
class CompressionResult:
    """The compressed copy with its plan, measurements and proofs; the original is left alone."""

    model: UniversalModel
    plan: CompressionPlan
    before: Measurement
    after: Measurement
    proofs: tuple[Proof, ...]
    original: Mapping[str, Any] = field(default_factory=dict)  # name, source, fingerprint, task, data of the run

    @property
    def ratio(self) -> float:
        """Bytes after over bytes before: 0.5 means half the size."""
        return self.after.size / self.before.size

    @property
    def proven(self) -> bool:
        """No proof failed."""
        return all(p.passed is not False for p in self.proofs)

    def missed(self) -> list[str]:
        """The plan's targets that the measured result does not meet, in words."""
        before, after = self.before.figures(), self.after.figures()
        return [
            f"{target}: {after[target.metric]:g}, allowed {target.limit(before[target.metric]):g}"
            for target in self.plan.targets
            if not target.met(before[target.metric], after[target.metric])
        ]

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Writes the model with its plan, figures and proofs; `layerwise.saved.load_saved` brings the model back."""
        from layerwise.saved import save_model  # it stands on this module

        return save_model(self, folder, force=force)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the weights, as plain data."""
        return {
            "original": dict(self.original),
            "plan": self.plan.to_dict(),
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "proofs": [p.to_dict() for p in self.proofs],
        }
