"""What the pages on training show, runs."""

from __future__ import annotations

import re

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize("page", ["training", "distillation"])
def test_the_pages_python_runs(page: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"), re.DOTALL)
    for block in blocks:
        exec(block, {"__name__": "page"})
    assert blocks
