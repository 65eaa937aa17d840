"""docs/vft.md: made from the committed results, and its example runs."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from layerwise import native
from layerwise.native.costs import attention_parameters
from tests.conftest import ROOT

PAGE = ROOT / "docs" / "vft.md"


def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vft_page", ROOT / "benchmarks" / "vft_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_the_one_made_from_the_committed_results() -> None:
    assert maker().page() == PAGE.read_text(encoding="utf-8")


def test_the_page_says_where_it_loses() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "vft.json").read_text(encoding="utf-8"))
    slower = [row for row in record["cost"]["rows"] if row["what"] == "decode" and row["pair"]["ratio"] > 1]
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"r = {row['rank']}, T = {row['tokens']}" in text for row in slower)
    assert maker().gap("loss", 2.04, 2.0) == (2.0000000000000018, "2.00 % of the loss behind")
    assert maker().gap("accuracy", 0.97, 0.96)[1] == "1.00 points ahead"


def test_the_cache_in_the_results_is_r_numbers_per_token() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "vft.json").read_text(encoding="utf-8"))
    for row in record["cost"]["rows"]:
        if row["what"] == "decode":
            assert row["cache_bytes"] == [4 * row["rank"] * row["tokens"], 4 * 2 * record["cost"]["width"] * row["tokens"]]


def test_the_example_runs(tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "folder" / "model.safetensors").is_file()


def test_the_numbers_in_the_example_are_true() -> None:
    assert round(attention_parameters(768, 12, 64) / 1000) == 295
    assert 4 * 768**2 == 2_359_296


def test_every_public_name_has_a_docstring() -> None:
    for name in native.__all__:
        assert (getattr(native, name).__doc__ or "").strip(), name
