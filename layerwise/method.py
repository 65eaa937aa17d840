"""`CompressionMethod`: one way to make a model smaller, and `apply_plan`, which makes the cuts of a plan on a copy.

Decision: a method changes the module in place and leaves every other layer's dotted name as it was, so that a plan stays
readable after each of its steps. It also says how its effect is judged: a structural cut names a context in which the *uncut*
model computes the same (`masked`); a method that changes values says which values are right (`check`). `reshape_` repeats only
what the change does to the structure, which with the saved weights gives the model back.

A method may choose by data what goes (units, ranks): `fitted` gives it with that choice in its settings, and that is what stands
in the plan afterwards, so that the plan says what was really done and replays without data. A method that trains promises no
values; it keeps the structure, and what it did to quality is measured.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from layerwise.errors import ProofFailed, UsageError, UserModelError, nearest
from layerwise.model import UniversalModel
from layerwise.packing import outline
from layerwise.plan import CompressionPlan, Step
from layerwise.registry import Registry
from layerwise.source import Source
from layerwise.structure import Layer
from layerwise.supplies import NOTHING, Supplies
from layerwise.tensors import dense, differing, distinct


@dataclass(frozen=True)
class Check:
    """How far a change is from what it should be: right while `measured` ≤ `bound`; `detail` names the unit."""

    measured: float
    bound: float
    detail: str
    place: str = ""  # the tensor or layer where it goes wrong first

    @property
    def passed(self) -> bool:
        return self.measured <= self.bound  # NaN fails


def exactly(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], what: str) -> Check:
    """Whether the tensors `found` are those `expected`, element by element; `what` they are if not, in words."""
    if expected.keys() != found.keys():
        return Check(1, 0, "the names of the tensors differ", min(expected.keys() ^ found.keys()))
    wrong = {name: differing(tensor, found[name]) for name, tensor in expected.items()}
    return Check(sum(wrong.values()), 0, f"elements that are not {what}", next((n for n, count in wrong.items() if count), ""))


class CompressionMethod(ABC):
    """A frozen dataclass of settings (plain JSON values). `shrinks` are the costs (`Target.metric`) that it promises to lower."""

    name: ClassVar[str]
    shrinks: ClassVar[frozenset[str]] = frozenset()
    structural: ClassVar[bool] = False  # the class alone would not take the weights afterwards; judged by `masked`
    selective: ClassVar[bool] = False  # the planner chooses the layers; otherwise it offers all that can be treated
    needs: ClassVar[frozenset[str]] = frozenset()  # fields of `Supplies` without which it cannot work
    trains: ClassVar[bool] = False  # it learns values on `Supplies.training`, so that no value can be foretold

    @classmethod
    def variants(cls) -> tuple[CompressionMethod, ...]:
        """The settings that a planner should try."""
        return (cls(),)

    @property
    def whole(self) -> bool:
        """Whether it treats all its layers at once, so that one of them cannot be left out."""
        return False

    @abstractmethod
    def treats(self, layer: Layer) -> str:
        """'' or the reason why `layer` cannot be treated."""

    def treats_in(self, model: UniversalModel, layer: Layer) -> str:
        """The same where the answer depends on what is around `layer`."""
        return self.treats(layer)

    def remarks(self, layer: Layer) -> tuple[str, ...]:
        """What inside a treated layer stays as it was, in words."""
        return ()

    def remarks_in(self, model: UniversalModel, layer: Layer) -> tuple[str, ...]:
        """The same where the answer depends on what is around `layer`."""
        return self.remarks(layer)

    def fitted(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies) -> CompressionMethod:
        """The method with every choice that depends on weights or data in its settings; itself once that is so."""
        return self

    @abstractmethod
    def apply_(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies = NOTHING) -> None:
        """Changes ``model.module`` in place; `model.layers` are still those of before."""

    @abstractmethod
    def reshape_(self, model: UniversalModel, layers: Sequence[str]) -> None:
        """The same change of structure on a fresh module of the original class, whatever its weights."""

    def masked(self, model: UniversalModel, layers: Sequence[str]) -> AbstractContextManager[None] | None:
        """Inside, the uncut `model` computes what the cut one should; None unless the method is `structural`."""
        return None

    def masked_like(
        self, model: UniversalModel, cut: UniversalModel, layers: Sequence[str]
    ) -> AbstractContextManager[None] | None:
        """As `masked`, for a method that has to look at the cut model to know what it kept, such as directions."""
        return self.masked(model, layers)

    def resized(self) -> Sequence[tuple[int, int]]:
        """Sizes that the change took from one number to another (before, after), to be looked for in a configuration."""
        return ()

    def check(self, before: UniversalModel, after: UniversalModel, layers: Sequence[str]) -> Check | None:
        """Whether the values of `after` follow from those of `before`, tensor by tensor; None where only `masked` can tell."""
        return None

    def check_on(self, before: UniversalModel, after: UniversalModel, layers: Sequence[str], supplies: Supplies) -> Check | None:
        """As `check`, for values that are right only on the data that they were made for."""
        return self.check(before, after, layers)


COMPRESSED = "compressed"  # the kind of source that replays steps on another source

METHODS: Registry[CompressionMethod] = Registry("compression method", "layerwise.compress")


def method_of(step: Step) -> CompressionMethod:
    """The method of a step with its settings. Raises `UsageError` with the nearest name of a method or setting."""
    cls = METHODS[step.method]
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]  # every method is a dataclass
    for key in step.settings:
        if key not in known:
            raise UsageError(f"The method {step.method} has no setting {key!r}.", remedy=nearest(key, known))
    return cls(**step.settings)


def step_of(method: CompressionMethod, layers: Sequence[str]) -> Step:
    """The plan's step that applies `method` to `layers`."""
    return Step(method.name, tuple(layers), asdict(method))  # type: ignore[call-overload]  # every method is a dataclass


def untreated(method: CompressionMethod, model: UniversalModel, layers: Sequence[str]) -> dict[str, str]:
    """Of `layers`, those that `method` cannot treat, with the reason. Raises `UsageError` for a name that does not exist."""
    reasons = {name: method.treats_in(model, model.layer(name)) for name in layers}
    return {name: reason for name, reason in reasons.items() if reason}


@dataclass(frozen=True)
class Applied:
    """The compressed copy, the plan as it was really carried out, what stays untreated inside layers, and what failed and why."""

    model: UniversalModel
    plan: CompressionPlan
    remarks: tuple[str, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)  # layer → why


Watch = Callable[[UniversalModel, UniversalModel, Step], None]  # the model before a step, the one after, the step as carried out


def apply_plan(
    model: UniversalModel,
    plan: CompressionPlan,
    supplies: Supplies = NOTHING,
    *,
    skip_failures: bool = False,
    watch: Watch | None = None,
) -> Applied:
    """Carries out `plan` on a copy of `model`, which is left alone and is the teacher where `supplies` names none.

    A step after which the forward fails, or weights or outputs are no longer finite, is undone. Then it raises (`ProofFailed`
    LW-V05, `UserModelError`), or with `skip_failures` goes on without the layers that fail, found by trying one by one.
    Raises `UsageError` for layers that a method cannot treat, and for supplies that it needs and are missing (LW-C15).
    """
    supplies = replace(supplies, teacher=supplies.teacher or model)
    stage, done, remarks = model.clone(), list[Step](), list[str]()
    failed: dict[str, str] = {}
    for number, step in enumerate(plan.steps):
        own, before = supplies.at(f"step{number}"), stage if number else model
        if skip_failures:
            stage, parts = _attempted(stage, step, own, failed, remarks)
            done += parts
        else:
            stage, made = apply_step_(stage.clone() if watch and number else stage, step, own, remarks)
            done.append(made)
            if watch is not None:
                watch(before, stage, made)
    return Applied(stage, replace(plan, steps=tuple(done)), tuple(remarks), failed)


def apply_step_(
    model: UniversalModel, step: Step, supplies: Supplies = NOTHING, remarks: list[str] | None = None
) -> tuple[UniversalModel, Step]:
    """Changes ``model.module`` in place and gives it with the layers that are left, and the step with its choices made, which is
    also noted in the model's source. What inside its layers stays as it was is added to `remarks`.
    """
    method = method_of(step)
    if refused := untreated(method, model, step.layers):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise UsageError(f"{step.method} cannot treat {reasons}.", remedy="Take these layers out of the plan.")
    supplies.check(step.method, method.needs)
    was_finite = not _not_finite(model)
    method = method.fitted(model, step.layers, supplies)
    made = step_of(method, step.layers)
    said = [remark for name in step.layers for remark in method.remarks_in(model, model.layer(name))]
    method.apply_(model, step.layers, supplies)
    changed = model.changed(model.module, source=noted(model, made))
    if was_finite and (what := _not_finite(changed)):
        place = ", ".join(step.layers[:3]) + (" …" if len(step.layers) > 3 else "")
        raise ProofFailed(f"{step.method} made {what} not finite.", place=place, code="LW-V05")
    if remarks is not None:
        remarks += said
    return changed, made


def replay_(model: UniversalModel, steps: Sequence[Step]) -> UniversalModel:
    """What `steps` do to the structure, on a fresh module of the original class; in place."""
    for step in steps:
        method_of(step).reshape_(model, step.layers)
        model = model.changed(model.module, source=noted(model, step))
    return model


def noted(model: UniversalModel, step: Step) -> Source:
    """The source from which the model can be built once `step` has been applied to it."""
    before = model.source
    if before is not None and before.kind == COMPRESSED:
        settings = dict(before.settings) | {"steps": [*before.settings["steps"], step.to_dict()]}
        return replace(before, settings=settings)
    settings = {"source": before and before.to_dict(), "steps": [step.to_dict()], "example": outlined(model)}
    return Source(COMPRESSED, before.name if before else model.name, settings)


def unfolded(source: Source | None) -> tuple[Source | None, list[Step]]:
    """The source of the uncompressed class, and the steps that follow."""
    if source is None or source.kind != COMPRESSED:
        return source, []
    inner = source.settings["source"]
    return Source.from_dict(inner) if inner else None, [Step.from_dict(s) for s in source.settings["steps"]]


def outlined(model: UniversalModel) -> dict[str, Any] | None:
    """The model's example as shapes and types, to read its layers with later; None where it is unknown or has no plain form."""
    try:
        return outline(model.example)
    except UsageError:
        return None


def _attempted(
    stage: UniversalModel, step: Step, supplies: Supplies, failed: dict[str, str], remarks: list[str]
) -> tuple[UniversalModel, list[Step]]:
    """The stage after as much of `step` as works, and those parts; adds the layers that fail to `failed`."""
    try:
        changed, made = apply_step_(stage.clone(), step, supplies, remarks)
        return changed, [made]
    except (ProofFailed, UserModelError) as error:
        if method_of(step).whole or len(step.layers) < 2:
            failed |= dict.fromkeys(step.layers or ("the whole model",), f"{step.method}: {error.what}")
            return stage, []
    done = list[Step]()
    for name in step.layers:
        stage, parts = _attempted(stage, replace(step, layers=(name,)), supplies, failed, remarks)
        done += parts
    return stage, _joined(done)


def _joined(steps: Sequence[Step]) -> list[Step]:
    """The steps, those with equal settings as one."""
    joined: dict[str, Step] = {}
    for step in steps:
        key = repr(sorted(step.settings.items()))
        joined[key] = replace(step, layers=joined[key].layers + step.layers) if key in joined else step
    return list(joined.values())


def _not_finite(model: UniversalModel) -> str:
    """The first tensor, or the output on the example, that holds NaN or infinity; '' if there is none."""
    for name, tensor in distinct(model.module):
        if tensor.is_floating_point() and not bool(torch.isfinite(dense(tensor)).all()):
            return f"the tensor {name}"
    return "" if bool(torch.isfinite(model.predict(model.example)).all()) else "the outputs"
