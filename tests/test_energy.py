"""Energy from the kernel's counters, written here as files; refusals say what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import layerwise as lw
from layerwise.energy import Meter, energy, energy_meter
from layerwise.errors import UsageError
from layerwise.target import Target
from tests.models import CASES

CPU = torch.device("cpu")


def zone(folder: Path, name: str, microjoules: int) -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / "energy_uj").write_text(f"{microjoules}\n")
    (folder / name / "max_energy_range_uj").write_text("10000000\n")
    return folder / name / "energy_uj"


def test_packages_are_summed_parts_are_not_and_a_counter_may_start_again(tmp_path: Path) -> None:
    first, second = zone(tmp_path, "intel-rapl:0", 9_000_000), zone(tmp_path, "intel-rapl:1", 1_000_000)
    zone(tmp_path, "intel-rapl:0:0", 5_000_000)
    meter = energy_meter(CPU, tmp_path)
    before = meter.read()
    first.write_text("500000\n")
    second.write_text("3000000\n")
    assert meter.between(before, meter.read()) == pytest.approx(1.5 + 2.0)


def test_joules_are_per_forward() -> None:
    case, used = CASES["residual"], [0.0]
    model = case.model()
    model.module.register_forward_hook(lambda *_: used.__setitem__(0, used[0] + 0.25))
    assert energy(model, case.batch(3), Meter("counted", lambda: [used[0]]), seconds=0.01) == pytest.approx(0.25)


def test_where_nothing_counts_the_target_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"LW-C17 .*this machine shows no energy counters"):
        energy_meter(CPU, tmp_path)
    target = Target.parse("energy<=0.5x")
    assert target.is_cost
    if not list(Path("/sys/class/powercap").glob("intel-rapl:*")):
        case = CASES["residual"]
        with pytest.raises(UsageError, match="energy cannot be measured here"):
            lw.plan(case.model(), None, [target], case.data())
