"""docs/loading.md: its examples run, and everything that can be named there is."""

from __future__ import annotations

import re

import pytest

from layerwise.adapter import ADAPTERS
from layerwise.readers.bundled import NAMES
from layerwise.readers.columns import ALIASES, ROLES
from layerwise.readers.specs import LIBRARIES, PARSERS
from layerwise.source import SOURCES
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "loading.md").read_text(encoding="utf-8")
OWN = {"compressed"}  # of folders saved by layerwise, never written by hand


def test_the_examples_run_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 3
    space: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/loading.md", "exec"), space)
    printed = capsys.readouterr().out
    assert "torch.Size([32, 10])" in printed
    assert float(printed.splitlines()[2]) > 0.4
    assert "2 label classes: 0 = tall, 1 = wide" in printed


def test_everything_is_named() -> None:
    words = [*(f".{n.lstrip('.')}" for n in PARSERS if n != ".ndjson"), *(f"`{role}`" for role in ROLES), *NAMES]
    words += [name for aliases in ALIASES.values() for name in aliases]
    words += [f"`{kind}:" for kind in {*SOURCES, *LIBRARIES} - OWN - {"file"}] + ["`FILE.py:FACTORY"]
    words += [f"**{name}**" for name in ADAPTERS]
    words += [f"LW-D{code}" for code in (12, 29, *range(31, 43))]
    assert not [word for word in words if word not in PAGE]
