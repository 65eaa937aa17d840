"""Energy of a forward in joules, from counters that the machine itself keeps; where there are none, why not.

On a CPU the kernel's RAPL counters under ``/sys/class/powercap`` (whole packages, other processes included), on a GPU NVML's
total-energy counter (Volta and newer, by the package ``nvidia-ml-py``). A forward is repeated until the counter has moved far
enough; what an idle machine uses in that time is in the figure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from layerwise.data import Batch
from layerwise.errors import UsageError
from layerwise.model import UniversalModel

POWERCAP = Path("/sys/class/powercap")
SECONDS = 0.5  # at least; counters move once per millisecond


@dataclass(frozen=True)
class Meter:
    """`read` gives joules since some moment, one number per counter; they start again from 0 at `wraps` (0: never)."""

    name: str
    read: Callable[[], list[float]]
    wraps: tuple[float, ...] = ()

    def between(self, before: Sequence[float], after: Sequence[float]) -> float:
        """The joules from one reading to a later one."""
        wraps = self.wraps or (0.0,) * len(before)
        return sum(b - a if b >= a else b - a + w for a, b, w in zip(before, after, wraps, strict=True))


def energy_meter(device: torch.device, powercap: Path = POWERCAP) -> Meter:
    """The meter of a device. Raises `UsageError` (LW-C17) that says what is missing."""
    return _nvml(device) if device.type == "cuda" else _rapl(powercap)


def energy(model: UniversalModel, batch: Batch, meter: Meter | None = None, seconds: float = SECONDS) -> float:
    """Joules of one forward on `batch`, a mean over as many as `seconds` allow (two at least)."""
    meter = meter or energy_meter(model.device)
    here, forwards = batch.to(model.device), 0
    model.predict(here)
    _wait(model.device)
    before, end = meter.read(), time.perf_counter() + seconds
    while forwards < 2 or time.perf_counter() < end:
        model.predict(here)
        _wait(model.device)
        forwards += 1
    return meter.between(before, meter.read()) / forwards


def _rapl(powercap: Path) -> Meter:
    zones = sorted(p for p in powercap.glob("intel-rapl:*") if p.name.count(":") == 1)  # packages; the others are parts of them
    if not zones:
        raise _refused(f"this machine shows no energy counters ({powercap}/intel-rapl:* is absent), as most virtual machines")
    counters = [zone / "energy_uj" for zone in zones]
    try:
        wraps = tuple(float((zone / "max_energy_range_uj").read_text()) / 1e6 for zone in zones)
        read = lambda: [float(c.read_text()) / 1e6 for c in counters]  # noqa: E731  # three words of code
        read()
    except PermissionError:
        raise _refused(f"{counters[0]} may be read by root alone", f"Ask for `chmod a+r {counters[0]}`.") from None
    return Meter("rapl", read, wraps)


def _nvml(device: torch.device) -> Meter:
    try:
        import pynvml
    except ImportError:
        raise _refused("NVML cannot be asked", "pip install nvidia-ml-py") from None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        raise _refused(f"this GPU keeps no energy counter ({error})") from None
    return Meter("nvml", lambda: [pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3])


def _refused(why: str, remedy: str = "Ask for latency or macs instead.") -> UsageError:
    return UsageError(f"energy cannot be measured here: {why}.", remedy=remedy, code="LW-C17")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


__all__ = ["Meter", "energy", "energy_meter"]
