"""Names from other distributions: one file or one entry point adds a class, and a broken one is a warning that names it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from layerwise.registry import EntryPointWarning, Registry

ADAPTER = """
from layerwise.adapter import ADAPTERS, ModalityAdapter

class Smells(ModalityAdapter):
    modality = "smell"
    priority = 99

    @classmethod
    def claims(cls, module):
        return getattr(module, "smells", False)

    @classmethod
    def of(cls, module, folder=None):
        return cls()

    def collate(self, rows):
        raise NotImplementedError
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path in which a distribution can be laid down."""
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    return tmp_path


def distribution(folder: Path, name: str, entries: str, **modules: str) -> None:
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[layerwise.adapters]\n{entries}\n")
    for module, code in modules.items():
        (folder / f"{module}.py").write_text(code)
        sys.modules.pop(module, None)


def fresh() -> Registry[object]:
    return Registry("modality adapter", "layerwise.adapters")


def test_a_class_is_known_by_the_entry_points_name(installed: Path) -> None:
    from torch import nn

    distribution(installed, "noses", "smell = noses_module:Smells", noses_module=ADAPTER)
    registry = fresh()
    found = registry["smell"]
    assert found.__name__ == "Smells"
    module = nn.Linear(2, 2)
    module.smells = True  # type: ignore[assignment]
    assert found.claims(module)  # type: ignore[attr-defined]


def test_a_module_registers_its_own(installed: Path) -> None:
    from layerwise.adapter import ADAPTERS

    before = set(ADAPTERS)
    code = ADAPTER + '\nREGISTRY = ADAPTERS.register("smell of its own")(Smells)\n'
    distribution(installed, "noses", "any = noses_own:REGISTRY", noses_own=code)
    try:
        assert "smell of its own" not in before
        assert fresh()["any"].__name__ == "Smells"
    finally:
        ADAPTERS._classes.pop("smell of its own", None)


BROKEN = {
    "import error": ("import no_such_package_at_all", "ModuleNotFoundError"),
    "syntax error": ("def (", "SyntaxError"),
    "raises": ("raise ValueError('not today')", "not today"),
    "exits": ("import sys\nsys.exit(3)", "SystemExit"),
    "nothing in it": ("Thing = 3", "registers no class"),
    "not there": ("", "has no attribute 'Thing'"),
}


@pytest.mark.parametrize(("code", "said"), BROKEN.values(), ids=BROKEN)
def test_a_broken_one_is_named_and_the_others_stay(installed: Path, code: str, said: str) -> None:
    distribution(installed, "broken-noses", "smell = broken_nose:Thing", broken_nose=code)
    registry = fresh()
    with pytest.warns(EntryPointWarning) as caught:
        names = set(registry)
    (text,) = {str(w.message) for w in caught}
    assert text.startswith("LW-P The entry point 'smell' of broken-noses (layerwise.adapters)")
    assert said in text
    assert "\n" not in text
    assert "smell" not in names


def test_what_a_broken_one_had_registered_is_undone(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = fresh()
    monkeypatch.setitem(sys.modules, "holder_of_a_registry", SimpleNamespace(registry=registry))  # type: ignore[arg-type]
    half = "from holder_of_a_registry import registry\nregistry.register('half')(type('Half', (), {}))\n1 / 0"
    distribution(installed, "twice", "one = twice_module:Smells\ntwo = twice_other:Half", twice_module=ADAPTER, twice_other=half)
    with pytest.warns(EntryPointWarning, match="'two' of twice"):
        names = set(registry)
    assert "one" in names
    assert not {"two", "half"} & names


def test_two_that_want_one_name_are_both_named(installed: Path) -> None:
    distribution(installed, "first", "smell = first_nose:Smells", first_nose=ADAPTER)
    distribution(installed, "second", "smell = second_nose:Odours", second_nose=ADAPTER.replace("Smells", "Odours"))
    registry = fresh()
    with pytest.warns(EntryPointWarning) as caught:
        assert "smell" in registry
    text = str(caught[0].message)
    assert "first_nose.Smells" in text
    assert "second_nose.Odours" in text
