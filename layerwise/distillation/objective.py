"""`Distillation`: the objectives of a student under a teacher, for the training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from layerwise.data import Batch
from layerwise.distillation.feature import differing_dimension
from layerwise.distillation.matching import checked, match
from layerwise.distillation.response import Response
from layerwise.distillation.seen import Seen, look
from layerwise.distillation.teacher import Disk, Memory, Nothing, Store, Teacher
from layerwise.distillation.term import TERMS, Term
from layerwise.distillation.vocabulary import check_vocabulary
from layerwise.distillation.weighting import WEIGHTINGS, Weighting
from layerwise.errors import UsageError, nearest
from layerwise.model import UniversalModel
from layerwise.spec import built
from layerwise.supplies import Supplies
from layerwise.trace import evaluating
from layerwise.training import Lesson, Objective, Portion, task_loss

CACHES = ("memory", "disk", "none")
UNIFORM = "uniform"
SAMPLES = 4  # of the first batch, on which layers are paired and projections are made


@dataclass(frozen=True)
class Distillation(Objective):
    """alpha · (the weighted `terms`) + beta · (the loss of the task on the labels, where it has one).

    `terms`: names of `TERMS`, also with settings as in ``attention(attention_type=cross)``, or instances; `temperature` is that
    of the response. `weights` are theirs, 1 each if empty, balanced by `weighting`: ``fixed``, ``gradient_norm``
    or ``uncertainty``.
    `layer_map`: ``uniform``, or student's layer → teacher's layer (`match_by_scores` makes one from importance scores).
    `cache` keeps what the teacher showed: in ``memory``, on ``disk`` (in the checkpoint folder), ``none``.
    `memory` may be shared by several trainings.
    """

    terms: tuple[str | Term, ...] = ("response",)
    temperature: float = 4.0
    alpha: float = 0.7
    beta: float = 0.3
    weights: tuple[float, ...] = ()
    weighting: str = "fixed"
    layer_map: str | Mapping[str, str] = UNIFORM
    cache: str = "memory"
    memory: Memory | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for what, value, known in (("weighting", self.weighting, tuple(WEIGHTINGS)), ("cache", self.cache, CACHES)):
            if value not in known:
                raise UsageError(f"Unknown {what} {value!r}.", remedy=nearest(value, known))
        if not self.terms or (self.weights and len(self.weights) != len(self.terms)):
            raise UsageError(f"There are {len(self.terms)} objectives and {len(self.weights)} weights.", remedy="One each.")
        if min(self.alpha, self.beta, *self.weights, 0) < 0 or not self.alpha + self.beta > 0:
            raise UsageError("alpha, beta and the weights must not be negative, and one of alpha and beta must be above 0.")
        if isinstance(self.layer_map, str) and self.layer_map != UNIFORM:
            raise UsageError(f"Unknown layer_map {self.layer_map!r}.", remedy=f"Use {UNIFORM!r} or a mapping.")

    def key(self, supplies: Supplies) -> str:
        own = replace(self, memory=None, cache="memory")  # where answers are kept changes nothing
        return f"{own!r}|{supplies.teacher.fingerprint if supplies.teacher else ''}"

    def begin(self, model: UniversalModel, supplies: Supplies) -> Lesson:
        supplies.check("distillation", frozenset({"teacher", "training"}))
        assert supplies.teacher is not None
        assert supplies.training is not None
        return Lessons(self, model, supplies.teacher, supplies)

    def chosen(self) -> list[Term]:
        """The terms as instances, the temperature put into the response."""
        found = [t if isinstance(t, Term) else built(TERMS, t) for t in self.terms]
        plain = {t for t in self.terms if isinstance(t, str)}
        return [replace(t, temperature=self.temperature) if isinstance(t, Response) and t.name in plain else t for t in found]

    def store(self, supplies: Supplies) -> Store:
        if self.cache == "disk":
            if supplies.checkpoint is None:
                raise UsageError("The teacher's answers go to disk beside the checkpoint, and there is no folder for it.")
            return Disk(supplies.checkpoint / "teacher")
        return Nothing() if self.cache == "none" else self.memory if self.memory is not None else Memory()


class Lessons(Lesson):
    """A `Distillation` at work. `teacher.store` counts the teacher's forwards."""

    def __init__(self, settings: Distillation, model: UniversalModel, teacher: UniversalModel, supplies: Supplies) -> None:
        assert supplies.training is not None
        if teacher.module is model.module:
            raise UsageError("The teacher is the student itself.", remedy="Give the uncompressed model as the teacher.")
        assert model.task is not None  # the loop has seen the data
        check_vocabulary(model, teacher)
        teacher.see(supplies.training[0])
        self.settings, self.model, self.task, self.terms = settings, model, model.task, settings.chosen()
        first = supplies.training[0]
        first = first.narrow(0, min(first.size, SAMPLES))
        reads = frozenset[str]().union(*(t.reads for t in self.terms))
        self.pairs = paired_layers(settings, model, teacher, first)
        self.wants = [list(self.pairs) if kind in reads else [] for kind in ("features", "attention")]
        own = [list(dict.fromkeys(self.pairs[name] for name in names)) for names in self.wants]
        self.teacher = Teacher(teacher, own[0], own[1], settings.store(supplies), _about(settings, teacher, supplies))
        self._open(first)

    def _open(self, first: Batch) -> None:
        """Checks that all can be compared, and makes what is trained along."""
        mine, other = _glance(self.model, first, *self.wants), _glance(self.teacher.model, first, *self._own())
        other = other.to(mine.output.device).renamed(self.pairs)
        for term in self.terms:
            term.check(mine, other, self.task)
        self.terms = [t.resolved(self.task, mine.output) if isinstance(t, Response) else t for t in self.terms]
        made = {t.name: t.companion(mine, other) for t in self.terms}
        weighting = WEIGHTINGS[self.settings.weighting](self.settings.weights or (1.0,) * len(self.terms))
        self.companion: Along = Along({k: v for k, v in made.items() if v is not None}, weighting, len(self.terms) + 1)
        self.companion.to(mine.output.device)
        with torch.no_grad():
            weighting.begin([float(loss) for loss in self._losses(mine, other, first.to(self.model.device))])

    def _own(self) -> tuple[Sequence[str], Sequence[str]]:
        return self.teacher.features, self.teacher.attention

    def loss(self, batch: Batch, portion: Portion) -> Tensor:
        other = self.teacher.see(batch, portion).to(self.model.device).renamed(self.pairs)
        mine = look(self.model, batch, *self.wants)
        parts = self._losses(mine, other, batch)
        parameters = [p for p in self.model.module.parameters() if p.requires_grad]
        total = self.settings.alpha * self.companion.weighting.total(parts, parameters)
        hard = torch.zeros((), device=total.device)
        if self.settings.beta and self.task.name != "fidelity":
            hard = task_loss(self.model, mine.output, batch)
            total = total + self.settings.beta * hard
        self.companion.note([*parts, hard])
        return total

    def _losses(self, mine: Seen, other: Seen, batch: Batch) -> list[Tensor]:
        return [t.loss(mine, other, batch, self.companion.of(t.name)) for t in self.terms]

    def figures(self) -> dict[str, float]:
        """The mean of each part of the loss over the epoch, and the weights at its end."""
        names = [t.name for t in self.terms]
        means = dict(zip([*names, "task"], self.companion.means(), strict=True))
        return means | {f"weight of {n}": w for n, w in zip(names, self.companion.weighting.weights(), strict=True)}


class Along(nn.Module):
    """What is trained or kept along with the student: projections, the weighting, and the sums of the epoch's losses."""

    def __init__(self, projections: Mapping[str, nn.Module], weighting: Weighting, parts: int) -> None:
        super().__init__()
        self.projections = nn.ModuleDict(projections)
        self.weighting = weighting
        self.register_buffer("sums", torch.zeros(parts + 1, dtype=torch.float64))
        self.sums: Tensor

    def of(self, name: str) -> nn.Module | None:
        return dict(self.projections.items()).get(name)

    def note(self, losses: Sequence[Tensor]) -> None:
        """Adds a step; the last sum counts them."""
        one = torch.ones((), device=self.sums.device)
        self.sums += torch.stack([loss.detach().double() for loss in [*losses, one]])

    def means(self) -> list[float]:
        """Of each part, and starts again."""
        *sums, count = self.sums.tolist()
        self.sums.zero_()
        return [s / max(count, 1) for s in sums]


def _about(settings: Distillation, teacher: UniversalModel, supplies: Supplies) -> str:
    """Of whom and on what a kept answer is; hashing all data is for stores that outlive the training."""
    if settings.cache != "disk" and settings.memory is None:
        return ""
    assert supplies.training is not None
    return f"{teacher.fingerprint}|{supplies.training.fingerprint}"


def _glance(model: UniversalModel, batch: Batch, features: Sequence[str], attention: Sequence[str]) -> Seen:
    with evaluating(model.module), torch.no_grad():
        return look(model, batch.to(model.device), features, attention)


def paired_layers(settings: Distillation, student: UniversalModel, teacher: UniversalModel, batch: Batch) -> dict[str, str]:
    """Student's layer → teacher's; layers whose features can be compared, unless the caller says which. Empty if none is read.

    Raises `UsageError` for layers that do not exist, and where no two can be compared.
    """
    if not any(term.reads for term in settings.chosen()):
        return {}
    if not isinstance(settings.layer_map, str):
        return checked(settings.layer_map, student, teacher)
    few = batch.narrow(0, min(batch.size, SAMPLES))
    names = [[layer.name for layer in model.blocks if layer.stream is not None] for model in (student, teacher)]
    mine, other = (_glance(m, few, n, ()).features for m, n in zip((student, teacher), names, strict=True))

    def suits(one: str, two: str) -> bool:
        return one in mine and two in other and differing_dimension(mine[one], other[two]) is not None

    return checked(match(names[0], names[1], suits), student, teacher)
