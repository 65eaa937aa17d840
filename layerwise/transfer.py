"""What the scores of some models say about another that was not measured: by relative depth, kind and size, with an uncertainty.

A kernel regression over the layers of the known models. Far from all of them it falls back to ½ with the spread of a uniform
rank, so that an estimate without evidence cannot pass for one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from layerwise.consensus import UNIT
from layerwise.ranks import shares
from layerwise.scores import LayerScore, Scores
from layerwise.stacking import Placed

WIDTHS = (0.05, 0.1, 0.2, 0.4)  # of the kernel over relative depth; what is chosen is what predicts left-out layers best
SIZE_WIDTHS = (0.5, 2.0, 8.0)  # over log parameters relative to the model's median layer
OTHER_KIND = 0.25  # what a layer of another kind counts
IGNORANCE = 1.0 / 12.0  # variance of a uniform rank share


@dataclass(frozen=True)
class Places:
    """Layers as coordinates: which model, relative depth 0 … 1, log of the size relative to the model's median, kind."""

    model: np.ndarray
    depth: np.ndarray
    size: np.ndarray
    kind: np.ndarray

    def similarity(self, other: Places, width: float, size_width: float) -> np.ndarray:
        """Kernel weights of every layer here (rows) with every layer of `other` (columns), 0 … 1."""
        apart = ((self.depth[:, None] - other.depth[None]) / width) ** 2
        apart += ((self.size[:, None] - other.size[None]) / size_width) ** 2
        return np.exp(-apart / 2) * np.where(self.kind[:, None] == other.kind[None], 1.0, OTHER_KIND)


@dataclass(frozen=True)
class Kernel:
    """The known layers with their shares, the widths that predict left-out layers best, and the variance of that prediction."""

    places: Places
    shares: np.ndarray
    width: float
    size_width: float
    spread: float

    def estimate(self, places: Places) -> tuple[np.ndarray, np.ndarray]:
        """Share of layers ranked below and its standard error, for each of `places`."""
        return _estimated(places.similarity(self.places, self.width, self.size_width), self.shares, self.spread)


def fit_kernel(sources: Sequence[tuple[Sequence[Placed], Scores]]) -> Kernel:
    """From (layers, scores) of one or more models; layers without a score are left out.

    Widths and spread come from predicting left-out layers: of whole left-out models where there are several, else of single
    layers, which cannot show how much models differ.
    """
    parts = [(_places(layers, i), _shares(layers, scores)) for i, (layers, scores) in enumerate(sources)]
    columns = [np.concatenate([getattr(p, key) for p, _ in parts]) for key in ("model", "depth", "size", "kind")]
    known = np.concatenate([s for _, s in parts])
    used = np.isfinite(known)
    places, known = Places(*(c[used] for c in columns)), known[used]
    errors = {widths: _left_out(places, known, *widths) for widths in itertools.product(WIDTHS, SIZE_WIDTHS)}
    best = min(errors, key=lambda widths: errors[widths])
    return Kernel(places, known, *best, errors[best])


def transferred(kernel: Kernel, layers: Sequence[Placed]) -> Scores:
    """The estimate for the model with these `layers`, as scores with standard errors."""
    values, errors = kernel.estimate(_places(layers, -1))
    entries = {x.name: LayerScore(float(v), float(e)) for x, v, e in zip(layers, values, errors, strict=True)}
    settings = {"width": kernel.width, "size_width": kernel.size_width, "spread": kernel.spread, "estimated": True}
    return Scores("transfer", UNIT, entries, settings=settings)


def _places(layers: Sequence[Placed], model: int) -> Places:
    size = np.log(np.array([max(x.parameters, 1) for x in layers], dtype=float))
    depth = np.array([x.index for x in layers], dtype=float) / max(len(layers) - 1, 1)
    return Places(np.full(len(layers), model), depth, size - np.median(size), np.array([x.kind for x in layers]))


def _shares(layers: Sequence[Placed], scores: Scores) -> np.ndarray:
    usable = scores.usable()
    return shares(np.array([usable.get(x.name, math.nan) for x in layers]))


def _estimated(similarity: np.ndarray, known: np.ndarray, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Weighted means drawn towards ½ where nothing similar is known, with the same mixture of the two variances."""
    near = similarity.max(axis=1)  # 1: the same place is known; 0: nothing like it
    total = np.maximum(similarity.sum(axis=1), 1e-300)
    mean = similarity @ known / total
    effective = total**2 / np.maximum((similarity**2).sum(axis=1), 1e-300)
    variance = near * spread * (1 + 1 / np.maximum(effective, 1)) + (1 - near) * (IGNORANCE + near * (mean - 0.5) ** 2)
    return near * mean + (1 - near) * 0.5, np.sqrt(variance)


def _left_out(places: Places, known: np.ndarray, width: float, size_width: float) -> float:
    """Mean squared error of predicting each model from the others, or each layer from the others of the only model."""
    similarity = places.similarity(places, width, size_width)
    several = len(set(places.model)) > 1
    same = places.model[:, None] == places.model[None] if several else np.eye(len(known), dtype=bool)
    guesses, _ = _estimated(np.where(same, 0.0, similarity), known, 0.0)
    return float(((guesses - known) ** 2).mean()) if len(known) > 1 else IGNORANCE
