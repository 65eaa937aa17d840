"""The progress bar: nothing lost, nothing written without a terminal."""

from __future__ import annotations

import io
import sys

import pytest

from layerwise import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("patience", [0.0, 60.0])
def test_every_item_comes_once(patience: float, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(progress, "PATIENCE", patience)
    assert list(progress.tracked(range(5), "counting", total=5)) == [0, 1, 2, 3, 4]
    assert ("counting" in screen.getvalue()) == (patience == 0.0)


def test_without_a_terminal_nothing_is_written(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    assert list(progress.tracked(iter("ab"), "counting")) == ["a", "b"]
    assert capsys.readouterr() == ("", "")
