"""Small networks on molecules, tables, a graph and ratings learn something, and their layers can be ranked."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from layerwise.engine import analyze
from layerwise.measure import evaluate
from layerwise.scores import Status
from tests.conftest import ROOT, data_folder


@pytest.fixture(scope="module")
def fields() -> ModuleType:
    """benchmarks/fields.py, which the figures in docs/graphs.md come from."""
    spec = importlib.util.spec_from_file_location("fields", ROOT / "benchmarks" / "fields.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fields"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERWISE_DATA", str(data_folder()))


def judged(field: Any) -> float:
    """The field's metric on test data, after every layer got a score by ablation and by gradients."""
    report = analyze(field.model, field.test.head(24), ["layer_ablation", "fisher_information"])
    assert any(s.status is Status.OK and s.value != 0 for s in report.scores["layer_ablation"].entries.values())
    assert all(s.status is Status.OK and s.value > 0 for s in report.scores["fisher_information"].entries.values())
    return evaluate(field.model, field.test).means()[field.metric]


def test_the_page_shows_the_committed_figures(fields: ModuleType) -> None:
    runs = json.loads((ROOT / "benchmarks" / "results" / "fields.json").read_text(encoding="utf-8"))["runs"]
    assert {run["name"] for run in runs} == {"breast_cancer", "diabetes", "Karate club", "ESOL", "Tox21", "MovieTweetings"}
    assert fields.as_table(runs) in (ROOT / "docs" / "domains.md").read_text(encoding="utf-8")


def test_tables(fields: ModuleType) -> None:
    tumours = fields.breast_cancer(0, epochs=4)
    assert judged(tumours) > 0.9 > tumours.rule + 0.2
    progress = fields.diabetes(0, epochs=20)
    assert judged(progress) < 0.9 * progress.rule


def test_members_of_a_club(fields: ModuleType) -> None:
    club = fields.karate(0)
    assert club.test.samples == 30, "the four that are learnt from are left out"
    assert judged(club) > club.rule + 0.2


@pytest.mark.data("molecules")
def test_solubility_of_molecules(fields: ModuleType, real_data: Path) -> None:
    field = fields.esol(0, rows=250, epochs=10)
    assert judged(field) < 0.75 * field.rule


@pytest.mark.data("molecules")
def test_toxicity_of_molecules(fields: ModuleType, real_data: Path) -> None:
    field = fields.tox21(0, rows=400, epochs=5)
    assert bool(fields.labels_of(field.test).isnan().any()), "some questions are unanswered"
    assert judged(field) > 0.6


@pytest.mark.data("movietweetings100k")
def test_the_next_film(fields: ModuleType, real_data: Path) -> None:
    field = fields.ratings(0, users=600, epochs=6)
    found = evaluate(field.model, field.test).means()
    assert found["auc"] > 0.6
    assert judged(field) > field.rule
