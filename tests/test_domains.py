"""The fields' table: its names exist, its page is the table, what is missing is said, and what is there runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from layerwise.adapter import ADAPTERS
from layerwise.cli import main
from layerwise.domains import DOMAINS, Dataset, domain_named, page
from layerwise.errors import UsageError
from layerwise.extensions import FAMILIES, ComputerVisionExtension, ScientificComputingExtension
from layerwise.loading import load
from layerwise.metric import METRICS
from layerwise.task import TASKS
from tests.conftest import ROOT, data_folder
from tests.tables import perceptron

VIT = "vit_tiny_patch16_224?img_size=8&patch_size=2&in_chans=1&embed_dim=16&depth=2&num_heads=2&num_classes=10"
SCIENCE = {
    "bioinformatics", "chemistry", "physics", "climate", "finance", "medical", "robotics", "autonomous_driving",
}  # fmt: skip
VISION = {"image_classification", "object_detection", "semantic_segmentation", "face_recognition", "image_generation"}
ABSENT = [(d.name, s) for d in DOMAINS.values() for s in d.datasets if not s.bundled]


def test_every_field_is_there() -> None:
    assert {d.name for d in DOMAINS.values() if d.area == "vision"} == VISION
    assert set(ScientificComputingExtension.domains()) == SCIENCE


@pytest.mark.parametrize("name", DOMAINS)
def test_a_row_names_only_what_exists(name: str) -> None:
    domain = DOMAINS[name]
    assert domain.adapter in ADAPTERS
    assert {domain.task, *(s.task for s in domain.datasets if s.task)} <= set(TASKS)
    assert set(domain.metrics) <= set(METRICS)
    assert domain.metrics[0] == TASKS[domain.task].quality


def test_the_page_is_the_table() -> None:
    text = (ROOT / "docs" / "domains.md").read_text(encoding="utf-8")
    assert page() in text, "write page() of layerwise.domains into docs/domains.md again"


@pytest.mark.parametrize(("field", "dataset"), ABSENT, ids=[s.name for _, s in ABSENT])
def test_a_data_set_that_is_not_there_says_where_it_belongs(
    field: str, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAYERWISE_DATA", str(tmp_path))
    with pytest.raises(UsageError) as caught:
        DOMAINS[field].dataset(dataset.name).located()
    assert caught.value.code == "LW-C04"
    assert caught.value.place == str(tmp_path / dataset.spec)
    for part in (dataset.name, dataset.terms, dataset.form, "LAYERWISE_DATA"):
        assert part in str(caught.value)
    (tmp_path / dataset.spec).mkdir(parents=True)
    assert dataset.located() == tmp_path / dataset.spec


def test_the_pages_example_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "domains.md").read_text(encoding="utf-8"), re.DOTALL)
    space: dict[str, Any] = {}
    exec(compile(block, "docs/domains.md", "exec"), space)
    assert space["report"].scores["gradient_based"].samples == 64


def test_unknown_names_have_neighbours() -> None:
    with pytest.raises(UsageError, match=r"Unknown field 'chemistri'\. Did you mean 'chemistry'\?"):
        domain_named("chemistri")
    with pytest.raises(UsageError, match="Unknown field 'chemistry'"):
        ComputerVisionExtension().analyze_vision_model(VIT, "chemistry")
    with pytest.raises(UsageError, match=r"knows no data set 'tox'\. Did you mean 'Tox21'\?"):
        ScientificComputingExtension().analyze_model(perceptron(), "chemistry", dataset="tox")


def test_a_vision_transformer_on_digits() -> None:
    report = ComputerVisionExtension(limit=32).analyze_vision_model(VIT, methods="layer_ablation")
    assert report.scores["layer_ablation"].samples == 32
    assert "accuracy" in report.metrics
    assert {"resnet", "efficientnet", "vision transformer"} <= set(FAMILIES)


@pytest.mark.parametrize(("dataset", "outputs", "metric"), [("breast_cancer", 2, "accuracy"), ("diabetes", 1, "rmse")])
def test_tables_of_scikit_learn(dataset: str, outputs: int, metric: str) -> None:
    torch.manual_seed(0)
    columns = {"breast_cancer": 30, "diabetes": 10}[dataset]
    network = nn.Sequential(nn.Linear(columns, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, outputs))
    field = ScientificComputingExtension(limit=64)
    report = field.analyze_model(network, "medical", methods=["layer_ablation", "fisher_information"], dataset=dataset)
    assert metric in report.metrics
    assert report.scores["fisher_information"].samples == 64


@pytest.mark.data("molecules")
@pytest.mark.parametrize(("dataset", "outputs", "metric"), [("ESOL", 1, "rmse"), ("Tox21", 12, "auc")])
def test_molecules(dataset: str, outputs: int, metric: str, real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.graphs import Convolutions

    monkeypatch.setenv("LAYERWISE_DATA", str(data_folder()))
    field = ScientificComputingExtension(limit=40)
    report = field.analyze_model(Convolutions(outputs), "chemistry", methods="layer_ablation", dataset=dataset)
    assert metric in report.metrics
    assert report.scores["layer_ablation"].samples == 40


def test_own_data_and_an_own_task_go_before_the_presets() -> None:
    x, y = torch.randn(12, 7), torch.rand(12, 2)
    model = load(perceptron(), "regression")
    report = ScientificComputingExtension().analyze_model(model, "finance", [(x, y)], "layer_ablation")
    assert "rmse" in report.metrics
    assert report.scores["layer_ablation"].samples == 12


def test_the_command_lists_what_is_there(capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERWISE_DATA", str(tmp_path))
    (tmp_path / "lfw").mkdir()
    assert main(["domains", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    there = {s["name"] for d in found["domains"] for s in d["datasets"] if s["there"]}
    assert there == {"digits", "breast_cancer", "diabetes", "LFW"}
    assert main(["domains"]) == 0
    assert "ImageNet (absent)" in " ".join(capsys.readouterr().out.split())
