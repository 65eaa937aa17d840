"""What the page on pruning shows, runs."""

from __future__ import annotations

import re

from tests.conftest import ROOT


def test_the_pages_python_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "pruning.md").read_text(encoding="utf-8"), re.DOTALL)
    for block in blocks:
        exec(block, {"__name__": "page"})
    assert len(blocks) == 2
