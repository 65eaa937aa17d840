"""The faithfulness benchmark in full: ``benchmarks/results/faithfulness.json``, ``docs/faithfulness.md``, the package's tables.

The work is `layerwise.benchmark`; the protocol, fixed before the first run, is `layerwise.benchmark.protocol`. What is finished
lies in ``runs/faithfulness`` and is not done again. With ``--page`` only the page is written anew.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from layerwise.benchmark import faithfulness
from layerwise.benchmark.page import page
from layerwise.cli import main
from layerwise.files import write_atomic
from layerwise.selection import write_methods
from layerwise.stacking import write_stackers

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "faithfulness.json", ROOT / "docs" / "faithfulness.md"
OUT = ROOT / "runs" / "faithfulness"

if __name__ == "__main__":
    if "--page" not in sys.argv:
        code = main(["benchmark", "faithfulness", "--out", str(OUT), *sys.argv[1:]])
        if code:
            raise SystemExit(code)
        shutil.copyfile(OUT / faithfulness.RESULTS, RESULTS)
        write_stackers(RESULTS)
        write_methods(RESULTS)
    write_atomic(PAGE, page(faithfulness.load_results(RESULTS)))
