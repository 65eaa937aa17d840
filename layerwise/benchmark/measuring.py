"""Per-sample damages of each layer, and the quality with sets of layers skipped, each batch from one replay."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerwise.benchmark.hurting import WEIGHT_DAMAGES, Norms, hurt, rounded
from layerwise.coalitions import skipping_each
from layerwise.data import Batch, Data
from layerwise.model import UniversalModel
from layerwise.patching import Replacement
from layerwise.replay import Replay
from layerwise.structure import Layer
from layerwise.swapping import Values, swapped
from layerwise.task import Fidelity

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Samples:
    """Values (samples,) and weights (samples,) of one metric; the mean is Σ values / Σ weights."""

    values: np.ndarray
    weights: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.values.sum() / self.weights.sum())


def losses(model: UniversalModel, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The task's loss per sample: values and weights, (samples,) each, float64."""
    assert model.task is not None  # settled when the subject was opened
    values, weights = model.task.losses(output, batch, output)
    return values.reshape(len(values), -1).sum(1), weights.reshape(len(weights), -1).sum(1)


def divergences(output: Tensor, reference: Tensor, batch: Batch) -> Tensor:
    """KL(reference ‖ output) per sample, summed over positions, (samples,)."""
    values, _ = Fidelity().figures(output, batch, reference)["divergence"]
    return values.reshape(len(values), -1).sum(1)


class Damages:
    """Collects ``dce`` and ``kl`` per (damage, layer) over batches."""

    def __init__(self, model: UniversalModel, norms: Norms, damages: Collection[str]) -> None:
        self.model = model
        self.hurt = {(d, x.index): hurt(x, d, norms) for d in WEIGHT_DAMAGES if d in damages for x in model.layers}
        self.hurt = {key: values for key, values in self.hurt.items() if values}
        self.skips = [x for x in model.layers if x.skippable] if "skip" in damages else []
        self.found: dict[tuple[str, str, int], list[np.ndarray]] = {}
        self.weights: list[np.ndarray] = []

    def add(self, batch: Batch) -> None:
        """One batch: the whole model once, then each damage of each layer from that layer on."""
        replay = Replay(self.model, batch)
        before, weights = losses(self.model, replay.output, replay.batch)
        self.weights.append(weights.numpy())
        for layer in self.skips:
            self._note("skip", layer.index, replay, replay.skipping([layer]), before)
        for (damage, index), values in self.hurt.items():
            with swapped(values):
                output = replay.replacing({index: afresh(self.model.layers[index])})
            self._note(damage, index, replay, output, before)

    def _note(self, damage: str, layer: int, replay: Replay, output: Tensor, before: Tensor) -> None:
        after, _ = losses(self.model, output, replay.batch)
        kl = divergences(output, replay.output, replay.batch)
        self.found.setdefault((damage, "dce", layer), []).append((after - before).numpy())
        self.found.setdefault((damage, "kl", layer), []).append(kl.numpy())

    def result(self) -> dict[str, Any]:
        """``weights``, and ``damage/metric`` → layer name → values of every sample, as lists."""
        names = [x.name for x in self.model.layers]
        tables: dict[str, dict[str, list[float]]] = {}
        for (damage, metric, layer), parts in self.found.items():
            tables.setdefault(f"{damage}/{metric}", {})[names[layer]] = np.concatenate(parts).tolist()
        return {"weights": np.concatenate(self.weights).tolist(), "tables": tables}


def afresh(layer: Layer) -> Replacement:
    """The layer computes anew with the weights it has now, although nothing before it has changed."""
    forward = layer.module.forward  # bound before the replay exchanges it

    def again(cached: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return forward(*args, **kwargs)

    return again


def measure_damages(
    model: UniversalModel, data: Data, norms: Norms, damages: Collection[str], progress: Progress
) -> dict[str, Any]:
    """`Damages.result` over all of `data`."""
    collected = Damages(model, norms, damages)
    for done, batch in enumerate(data, start=1):
        collected.add(batch)
        progress(done, len(data))
    return collected.result()


def qualities(model: UniversalModel, data: Data, sets: Iterable[frozenset[int]]) -> dict[frozenset[int], float]:
    """Set of skipped layers (by index) → mean over samples of exp(−loss per unit of weight): 1 is certain and right."""
    wanted = set(sets)
    totals, count = dict.fromkeys(wanted, 0.0), 0
    for batch in data:
        replay = Replay(model, batch)
        for skipped, output in skipping_each(replay, wanted):
            values, weights = losses(model, output, replay.batch)
            totals[skipped] += float(torch.exp(-(values / weights.clamp_min(1e-12)).nan_to_num(700.0)).sum())
        count += batch.size
    return {skipped: total / count for skipped, total in totals.items()}


def greedy_order(model: UniversalModel, data: Data, progress: Progress) -> list[int]:
    """Skippable layers in the order in which leaving out one more costs the least quality on `data`."""
    left, order = [x.index for x in model.layers if x.skippable], list[int]()
    total = len(left)
    while left:
        found = qualities(model, data, [frozenset([*order, i]) for i in left])
        best = max(left, key=lambda i: (found[frozenset([*order, i])], -i))
        order.append(best)
        left.remove(best)
        progress(len(order), total)
    return order


def mean_loss(model: UniversalModel, data: Data) -> float:
    """The task's loss over all of `data`, nats."""
    total = weight = 0.0
    for batch in data:
        values, weights = losses(model, model.predict(batch), batch)
        total, weight = total + float(values.sum()), weight + float(weights.sum())
    return total / weight


def allocated(model: UniversalModel, bits: Sequence[int]) -> Values:
    """All layers' matrices and kernels, each layer rounded to its bits."""
    return [
        (p, rounded(p, b)) for layer, b in zip(model.layers, bits, strict=True) for p in layer.module.parameters() if p.dim() > 1
    ]


def means(table: Mapping[str, Sequence[float]], weights: Sequence[float]) -> dict[str, float]:
    """Layer → damage."""
    return {name: float(np.sum(values) / np.sum(weights)) for name, values in table.items()}
