"""Shapley values of layers: the damage of leaving everything out, divided fairly among the layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from layerwise import games
from layerwise.analyzer import ANALYZERS, ImportanceAnalyzer, Statistic, unskippable
from layerwise.coalitions import skipping_each
from layerwise.errors import UsageError, nearest
from layerwise.model import UniversalModel
from layerwise.moments import Moments
from layerwise.replay import Replay
from layerwise.scores import LayerScore
from layerwise.statistics import MomentsStatistic

ESTIMATORS = ("auto", "exact", "permutation")
EXACT = 2**12  # coalitions up to which `auto` values them all


class _GameStatistic(MomentsStatistic):
    """Per sample: every player's index. `players` are the layers that can be skipped; the others are always active."""

    intervenes: ClassVar[bool] = True

    def __init__(self, model: UniversalModel) -> None:
        super().__init__(Moments(len(model.layers)))
        self.players = [x.index for x in model.layers if x.skippable]

    def worths(self, replay: Replay, coalitions: list[games.Coalition]) -> tuple[dict[games.Coalition, Tensor], Tensor]:
        """Coalition → −loss of each sample with only its players active; and the samples' weights."""
        everyone = frozenset(self.players)
        absent = {everyone - {self.players[p] for p in s}: s for s in coalitions}
        found: dict[games.Coalition, Tensor] = {}
        assert replay.model.task is not None  # settled before the first batch
        weights = torch.empty(0)
        for skipped, output in skipping_each(replay, absent):
            losses, weights = replay.model.task.losses(output, replay.batch, replay.output)
            found[absent[skipped]] = -losses.reshape(len(losses), -1).sum(1).double()
        return found, weights.reshape(len(weights), -1).sum(1)

    def add(self, values: Tensor, weights: Tensor) -> None:
        """`values` (players, samples)."""
        for layer, row in zip(self.players, values, strict=True):
            self.moments.add_(layer, row, weights)


class ExactValues(_GameStatistic):
    """From all coalitions that lack at most `missing` players."""

    def __init__(self, model: UniversalModel, index: str, missing: int) -> None:
        super().__init__(model)
        self.index, self.missing = index, missing

    def probe(self, replay: Replay) -> None:
        count = len(self.players)
        if not count:
            return
        game, weights = self.worths(replay, games.coalitions(count, self.missing))
        self.add(games.values(game, count, self.index, self.missing), weights)

    def errors(self, layer: int) -> tuple[float, float]:
        """The standard error over samples, and 0 because nothing else is drawn."""
        return self.moments.score(layer).stderr, 0.0


class SampledValues(_GameStatistic):
    """From antithetic pairs of orders, the same for every batch; `pairs` (pairs, layers) sums each pair's estimate."""

    def __init__(self, model: UniversalModel, pairs: int, seed: int) -> None:
        super().__init__(model)
        self.orders = games.antithetic_orders(len(self.players), pairs, seed)
        self.pairs = torch.zeros(pairs, len(model.layers), dtype=torch.float64)

    def probe(self, replay: Replay) -> None:
        if not self.players:
            return
        wanted = {s for pair in self.orders for order in pair for s in games.coalitions_along(order)}
        game, weights = self.worths(replay, list(wanted))
        estimates = games.sampled_values(game, self.orders)
        self.add(estimates.mean(0), weights)
        pairs = self.pairs.to(estimates.device, copy=True)
        pairs[:, self.players] += estimates.sum(2)
        self.pairs = pairs

    def errors(self, layer: int) -> tuple[float, float]:
        """The standard errors over samples (the orders as given) and over pairs of orders (the samples as given)."""
        spread = float(self.pairs[:, layer].std()) / math.sqrt(len(self.pairs))
        return self.moments.score(layer).stderr, spread / float(self.moments.sums[1, layer])

    def merge_(self, other: Any) -> None:
        super().merge_(other)
        self.pairs = self.pairs + other.pairs.to(self.pairs.device)

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"pairs": self.pairs}

    def load_(self, state: Mapping[str, Tensor]) -> None:
        super().load_(state)
        self.pairs = state["pairs"]


@dataclass(frozen=True)
@ANALYZERS.register("shap_analysis")
class SHAPAnalyzer(ImportanceAnalyzer):
    """The Shapley value of each layer in the game v(S) = −mean loss with only the layers of S active, in nats.

    The other layers are skipped; a layer that cannot be skipped is always active and has no score. The values of all layers sum
    to the loss with every layer skipped minus the loss with none. *Exact* values cost 2^L − 1 block calls per batch (4,095 for
    12 layers), a forward's embeddings and head for each of the 2^L coalitions, and have the standard error over samples.
    *Sampled* ones come from random orders, each with its reverse, the same for every batch; their standard error is the root of
    the squared errors over samples and over pairs of orders.

    Most coalitions are broken networks, far from anything that would be deployed, and the Shapley value weighs them too:
    `truncate` keeps to coalitions that lack few layers.

    Parameters
    ----------
    estimator
        ``auto``: exact up to 4,096 coalitions (12 layers), else ``permutation``; ``exact``; ``permutation``.
    permutations
        How many orders are sampled, an even number of at least 4.
    seed
        Draws the orders.
    index
        ``shapley``: every size of coalition counts the same; ``banzhaf``: every coalition does (exact only).
    truncate
        Only coalitions that lack at most this many layers (exact only); 1 is `layer_ablation`. The values then no longer sum to
        v(all) − v(none).

    References
    ----------
    Shapley (1953), "A value for n-person games"; Castro, Gómez, Tejada (2009), "Polynomial calculation of the Shapley value based
    on sampling"; Mitchell, Cooper, Frank, Holmes (2022), "Sampling permutations for Shapley value estimation" (reversed orders).
    Attributions to the units of a layer (DeepLIFT, GradientSHAP) are another object.
    """

    method: ClassVar[str] = "shap_analysis"
    unit: ClassVar[str] = "nats"
    sees: ClassVar[frozenset[str]] = frozenset({"dead", "vital"})

    estimator: Literal["auto", "exact", "permutation"] = "auto"
    permutations: int = 32
    seed: int = 0
    index: Literal["shapley", "banzhaf"] = "shapley"
    truncate: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("estimator", ESTIMATORS), ("index", games.INDICES)):
            if getattr(self, name) not in known:
                raise UsageError(
                    f"Unknown {name} {getattr(self, name)!r} of shap_analysis.", remedy=nearest(getattr(self, name), known)
                )
        if self.permutations < 4 or self.permutations % 2:
            raise UsageError(
                f"shap_analysis samples pairs of orders and cannot take permutations={self.permutations}.",
                remedy="Give an even number of at least 4.",
            )
        if self.truncate is not None and self.truncate < 1:
            raise UsageError(f"truncate={self.truncate} leaves no coalition to compare.", remedy="Give at least 1, or None.")
        if self.estimator == "permutation" and self._exact_only():
            raise UsageError(
                "Sampled orders estimate the whole game's Shapley value only.",
                remedy="Leave out index and truncate, or set estimator='exact'.",
            )

    def statistic(self, model: UniversalModel) -> Statistic:
        count = sum(x.skippable for x in model.layers)
        missing = count if self.truncate is None else min(self.truncate, count)
        many = games.coalition_count(count, missing)
        if self.estimator == "exact" or (self.estimator == "auto" and many <= EXACT):
            return ExactValues(model, self.index, missing)
        if self._exact_only():
            raise UsageError(
                f"{many:,} coalitions of {count} layers are more than the {EXACT:,} that shap_analysis values by itself.",
                remedy="Set a smaller truncate, or estimator='exact' to pay for them all.",
            )
        return SampledValues(model, self.permutations // 2, self.seed)

    def _exact_only(self) -> bool:
        return self.index != "shapley" or self.truncate is not None

    def score(self, model: UniversalModel, statistic: ExactValues | SampledValues) -> Mapping[str, LayerScore]:
        scores = statistic.scores(model.layers, missing={layer.name: unskippable(layer) for layer in model.layers})
        for layer in model.layers:
            if math.isfinite(scores[layer.name].value):
                error = math.hypot(*statistic.errors(layer.index))
                scores[layer.name] = LayerScore.measured(scores[layer.name].value, error)
        return scores
