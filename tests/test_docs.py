"""What is public is documented, and what the documents show runs."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import layerwise
from layerwise.analyzer import ANALYZERS
from layerwise.artifact import EXPORTERS
from layerwise.method import METHODS
from layerwise.metric import METRICS
from layerwise.strategy import STRATEGIES, TaskType
from layerwise.task import TASKS
from tests.conftest import ROOT

DOCS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(ANALYZERS))
def test_every_analyzer_is_on_its_page(name: str) -> None:
    assert f"`{name}`" in text_of("docs/analyzers.md")


CARD = ("unit", "direction", "cost", "data", "standard error", "lie", "paper")  # what a method card must speak of


@pytest.mark.parametrize("name", sorted(ANALYZERS))
def test_every_analyzer_has_a_method_card(name: str) -> None:
    own = ROOT / "docs" / "analyzers" / f"{name}.md"
    card = own if own.is_file() else ROOT / "docs" / "analyzers" / "baselines.md"
    text = card.read_text(encoding="utf-8")
    assert f"`{name}`" in text
    assert [word for word in CARD if word not in text.lower()] == []
    assert f"(analyzers/{card.name})" in text_of("docs/analyzers.md"), "no link to the card"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_compression_method_is_on_its_page(name: str) -> None:
    assert f"`{name}`" in text_of("docs/compression.md")


@pytest.mark.parametrize("name", sorted(EXPORTERS))
def test_every_exporter_is_documented(name: str) -> None:
    assert EXPORTERS[name].suffix in text_of("docs/compression.md") + text_of("README.md")


def test_every_public_name_has_a_docstring() -> None:
    for name in set(layerwise.__all__) - {"__version__"}:
        assert (getattr(layerwise, name).__doc__ or "").strip(), name


@pytest.mark.parametrize("page", DOCS, ids=lambda p: p.name)
def test_links_inside_the_project_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readmes_python_runs(tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", text_of("README.md"), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "smaller.onnx").is_file()
    assert (tmp_path / "report.html").stat().st_size > 1_000_000, "plotly is not inside"
    assert "False" not in done.stdout.split("[(")[1], "a proof failed"


@pytest.mark.parametrize("name", [n for n in sorted(TASKS) if f"## `{n}`\n" in text_of("docs/tasks.md")])
def test_each_tasks_example_runs_and_shows_metrics_that_are_known(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = text_of("docs/tasks.md").split(f"## `{name}`\n")[1].split("\n## ")[0]
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        shown: dict[str, Any] = {}
        exec(compile(block, name, "exec"), shown)
        said = re.search(r"report\.metrics  # (.*)", block)
        assert said is not None
        assert set(shown["report"].metrics) == set(said[1].split(", "))
        assert set(shown["report"].metrics) <= set(METRICS)
        if name in list(TaskType):  # what the strategy says such a task is judged by is measured
            assert set(STRATEGIES[TaskType(name)].metrics) <= set(shown["report"].metrics)


@pytest.mark.parametrize("task_type", TaskType)
def test_each_of_the_ten_types_has_an_example_that_shows_its_metrics(task_type: TaskType) -> None:
    section = text_of("docs/tasks.md").split(f"## `{task_type}`\n")[1].split("\n## ")[0]
    assert "report.metrics  # " in section


def test_the_page_of_speed_and_scale_is_the_one_made_from_the_committed_results() -> None:
    spec = importlib.util.spec_from_file_location("scale_page", ROOT / "benchmarks" / "scale_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.page() == text_of("docs/scale.md")
