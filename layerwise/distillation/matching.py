"""Which layer of the teacher each layer of the student learns from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from layerwise.errors import UsageError, nearest
from layerwise.model import UniversalModel
from layerwise.scores import Scores

Suits = Callable[[str, str], bool]  # whether a student's and a teacher's layer can be compared


def match(student: Sequence[str], teacher: Sequence[str], suits: Suits = lambda a, b: True) -> dict[str, str]:
    """Uniform: the student's layer i of n learns from the teacher's layer ⌈(i+1)·N/n⌉ of N, so that the last learns from the last
    (TinyBERT). Where those two cannot be compared, from the nearest that can; a layer that suits none is left out.
    """
    pairs = {}
    for i, name in enumerate(student):
        wanted = -(-(i + 1) * len(teacher) // len(student)) - 1
        able = [j for j, other in enumerate(teacher) if suits(name, other)]
        if able:
            pairs[name] = teacher[min(able, key=lambda j: (abs(j - wanted), j))]
    return pairs


def match_by_scores(
    student: Sequence[str], teacher: Sequence[str], scores: Scores | Mapping[str, float], suits: Suits = lambda a, b: True
) -> dict[str, str]:
    """The teacher's layers are cut into as many runs of neighbours as the student has layers; each of these learns from the most
    important layer of its run by `scores`, the last from the last layer.
    """
    pairs, count = {}, len(student)
    for i, name in enumerate(student):
        run = teacher[len(teacher) * i // count : max(len(teacher) * (i + 1) // count, len(teacher) * i // count + 1)]
        able = [other for other in run if suits(name, other) and other in scores]
        if i == count - 1 and suits(name, teacher[-1]):
            pairs[name] = teacher[-1]
        elif able:
            pairs[name] = max(able, key=lambda other: scores[other])
    return pairs


def checked(pairs: Mapping[str, str], student: UniversalModel, teacher: UniversalModel) -> dict[str, str]:
    """`pairs` (student's layer → teacher's layer) as they are. Raises `UsageError` with the nearest name for a wrong one."""
    for whose, model, names in (("student", student, list(pairs)), ("teacher", teacher, list(pairs.values()))):
        known = [layer.name for layer in model.blocks if layer.stream is not None]
        for name in names:
            if name not in known:
                raise UsageError(f"The {whose} has no layer {name!r} with a stream of its own.", remedy=nearest(name, known))
    if not pairs:
        raise UsageError("No layers are paired.", remedy="Give layer_map={student's layer: teacher's layer}.")
    return dict(pairs)
