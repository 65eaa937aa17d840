"""`ModelPruningPlugin`: pruning by the names under which it is asked for, thin over the compression methods.

Nothing is changed in place: each method gives a `Pruned` with a new model, the plan that made it, and what was left alone.
Amounts are shares of all weights, so that pruning again to the same amount changes nothing and stages do not compound.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import nn

from layerwise.data import Data
from layerwise.errors import UsageError, nearest
from layerwise.loading import load
from layerwise.measure import evaluate
from layerwise.method import METHODS, apply_plan, step_of, untreated
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan, Step
from layerwise.supplies import NOTHING, Supplies
from layerwise.zeros import PruningStatistics, pruning_statistics

Model = UniversalModel | nn.Module | str
RECIPE = ("epochs", "learning_rate", "optimizer", "momentum", "weight_decay", "schedule", "warm_up", "clip", "seed")
SINGLE = {"magnitude": "magnitude_pruning", "taylor": "taylor_pruning", "wanda": "wanda"}


@dataclass(frozen=True)
class Stage:
    """One stage of `prune_model`: the share of zeros aimed at, that reached, and the metrics on the validation data."""

    target: float
    sparsity: float
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Pruned:
    """A new model, the steps that made it of the given one, and what inside its layers was left alone, in words.

    `history` is there where stages were judged; `stopped` says why it ended before the target.
    """

    model: UniversalModel
    plan: CompressionPlan
    remarks: tuple[str, ...] = ()
    history: tuple[Stage, ...] = ()
    stopped: str = ""

    @property
    def statistics(self) -> PruningStatistics:
        return pruning_statistics(self.model)


@dataclass(frozen=True)
class ModelPruningPlugin:
    """Prunes models. `config` holds the recipe of trainings by the names of `TrainingSettings`."""

    prune_ratio: float = 0.3
    prune_type: str = "magnitude"
    config: Mapping[str, Any] = field(default_factory=dict)
    name: ClassVar[str] = "model_pruning"
    priority: ClassVar[int] = 350
    kind: ClassVar[str] = "training"

    def magnitude_pruning(
        self,
        model: Model,
        prune_ratio: float | None = None,
        granularity: str = "local",
        *,
        sparsity: float | None = None,
        norm: int = 1,
        per_layer: Mapping[str, float] | None = None,
        example: Any = None,
    ) -> Pruned:
        """Smallest |w| to zero: of each tensor (`granularity` ``local``), of all together (``global``), or whole rows (``row``)
        by their L1 or L2 norm (`norm`). `per_layer` gives single layers another share.
        """
        known = {"local": ("local", "weight"), "global": ("global", "weight"), "row": ("local", "row")}
        if granularity not in known:
            raise UsageError(f"Unknown granularity {granularity!r}.", remedy=nearest(granularity, known))
        scope, unit = known[granularity]
        settings = {"scope": scope, "granularity": unit, "norm": norm, "amounts": dict(per_layer or {})}
        return self._pruned(model, "magnitude_pruning", {"amount": self._amount(prune_ratio, sparsity)} | settings, example)

    def taylor_pruning(
        self,
        model: Model,
        data_loader: Any,
        prune_ratio: float | None = None,
        *,
        sparsity: float | None = None,
        scope: str = "global",
    ) -> Pruned:
        """The weights to zero whose |w · ∂L/∂w| on `data_loader` is smallest."""
        supplies = Supplies(calibration=Data.of(data_loader))
        amount = self._amount(prune_ratio, sparsity)
        return self._pruned(model, "taylor_pruning", {"amount": amount, "scope": scope}, data_loader, supplies)

    def structured_pruning(
        self,
        model: Model,
        prune_ratio: float | None = None,
        prune_type: str = "all",
        *,
        data: Any = None,
        engine: str = "layerwise",
    ) -> Pruned:
        """Takes whole units out of every layer, so that the model really shrinks: ``neuron``, ``channel``, ``head``, ``filter``,
        ``all``. `engine` ``torch_pruning`` cuts channels and filters by Torch-Pruning's graph and L2 norm.

        `data` is read for the shape of the input, where the model does not say it.
        """
        ratio = self._amount(prune_ratio, None)
        if engine == "torch_pruning" and prune_type in ("channel", "filter"):
            return self._pruned(model, "channel_pruning", {"amount": ratio}, data)
        if engine != "layerwise":
            raise UsageError(f"{engine!r} takes out no {prune_type}s.", remedy="Use engine='layerwise'.")
        return self._pruned(model, "structured_pruning", {"ratio": ratio, "prune_type": prune_type}, data)

    def lottery_ticket_pruning(
        self, model: Model, train_data: Any = None, iterations: int = 3, prune_rate: float = 0.2, **recipe: Any
    ) -> Pruned:
        """`iterations` times: train, prune the share `prune_rate` of what is left, rewind; ``early_epochs`` is a setting too."""
        if train_data is None or isinstance(train_data, int):
            raise UsageError(
                "A lottery ticket is found by training.", remedy="Give lottery_ticket_pruning(model, train_data, iterations)."
            )
        settings = {"rounds": iterations, "rate": prune_rate} | self._recipe(recipe, ("early_epochs",))
        return self._pruned(model, "lottery_ticket", settings, train_data, Supplies(training=Data.of(train_data)))

    def fine_tune_after_pruning(
        self, pruned_model: Model | Pruned, train_data: Any, val_data: Any = None, epochs: int | None = None, **recipe: Any
    ) -> Pruned:
        """Trains a copy with its zeros kept. With `val_data` the best epoch's weights are kept, and ``patience`` epochs without a
        better one (2 unless it says otherwise) end it.

        In the place of `val_data` an optimizer may stand, whose kind, learning rate, momentum and weight decay are taken over.
        """
        optimizer = val_data if isinstance(val_data, torch.optim.Optimizer) else None
        validation = None if optimizer is not None or val_data is None else Data.of(val_data)
        given = {"patience": 2} | _recipe_of(optimizer) | recipe | ({} if epochs is None else {"epochs": epochs})
        supplies = Supplies(training=Data.of(train_data), validation=validation)
        model = pruned_model.model if isinstance(pruned_model, Pruned) else pruned_model
        settings = self._recipe(given, ("patience", "monitor", "keep_best"))
        return self._pruned(model, "fine_tune", settings, train_data, supplies)

    def prune_model(
        self,
        model: Model,
        train_data: Any,
        val_data: Any,
        target_sparsity: float | None = None,
        method: str | None = None,
        *,
        stages: int = 3,
        largest_drop: float = 1.0,
        **recipe: Any,
    ) -> Pruned:
        """Prunes to `target_sparsity` by `method` (``magnitude``, ``taylor``, ``wanda``) in `stages` along the cubic schedule,
        each followed by a fine-tuning with kept zeros and judged on `val_data`.

        Stops before the stage after which the task's quality would be worse by more than the share `largest_drop`, and gives the
        one before. ``progressive`` prunes within one training and ``lottery`` by rewinding; both are one stage.
        """
        amount, method = self._amount(target_sparsity, None), method or self.prune_type
        if method not in (*SINGLE, "progressive", "lottery"):
            raise UsageError(f"Unknown pruning {method!r}.", remedy=nearest(method, [*SINGLE, "progressive", "lottery"]))
        supplies = Supplies(calibration=Data.of(train_data), training=Data.of(train_data), validation=Data.of(val_data))
        original = _universal(model, supplies.training)
        return _staged(original, list(self._stages(method, amount, original, stages, recipe)), supplies, largest_drop)

    def _stages(
        self, method: str, amount: float, model: UniversalModel, stages: int, recipe: Mapping[str, Any]
    ) -> Iterator[tuple[float, list[Step]]]:
        """Each stage's share of zeros and its steps."""
        if method in SINGLE:
            tuning = step_named(
                "fine_tune", model, self._recipe({"patience": 2} | dict(recipe), ("patience", "monitor", "keep_best"))
            )
            for share in cubic(amount, stages):
                yield share, [step_named(SINGLE[method], model, {"amount": share}), tuning]
        elif method == "progressive":
            yield amount, [step_named("progressive_pruning", model, {"amount": amount} | self._recipe(recipe, ()))]
        else:
            rounds: dict[str, Any] = {"rounds": 3, "rate": 1 - (1 - amount) ** (1 / 3)}
            yield amount, [step_named("lottery_ticket", model, rounds | self._recipe(recipe, ("early_epochs",)))]

    def get_pruning_statistics(self, model: Model | Pruned, *, example: Any = None, compressed: bool = True) -> PruningStatistics:
        """``["sparsity"]``, parameters, zeros and bytes of the model and of each layer, and what zlib makes of the bytes."""
        found = model.model if isinstance(model, Pruned) else _universal(model, None if example is None else Data.of(example))
        return pruning_statistics(found, compressed=compressed)

    def _amount(self, ratio: float | None, sparsity: float | None) -> float:
        return next((value for value in (ratio, sparsity) if value is not None), self.prune_ratio)

    def _recipe(self, given: Mapping[str, Any], more: Sequence[str]) -> dict[str, Any]:
        """Raises `UsageError` with the nearest name for a setting that does not exist."""
        found = {k: v for k, v in self.config.items() if k in (*RECIPE, *more)} | dict(given)
        for key in [*found, *self.config]:
            if key not in (*RECIPE, *more, *self.config):
                raise UsageError(f"Training has no setting {key!r}.", remedy=nearest(key, [*RECIPE, *more]))
        return found

    def _pruned(
        self, model: Model, method: str, settings: Mapping[str, Any], data: Any = None, supplies: Supplies = NOTHING
    ) -> Pruned:
        original = _universal(model, None if data is None else Data.of(data))
        applied = apply_plan(original, CompressionPlan((step_named(method, original, settings),)), supplies)
        return Pruned(applied.model, applied.plan, applied.remarks)


def step_named(method: str, model: UniversalModel, settings: Mapping[str, Any]) -> Step:
    """The step on every layer that the method treats. Raises `UsageError` with the reasons where it treats none."""
    made = METHODS[method](**settings)
    names = [layer.name for layer in model.layers]
    refused = untreated(made, model, names)
    if len(refused) == len(names):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:3])
        raise UsageError(f"{method} treats no layer of {model.name}: {reasons}.")
    return step_of(made, [name for name in names if name not in refused])


def cubic(amount: float, stages: int) -> list[float]:
    """The shares of zeros after each stage: ``amount · (1 − (1 − i/stages)³)``, the last of them exactly `amount`."""
    if stages < 1:
        raise UsageError(f"Pruning in {stages} stages is none at all.", remedy="Use at least 1.")
    return [amount * (1 - (1 - i / stages) ** 3) for i in range(1, stages)] + [amount]


def _staged(model: UniversalModel, stages: Sequence[tuple[float, list[Step]]], supplies: Supplies, largest_drop: float) -> Pruned:
    """Carries out the stages, judging each; stops before the first that costs more than it may."""
    validation = supplies.validation
    assert validation is not None
    supplies = replace(supplies, teacher=model)
    stage, steps, remarks = model, list[Step](), list[str]()
    history = [_judged(model, 0.0, validation, model)]
    for target, parts in stages:
        applied = apply_plan(stage, CompressionPlan(tuple(parts)), supplies)
        history.append(_judged(applied.model, target, validation, model))
        if dropped(model, history[0].metrics, history[-1].metrics) > largest_drop:
            why = f"at a sparsity of {target:.3g} the quality would fall by more than {largest_drop:.3g} of what it was"
            return Pruned(stage, CompressionPlan(tuple(steps)), tuple(remarks), tuple(history), why)
        stage, steps = applied.model, [*steps, *applied.plan.steps]
        remarks += [r for r in applied.remarks if r not in remarks]
    return Pruned(stage, CompressionPlan(tuple(steps)), tuple(remarks), tuple(history))


def _judged(model: UniversalModel, target: float, data: Data, reference: UniversalModel) -> Stage:
    return Stage(target, pruning_statistics(model).total.sparsity, evaluate(model, data, reference=reference).means())


def dropped(model: UniversalModel, before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """By which share of what it was the task's quality is worse; of a quality that was 0 by how much."""
    assert model.task is not None  # settled by the first evaluation
    worse = before[model.task.quality] - after[model.task.quality]
    return (worse if model.task.higher_is_better else -worse) / (abs(before[model.task.quality]) or 1.0)


def _recipe_of(optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """What of `optimizer` the training loop takes over; its state is not used. Raises `UsageError` for another kind."""
    if optimizer is None:
        return {}
    kind = {torch.optim.AdamW: "adamw", torch.optim.SGD: "sgd"}.get(type(optimizer))
    first = optimizer.param_groups[0]
    if kind is None or first.get("nesterov"):
        raise UsageError(
            f"The training loop is no {type(optimizer).__name__}: it knows AdamW and SGD.",
            remedy="Give epochs=…, learning_rate=…, optimizer='adamw' or 'sgd' instead.",
        )
    own = {"momentum": first["momentum"]} if kind == "sgd" else {}
    return own | {"optimizer": kind, "learning_rate": first["lr"], "weight_decay": first["weight_decay"]}


def _universal(model: Model, data: Data | None) -> UniversalModel:
    """The model with its example and task settled by the data, where it was handed in as a plain module."""
    found = model if isinstance(model, UniversalModel) else load(model)
    if data is not None:
        found.see(data[0].to(found.device))
    return found


__all__ = ["ModelPruningPlugin", "Pruned", "Stage", "cubic", "step_named"]
