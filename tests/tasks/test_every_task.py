"""What holds for every registered task: it is known everywhere by its name, and its metrics to reports and targets."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from layerwise.data import Batch
from layerwise.errors import UsageError
from layerwise.metric import METRICS
from layerwise.model import UniversalModel
from layerwise.report.words import CHINESE, ENGLISH
from layerwise.saved import load_saved, save_model
from layerwise.spec import written
from layerwise.strategy import TaskType
from layerwise.target import Target
from layerwise.task import TASKS, task_named
from layerwise.tracking.leaderboard import QUALITY, lower_is_better
from tests.conftest import ROOT


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_a_frozen_set_of_settings_under_its_own_name(name: str) -> None:
    task = task_named(name)
    assert task.name == name
    assert task == dataclasses.replace(task)  # type: ignore[type-var]


@pytest.mark.parametrize("name", TASKS)
def test_reports_targets_and_the_leaderboard_know_what_a_task_is_judged_by(name: str) -> None:
    task = TASKS[name]
    assert QUALITY[name] == task.quality
    assert METRICS[task.quality].higher_is_better == task.higher_is_better


@pytest.mark.parametrize("name", TASKS)
def test_a_task_with_its_settings_is_saved_with_the_model_and_comes_back(name: str, tmp_path: Path) -> None:
    texts = {"environment": "CartPole-v1", "tokenize": "zh", "kind": "cosine"}
    given = {f.name: texts.get(f.name, 3) for f in dataclasses.fields(TASKS[name])}  # type: ignore[arg-type]  # they are dataclasses
    model = UniversalModel(nn.Linear(2, 2), task=TASKS[name](**given), example=Batch((torch.zeros(1, 2),)))
    save_model(model, tmp_path / "saved")
    assert load_saved(tmp_path / "saved", module=nn.Linear(2, 2)).task == model.task
    assert task_named(written(name, given)) == model.task


@pytest.mark.parametrize("task_type", TaskType)
def test_each_of_the_ten_types_is_a_task(task_type: TaskType) -> None:
    assert task_named(task_type).name == task_type.value


@pytest.mark.parametrize("metric", METRICS)
def test_a_metric_can_be_a_target_and_has_a_name_in_both_languages(metric: str) -> None:
    assert Target.parse(f"{metric}>=0.9x").metric == metric
    assert lower_is_better(metric) != METRICS[metric].higher_is_better
    assert f"metric.{metric}" in ENGLISH
    assert f"metric.{metric}" in CHINESE


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_documented(name: str) -> None:
    assert f"`{name}`" in (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")


def test_an_unknown_task_is_told_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'regression'"):
        task_named("regresion")
