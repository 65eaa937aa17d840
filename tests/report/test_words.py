"""Both languages say the same things about the same values."""

from __future__ import annotations

import re
import string
from pathlib import Path

import pytest

from layerwise.errors import UsageError
from layerwise.report import words
from layerwise.report.words import CATALOGUE, CHINESE, ENGLISH, Words

FOUND_BY_NAME = ("mark.", "state.", "status.", "metric.", "unit.", "artifact.")


def placeholders(phrase: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(phrase) if name is not None}


def test_the_languages_have_the_same_keys() -> None:
    assert list(CATALOGUE) == ["en", "zh"]
    assert ENGLISH.keys() == CHINESE.keys()


@pytest.mark.parametrize("key", ENGLISH)
def test_the_languages_have_the_same_placeholders(key: str) -> None:
    assert placeholders(ENGLISH[key]) == placeholders(CHINESE[key])


def test_every_phrase_is_used() -> None:
    folder = Path(words.__file__).parent
    files = [p for p in (*folder.glob("*.py"), *folder.glob("templates/*.jinja")) if p.name != "words.py"]
    used = set(re.findall(r"""["']([a-z][a-z0-9.]*)["']""", "".join(p.read_text(encoding="utf-8") for p in files)))
    charts = {f"{name}.title" for name in ("heatmap", "agreement", "removal", "pareto")}
    unused = {k for k in ENGLISH if k not in used | charts and not k.startswith(FOUND_BY_NAME)}
    assert not unused


def test_an_unknown_language_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'zh'"):
        Words("zh-CN"[:3])


def test_a_name_the_catalogue_lacks_stays_as_it_is() -> None:
    assert Words("zh").known("metric", "their_own") == "their_own"
    assert Words("zh").known("metric", "loss") == "损失"
