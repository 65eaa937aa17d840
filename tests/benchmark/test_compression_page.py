"""docs/compression_results.md is the page that the committed results give."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import ROOT

PAGE = (
    "import sys; sys.path.insert(0, 'benchmarks'); import compression; sys.stdout.write(compression.page(compression.results()))"
)


def test_the_page_is_the_one_that_the_results_give() -> None:
    made = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PAGE], cwd=ROOT, capture_output=True, text=True, check=True, encoding="utf-8"
    )
    assert made.stdout == (ROOT / "docs" / "compression_results.md").read_text(encoding="utf-8"), (
        "run benchmarks/compression.py --page"
    )
