"""`CompressionReport`: teacher and student side by side, measured in turn on one device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from layerwise.data import Data
from layerwise.measure import compare
from layerwise.metric import METRICS
from layerwise.model import UniversalModel
from layerwise.result import Measurement
from layerwise.tensors import byte_size, parameter_count

MEGABYTE = 1e6


@dataclass(frozen=True)
class CompressionReport:
    """Parameters and bytes (parameters and buffers: the memory that the models take at rest) of both; `before` and `after` are
    everything that was measured on data, None without any.
    """

    params: tuple[int, int]
    size: tuple[int, int]
    before: Measurement | None = None
    after: Measurement | None = None

    @property
    def ratio(self) -> float:
        """Bytes of the student over bytes of the teacher."""
        return self.size[1] / max(self.size[0], 1)

    @property
    def kept(self) -> dict[str, float]:
        """Metric → the student's over the teacher's, for metrics of which more is better; empty without data."""
        if self.before is None or self.after is None:
            return {}
        old, new = self.before.metrics, self.after.metrics
        return {m: new[m] / v for m, v in old.items() if v and m in METRICS and METRICS[m].higher_is_better}

    @property
    def speedup(self) -> float | None:
        """The teacher's median latency over the student's; None without data, or where they differ by less than their spreads."""
        if self.before is None or self.after is None:
            return None
        apart = abs(self.before.latency - self.after.latency)
        shown = apart > self.before.latency_spread + self.after.latency_spread
        return self.before.latency / self.after.latency if shown else None

    def to_dict(self) -> dict[str, Any]:
        measured = {n: m.to_dict() for n, m in (("before", self.before), ("after", self.after)) if m is not None}
        own = {"params": list(self.params), "size": list(self.size), "ratio": self.ratio, "kept": self.kept}
        return own | {"speedup": self.speedup} | measured

    def to_markdown(self) -> str:
        """A table, and whether there is a speed-up."""
        rows = [("parameters", *(f"{n:,}" for n in self.params)), ("megabytes", *(f"{n / MEGABYTE:.2f}" for n in self.size))]
        said = "Speed and quality were not measured: there were no data."
        if self.before is not None and self.after is not None:
            old, new = self.before, self.after
            rows.append(("multiply-accumulates per sample", f"{old.macs:,}", f"{new.macs:,}"))
            rows.append((f"ms per batch of {new.batch_size}", *(f"{m.latency:.3g} ± {m.latency_spread:.2g}" for m in (old, new))))
            rows += [(m, f"{v:.4g}", f"{new.metrics[m]:.4g}") for m, v in old.metrics.items() if m in new.metrics]
            said = "No speed-up shown." if self.speedup is None else f"{self.speedup:.2f}x as fast on {new.device}."
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        return f"| | teacher | student |\n|---|---|---|\n{table}\n\n{said} {self.ratio:.2f}x the bytes.\n"


def compression_report(teacher: UniversalModel, student: UniversalModel, data: Data | None = None) -> CompressionReport:
    """Both models on `data`, timed in turn; without data only what needs none."""
    params = parameter_count(teacher.module), parameter_count(student.module)
    size = byte_size(teacher.module), byte_size(student.module)
    before, after = (None, None) if data is None else compare(teacher, student, data)
    return CompressionReport(params, size, before, after)
