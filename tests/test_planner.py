"""The planner: what it proposes, what it leaves out, what it counts."""

from __future__ import annotations

import pytest
import torch

import layerwise as lw
from layerwise import planner as module
from layerwise.importance import ImportanceReport
from layerwise.measure import Latency
from layerwise.model import UniversalModel
from layerwise.planner import Planner
from layerwise.target import Target
from layerwise.task import Classification
from tests.models import CASES


def asked(*targets: str, methods: str = "auto", case: str = "residual") -> tuple[UniversalModel, Planner]:
    subject = CASES[case]
    model = subject.model(Classification())
    report: ImportanceReport = lw.analyze(model, subject.data(), ["layer_ablation", "gradient_based"])
    return model, Planner(model, report, [Target.parse(t) for t in targets], subject.data(), methods)


def test_sets_are_the_prefixes_of_every_methods_order() -> None:
    _, plan = asked("params<=0.9x")
    sets = plan._sets(next(m for m in plan._menu() if m.selective))
    assert frozenset() in sets
    assert max(len(s) for s in sets) == 3, "at least one layer stays"
    least = min(plan.report["layer_ablation"].usable(), key=lambda n: plan.report["layer_ablation"][n])
    assert frozenset({least}) in sets


def test_a_variant_that_this_device_runs_too_slowly_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow_halves(models: list[UniversalModel], batch: object, *, repeats: int = 20) -> list[Latency]:
        return [Latency(40.0 if next(m.module.parameters()).dtype == torch.float16 else 1.0, 0.0, 3) for m in models]

    monkeypatch.setattr(module, "time_paired", slow_halves)
    _, plan = asked("size<=0.6x")
    made = plan.make()
    assert made.notes == ("half_precision float16 was left out: 40 times as slow on this device. Name the method to have it.",)
    assert not any(s.settings.get("dtype") == "float16" for c in made.candidates for s in c.steps)
    _, named = asked("size<=0.6x", methods="half_precision")
    assert any(s.settings.get("dtype") == "float16" for c in named.make().candidates for s in c.steps)


def test_candidates_are_measured_and_bounded() -> None:
    _, plan = asked("size<=0.9x")
    made = plan.make()
    assert 1 <= len(made.candidates) <= module.MOST_MEASURED
    for candidate in made.candidates:
        assert candidate.feasible == (candidate.figures["size"] <= 0.9 * made.before["size"])


def test_of_equally_good_plans_the_cheapest_is_chosen() -> None:
    _, plan = asked("size<=0.9x")
    made = plan.make()
    feasible = [c for c in made.candidates if c.feasible]
    best = max(c.figures["accuracy"] for c in feasible)
    beaten = [c for c in feasible if c.figures["accuracy"] == best and c.figures["macs"] < made.predicted["macs"]]
    assert not beaten, "as good as the best and cheaper, yet not chosen"


def test_coupled_layers_are_not_offered_for_dropping() -> None:
    _, plan = asked("size<=0.9x", case="resnet")
    cut = next(m for m in plan._menu() if m.selective)
    offered = frozenset().union(*plan._sets(cut))
    assert offered < {"layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"}  # all five tie, and one of them stays
    assert len(offered) == 4
