"""Students: the teacher with some of its layers, a teacher made smaller by any plan, or any module that answers the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from layerwise.errors import UsageError
from layerwise.method import METHODS, apply_plan, step_of, untreated
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.scores import Scores


def cut_student(teacher: UniversalModel, layers: int, scores: Scores | Mapping[str, float] | None = None) -> UniversalModel:
    """A copy of `teacher` with `layers` of its layers: evenly spaced, first and last among them, or the highest by `scores`.

    By width instead, carry out a plan with a structural method: ``apply_plan(teacher, plan).model``. Raises `UsageError` where
    fewer layers can be dropped than that.
    """
    drop = METHODS["drop_layers"]()
    names = [layer.name for layer in teacher.layers]
    if not 0 < layers < len(names):
        raise UsageError(f"A student with {layers} layers of a teacher with {len(names)} is none.", remedy="Ask for fewer.")
    fixed = untreated(drop, teacher, names)
    kept = _spaced(names, layers) if scores is None else _highest(names, layers, scores)
    dropped = [name for name in names if name not in kept]
    if stuck := [name for name in dropped if name in fixed]:
        raise UsageError(
            f"{teacher.name} cannot lose {', '.join(stuck)}: {fixed[stuck[0]]}.", remedy="Name the layers in a plan."
        )
    return apply_plan(teacher, CompressionPlan((step_of(drop, dropped),))).model


def _spaced(names: Sequence[str], count: int) -> set[str]:
    last = len(names) - 1
    return {names[-1]} if count == 1 else {names[round(i * last / (count - 1))] for i in range(count)}


def _highest(names: Sequence[str], count: int, scores: Scores | Mapping[str, float]) -> set[str]:
    missing = [name for name in names if name not in scores]
    if missing:
        raise UsageError(f"There is no score for {', '.join(missing[:3])}.", remedy="Give the scores of every layer.")
    return set(sorted(names, key=lambda name: scores[name])[-count:])
