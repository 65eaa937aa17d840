"""`ModelDistillationPlugin`: distillation by the names under which it is asked for, thin over `layerwise.distillation`.

Two shapes each: bare tensors (the student's first) give the loss; two models and a loader train the student in place. With models
the teacher comes first, except in `distill_model`, where the student does; all have keywords, which say it better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layerwise.data import Data
from layerwise.distillation import Distillation
from layerwise.distillation.attention import attention_loss
from layerwise.distillation.feature import feature_loss
from layerwise.distillation.relation import pooled, relation_loss
from layerwise.distillation.report import CompressionReport, compression_report
from layerwise.distillation.response import soft_loss
from layerwise.errors import UsageError, nearest
from layerwise.loading import load
from layerwise.model import UniversalModel
from layerwise.supplies import Supplies
from layerwise.training import Trained, TrainingSettings, kept_zeros, train_

Model = UniversalModel | nn.Module | str
ALIASES = {"student_model": "student", "teacher_model": "teacher", "train_data": "dataloader", "train_dataloader": "dataloader"}


@dataclass(frozen=True)
class Distilled:
    """The student, trained in place, and what the training did."""

    model: UniversalModel
    trained: Trained


@dataclass(frozen=True)
class ModelDistillationPlugin:
    """Trains students under teachers. `config` holds more settings of `Distillation` and `TrainingSettings` by their names."""

    temperature: float = 4.0
    alpha: float = 0.7
    beta: float = 0.3
    distill_type: str = "response"
    config: Mapping[str, Any] = field(default_factory=dict)
    name: ClassVar[str] = "model_distillation"
    priority: ClassVar[int] = 350
    kind: ClassVar[str] = "training"

    def distill_model(
        self,
        student: Model | None = None,
        teacher: Model | None = None,
        dataloader: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        val_data: Any = None,
        config: Mapping[str, Any] | None = None,
        **named: Any,
    ) -> Distilled:
        """Trains `student` in place under `teacher` on `dataloader` by `distill_type` (``response+feature``, …).

        Also by the keywords ``student_model``, ``teacher_model``, ``train_data`` and ``train_dataloader``. With `val_data` the
        best epoch's weights are kept. Of `optimizer` kind, learning rate, momentum and weight decay are taken over; its own state
        is not used. `config` goes before the plugin's. Raises `UsageError` for what is missing or unknown.
        """
        given: dict[str, Any] = {"student": student, "teacher": teacher, "dataloader": dataloader}
        for key, value in named.items():
            if key not in ALIASES:
                raise UsageError(f"distill_model has no argument {key!r}.", remedy=nearest(key, ALIASES))
            given[ALIASES[key]] = value
        if missing := [key for key, value in given.items() if value is None]:
            raise UsageError(f"distill_model needs {', '.join(missing)}.")
        settings = dict(self.config) | _recipe_of(optimizer) | dict(config or {})
        return self._train(given["student"], given["teacher"], given["dataloader"], val_data, settings)

    def response_distillation(
        self, *given: Any, temperature: float | None = None, alpha: float | None = None, **named: Any
    ) -> Tensor | Distilled:
        """``(student_logits, teacher_logits, temperature)`` → T² · KL, a scalar; ``(teacher_model, student_model, data_loader,
        temperature, alpha)`` trains the student, with β = 1 − `alpha` where `alpha` is given.
        """
        first, second, loader, rest = _split(given, named, ("temperature", "alpha"))
        temperature = rest.get("temperature", self.temperature if temperature is None else temperature)
        if isinstance(first, Tensor):
            return soft_loss(first, second, temperature)
        alpha = rest.get("alpha", alpha)
        mixed = {} if alpha is None else {"alpha": alpha, "beta": 1 - alpha}
        return self._train(second, first, loader, None, dict(self.config) | {"temperature": temperature} | mixed)

    def feature_distillation(
        self, *given: Any, layer_mappings: Mapping[str, str] | None = None, **named: Any
    ) -> Tensor | Distilled:
        """``(student_features, teacher_features)``, tensors, lists or dicts of them → the mean relative squared error;
        ``(teacher_model, student_model, data_loader, layer_mappings)`` trains the student, `layer_mappings` being student's →
        teacher's layer.
        """
        first, second, loader, rest = _split(given, named, ("layer_mappings",))
        if _tensors(first):
            return _mean(feature_loss(a, b) for a, b in _pairs(first, second))
        pairs = rest.get("layer_mappings", layer_mappings) or "uniform"
        return self._train(second, first, loader, None, dict(self.config) | {"distill_type": "feature", "layer_map": pairs})

    def relation_distillation(self, *given: Any, **named: Any) -> Tensor | Distilled:
        """``(student_features, teacher_features)`` → the difference of their Gram matrices; ``(teacher_model, student_model,
        data_loader)`` trains the student.
        """
        first, second, loader, _ = _split(given, named, ())
        if _tensors(first):
            return _mean(relation_loss(pooled(a), pooled(b)) for a, b in _pairs(first, second))
        return self._train(second, first, loader, None, dict(self.config) | {"distill_type": "relation"})

    def attention_distillation(self, *given: Any, attention_type: str = "both", **named: Any) -> Tensor | Distilled:
        """``(student_attn, teacher_attn)``, maps (samples, heads, queries, keys) → KL per query; ``(teacher_model, student_model,
        data_loader, attention_type)`` trains the student by its ``self``, ``cross`` or ``both`` attentions.
        """
        first, second, loader, rest = _split(given, named, ("attention_type",))
        if _tensors(first):
            return _mean(attention_loss(a, b) for a, b in _pairs(first, second))
        kind = f"attention(attention_type={rest.get('attention_type', attention_type)})"
        return self._train(second, first, loader, None, dict(self.config) | {"distill_type": kind})

    def evaluate_compression(
        self, teacher: Model | None = None, student: Model | None = None, test_data: Any = None, **named: Model
    ) -> CompressionReport:
        """Parameters, bytes, memory and, with `test_data`, quality, multiply-accumulates and speed of both, timed in turn.

        Also by the keywords ``original_model`` and ``distilled_model``.
        """
        before, after = named.pop("original_model", teacher), named.pop("distilled_model", student)
        if named or before is None or after is None:
            raise UsageError("evaluate_compression needs the teacher and the student, and may have test_data.")
        return compression_report(_universal(before), _universal(after), None if test_data is None else Data.of(test_data))

    def _train(self, student: Model, teacher: Model, loader: Any, validation: Any, settings: Mapping[str, Any]) -> Distilled:
        if loader is None:
            raise UsageError("A student learns from data, and none were given.", remedy="Give a loader of batches.")
        objective, recipe = self._settings(settings)
        pupil, master, data = _universal(student), _universal(teacher), Data.of(loader)
        supplies = Supplies(training=data, validation=None if validation is None else Data.of(validation), teacher=master)
        pupil.see(data[0])
        return Distilled(pupil, train_(pupil, supplies, objective, recipe, after_step=kept_zeros(pupil.module)))

    def _settings(self, given: Mapping[str, Any]) -> tuple[Distillation, TrainingSettings]:
        """Raises `UsageError` with the nearest name for a setting that does not exist."""
        ours = {f.name for f in fields(Distillation)} - {"terms", "memory"}
        recipe = {f.name for f in fields(TrainingSettings)}
        known = ours | recipe | {"distill_type"}
        for key in given:
            if key not in known:
                raise UsageError(f"Distillation has no setting {key!r}.", remedy=nearest(key, known))
        terms = tuple(str(given.get("distill_type", self.distill_type)).split("+"))
        base = Distillation(terms, self.temperature, self.alpha, self.beta)
        return (
            replace(base, **{k: v for k, v in given.items() if k in ours}),
            TrainingSettings(**{k: v for k, v in given.items() if k in recipe}),
        )


MODELS = (("teacher_model", "student_features", "student_logits", "student_attn"), (
    "student_model", "teacher_features", "teacher_logits", "teacher_attn"), ("data_loader", "dataloader"))  # fmt: skip


def _split(given: Sequence[Any], named: dict[str, Any], more: Sequence[str]) -> tuple[Any, Any, Any, dict[str, Any]]:
    """First, second, loader, and what comes after, by position (tensors have no loader) or by any of their keywords."""
    values = list(given)
    found: list[Any] = []
    for aliases in MODELS:
        key = next((name for name in aliases if name in named), None)
        if key is not None:
            found.append(named.pop(key))
        elif len(found) == 2 and _tensors(found[0]):
            found.append(None)
        else:
            found.append(values.pop(0) if values else None)
    if named or len(values) > len(more) or found[0] is None or found[1] is None:
        known = [name for aliases in MODELS for name in aliases]
        wrong = f"no argument {next(iter(named))!r}" if named else f"{len(given)} arguments"
        raise UsageError(
            f"Two models and a loader, or two sets of tensors, are needed; there is {wrong}.", remedy=f"Known: {known}."
        )
    return found[0], found[1], found[2], dict(zip(more, values, strict=False))


def _tensors(value: Any) -> bool:
    items = list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else [value]
    return bool(items) and all(isinstance(item, Tensor) for item in items)


def _pairs(student: Any, teacher: Any) -> list[tuple[Tensor, Tensor]]:
    """The student's and the teacher's tensors, by name or by place. Raises `UsageError` where they do not belong together."""
    if isinstance(student, Mapping) and isinstance(teacher, Mapping):
        if student.keys() != teacher.keys():
            raise UsageError(f"The layers differ: {sorted(student.keys() ^ teacher.keys())}.", remedy="Name them alike.")
        return [(student[name], teacher[name]) for name in student]
    mine, other = ([x] if isinstance(x, Tensor) else list(x) for x in (student, teacher))
    if len(mine) != len(other):
        raise UsageError(f"There are {len(mine)} tensors of the student and {len(other)} of the teacher.")
    return list(zip(mine, other, strict=True))


def _mean(losses: Any) -> Tensor:
    return torch.stack(list(losses)).mean()


def _recipe_of(optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """What of `optimizer` the loop takes over. Raises `UsageError` for one that it cannot be."""
    if optimizer is None:
        return {}
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    first = groups[0]
    kind = {torch.optim.AdamW: "adamw", torch.optim.Adam: "adamw", torch.optim.SGD: "sgd"}.get(type(optimizer))
    coupled = type(optimizer) is torch.optim.Adam and first["weight_decay"]
    if kind is None or coupled or any(group != first for group in groups) or first.get("nesterov"):
        raise UsageError(
            f"The loop cannot train by this {type(optimizer).__name__}: it knows AdamW, Adam without weight decay and SGD, with "
            "the same settings for all parameters.",
            remedy="Leave the optimizer out and give config={'learning_rate': …, 'optimizer': 'adamw' or 'sgd'}.",
        )
    own = {"momentum": first["momentum"]} if kind == "sgd" else {}
    return own | {"optimizer": kind, "learning_rate": first["lr"], "weight_decay": first["weight_decay"]}


def _universal(model: Model) -> UniversalModel:
    return model if isinstance(model, UniversalModel) else load(model)


__all__ = ["Distilled", "ModelDistillationPlugin"]
