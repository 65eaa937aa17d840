"""Whether student and teacher read and answer in the same language: the same ids must mean the same to both.

Nothing fails by itself where they do not: the teacher answers, confidently, about other words.
"""

from __future__ import annotations

from typing import Any

from layerwise.errors import UsageError
from layerwise.model import UniversalModel

REMEDY = "Distill between models that share their vocabulary, or give both the same tokenizer."


def check_vocabulary(student: UniversalModel, teacher: UniversalModel) -> None:
    """Raises `UsageError` where tokenizers, embedding tables or names of classes differ."""
    mine, other = (getattr(m.adapter, "tokenizer", None) for m in (student, teacher))
    if mine is not None and other is not None and mine is not other:
        _same_tokens(mine.get_vocab(), other.get_vocab())
    small, large = (getattr(m.adapter, "vocabulary", None) for m in (student, teacher))
    if small is not None and large is not None and small != large and (mine is None or other is None):
        raise UsageError(f"The student's vocabulary has {small:,} tokens and the teacher's {large:,}.", remedy=REMEDY)
    _same_classes(_classes(student), _classes(teacher))


def _same_tokens(mine: dict[str, int], other: dict[str, int]) -> None:
    if mine == other:
        return
    wrong = next((t for t in sorted(mine, key=lambda t: mine[t]) if other.get(t) != mine[t]), None)
    where = f"{wrong!r} is {mine[wrong]} to one and {other.get(wrong)} to the other" if wrong is not None else "one knows more"
    raise UsageError(f"The tokenizers differ ({len(mine):,} and {len(other):,} tokens; {where}).", remedy=REMEDY)


def _same_classes(mine: list[str], other: list[str]) -> None:
    if not mine or not other or mine == other:
        return
    if len(mine) != len(other):
        raise UsageError(
            f"The student has {len(mine)} classes and the teacher {len(other)}.", remedy="Both need the same classes."
        )
    first = next(i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b)
    raise UsageError(
        f"Class {first} is {mine[first]!r} to the student and {other[first]!r} to the teacher.",
        remedy="Both need the same classes in the same order.",
    )


def _classes(model: UniversalModel) -> list[str]:
    """The names of the classes as the model's configuration gives them; empty where it has none of its own."""
    config: Any = getattr(model.module, "config", None)
    named = getattr(config, "id2label", None) or {}
    names = [str(named[key]) for key in sorted(named, key=int)]
    return [] if all(name == f"LABEL_{i}" for i, name in enumerate(names)) else names
