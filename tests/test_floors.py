"""Imports only go down, and importing layerwise stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import layerwise
from tests.conftest import ROOT

PACKAGE = ROOT / "layerwise"
FLOORS = {
    0: {"errors", "registry", "files", "verb"},
    2: {"adapters", "analyzers", "compress", "export"},
    3: {"tracking", "report", "plugins"},
    4: {"engine", "extensions", "run", "benchmark"},
    5: {"cli", "service", "__main__"},
}
FLOOR = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Every layerwise module that the file imports anywhere, type-checking blocks apart."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            names = [f"layerwise.{a.name}" for a in node.names] if node.module == "layerwise" else [node.module or ""]
            yield from ((name, node.lineno) for name in names)
        elif isinstance(node, ast.Import):
            yield from ((a.name, node.lineno) for a in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    mine = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if mine == "__init__":
        return
    floor = FLOOR.get(mine, 1)
    for module, line in imported(path):
        other = room(module) if module.startswith("layerwise") else ""
        if not other or other == mine or other == "__version__":
            continue
        assert FLOOR.get(other, 1) <= floor, f"{path}:{line}: {mine} (floor {floor}) imports {other}"
        assert not (floor == 2 and FLOOR.get(other, 1) == 2), f"{path}:{line}: {mine} imports its neighbour {other}"


def test_the_test_would_notice() -> None:
    assert FLOOR["engine"] > FLOOR["adapters"] > FLOOR["errors"]
    assert len(FILES) > 50


def test_floor_0_has_no_torch() -> None:
    for path in FILES:
        if FLOOR.get(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), 1) == 0:
            assert "import torch" not in path.read_text(encoding="utf-8"), path


HEAVY = (
    "torch", "transformers", "timm", "torchvision", "sqlalchemy", "alembic", "plotly", "fastapi", "pandas", "onnx", "scipy",
    "triton", "sklearn", "pyarrow",
)  # fmt: skip


def loaded_by(code: str) -> set[str]:
    listing = f"import sys; {code}; print(*sorted(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_layerwise_loads_nothing_heavy() -> None:
    assert loaded_by("import layerwise") == set()


def test_using_the_engine_loads_no_model_library_and_no_database() -> None:
    assert loaded_by("import layerwise; layerwise.analyze; layerwise.FisherInformationAnalyzer") == {"torch"}


def test_help_answers_without_torch() -> None:
    assert "torch" not in loaded_by("from typer.testing import CliRunner; import layerwise.cli")
    done = subprocess.run([sys.executable, "-m", "layerwise", "--help"], capture_output=True, text=True, check=False)
    assert "analyze" in done.stdout


def test_verbs_stay_verbs_whatever_is_imported() -> None:
    import layerwise.compress.drop_layers
    import layerwise.export
    import layerwise.plan

    for name in ("load", "load_data", "analyze", "plan", "compress", "export", "track", "leaderboard"):
        assert callable(getattr(layerwise, name)), name


def test_every_public_name_exists() -> None:
    for name in layerwise.__all__:
        assert getattr(layerwise, name) is not None, name
