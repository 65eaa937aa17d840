"""The bits of each weight, weighed around the model that has the same bits everywhere, and measured before they are taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from layerwise.data import Data
from layerwise.lowbit.candidates import Choose, candidates
from layerwise.lowbit.effects import PROBES, Choices, effect_products
from layerwise.lowbit.mixing import Knapsack, cross_validated
from layerwise.model import UniversalModel
from layerwise.task import Fidelity

FOLDS = 4


@dataclass(frozen=True, eq=False)
class Around:
    """The bits to choose from, the bytes in all, `uniform` (model → its weights with the grid that all have at first), and the
    number of samples that roundings are corrected on, 0 for rounding to nearest.
    """

    menu: Sequence[int]
    limit: float
    uniform: Choose
    corrected_on: int = 0


def weighed_bits(
    model: UniversalModel, layers: Sequence[str], around: Around, data: Data
) -> tuple[dict[str, int], dict[str, float]]:
    """Weight → bits, and what was measured on `data`: the ``divergence`` of these bits and of ``uniform`` ones, what was
    ``foretold`` of their ratio on samples that a choice was not made on, and the ``runs`` (forwards, backwards) on `data`.

    Uniform bits are kept unless others are foretold and measured better.
    """
    references = [model.predict(batch) for batch in data]
    batches = data.head(around.corrected_on) if around.corrected_on else None
    stage, found = candidates(model, layers, around.uniform, around.menu, batches)
    start = {name: grid.bits for name, (_, grid) in around.uniform(model).items()}
    uniform = _measured(stage, found, start, data, references)
    told = {"divergence": uniform, "uniform": uniform, "foretold": 1.0, "runs": 3 + PROBES}
    for ratio, bits in _weighed(stage, found, around, data, start):
        divergence = _measured(stage, found, bits, data, references)
        told["runs"] += 1
        if divergence < uniform:
            return bits, told | {"divergence": divergence, "foretold": ratio}
    return start, told


def _weighed(
    stage: UniversalModel, found: Mapping[str, Choices], around: Around, data: Data, start: Mapping[str, int]
) -> list[tuple[float, dict[str, int]]]:
    """Choices that should be better than `start`, with the ratio to it, the best first."""
    for name, choices in found.items():  # halfway to the rounded weights the tangent tells what the whole way does
        choices.matrix.parameter.data = (choices.original + choices.packed[start[name]].dequantize()) / 2
    keys, products = effect_products(stage, found, data, min(FOLDS, sum(batch.size for batch in data)))
    if not keys or len(products) < 2:  # no weight is followed, or there is no sample to leave out
        return []
    sizes = np.array([_bytes(found[name], bits) for name, bits in keys])
    names = {name for name, _ in keys}
    others = sum(_bytes(choices, start[name]) for name, choices in found.items() if name not in names)
    uniform = np.array([i for i, (name, bits) in enumerate(keys) if bits == start[name]])
    ranked = cross_validated(Knapsack(keys, sizes, around.limit - others), uniform, products)
    return [(ratio, {**start, **dict(keys[i] for i in chosen)}) for ratio, chosen in ranked]


def _bytes(choices: Choices, bits: int) -> float:
    rows, columns = choices.matrix.rows.shape
    return float(choices.packed[bits].grid.stored_bytes(rows, columns))


def _measured(
    model: UniversalModel, found: Mapping[str, Choices], bits: Mapping[str, int], data: Data, references: Sequence[Tensor]
) -> float:
    """The mean divergence from `references` on `data` with each weight in its `bits`, in nats."""
    for name, choices in found.items():
        choices.matrix.parameter.data = choices.packed[bits[name]].dequantize()
    task = model.task if isinstance(model.task, Fidelity) else Fidelity()
    total, weight = 0.0, 0.0
    for batch, reference in zip(data, references, strict=True):
        loss, count = task.losses(model.predict(batch), batch.to(model.device), reference)
        total, weight = total + float(loss.sum()), weight + float(count.sum())
    return total / max(weight, 1.0)
