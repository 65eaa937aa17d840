"""Runs every long test (kill -9, signals, full figures) and writes what came out to ``benchmarks/results/soak.json``.

``make soak`` calls this. The file says machine, versions, and for each test its outcome and seconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

from layerwise.config import RunConfig
from layerwise.environment import environment
from layerwise.files import write_atomic

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "soak.json"


def outcomes(junit: Path) -> list[dict[str, object]]:
    """One entry per test in pytest's JUnit file: name, outcome, seconds."""
    found: list[dict[str, object]] = []
    for case in ET.parse(junit).getroot().iter("testcase"):
        kinds = [child.tag for child in case if child.tag in {"failure", "error", "skipped"}]
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        found.append({"test": name, "outcome": kinds[0] if kinds else "passed", "seconds": round(float(case.get("time", 0)), 1)})
    return found


def main() -> int:
    """The exit code of pytest; the results are written whatever it is."""
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "soak.xml"
        command = [sys.executable, "-m", "pytest", "-m", "soak", "--timeout=3000", f"--junitxml={junit}", *sys.argv[1:]]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if junit.exists():
            result = {"environment": environment(RunConfig()), "tests": outcomes(junit)}
            write_atomic(RESULTS, json.dumps(result, indent=1) + "\n")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
