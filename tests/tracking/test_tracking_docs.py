"""The examples of docs/tracking.md run, and its tables are complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tracking_factory import result

from layerwise.tracking import DOMAINS
from layerwise.tracking.leaderboard import COSTS
from layerwise.tracking.models import Run

PAGE = (Path(__file__).parents[2] / "docs" / "tracking.md").read_text(encoding="utf-8")


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"result": result(), "smaller": result(size=100, accuracy=0.8)}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    for block in blocks:
        exec(block, names)
    said = capsys.readouterr().out
    assert len(blocks) == 2
    assert "[1, 2]" in said
    assert "'method': 'remove'" in said


def test_every_column_domain_and_cost_is_documented() -> None:
    missing = [column.key for column in Run.__table__.columns if f"`{column.key}`" not in PAGE]
    missing += [cost for cost in COSTS if f"`{cost}`" not in PAGE]
    missing += [domain for domain in DOMAINS if domain not in PAGE]
    assert missing == []
