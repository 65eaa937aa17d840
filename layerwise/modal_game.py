"""Modalities as players: what the model's answers are worth with some of them missing, and how the worths fit together.

The worth of a set of modalities is minus the loss, in nats per sample, of the model on the same held-out samples with the other
modalities missing (as `ModalityAdapter.masked` defines missing). Its differences are usable information (Xu et al. 2020): what
this model can make of a modality, not what is in it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise import games
from layerwise.data import Batch, Data
from layerwise.errors import UsageError, nearest
from layerwise.games import Coalition
from layerwise.model import UniversalModel
from layerwise.moments import Moments
from layerwise.progress import tracked

Pair = tuple[str, str]


@dataclass(frozen=True)
class Estimate:
    """A mean over samples and its standard error (NaN for a single sample)."""

    value: float
    stderr: float

    @classmethod
    def of(cls, values: Tensor, weights: Tensor) -> Estimate:
        """Σ values / Σ weights, each (samples,)."""
        moments = Moments(1)
        moments.add_(0, values, weights)
        found = moments.score(0)
        return cls(found.value, found.stderr)

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.stderr:.4f}"


@dataclass(frozen=True)
class ModalGame:
    """`worths`: which `modalities` are there (by position) → minus the summed loss of each sample; `weights` (samples,)."""

    modalities: tuple[str, ...]
    worths: Mapping[Coalition, Tensor]
    weights: Tensor

    @property
    def samples(self) -> int:
        return len(self.weights)

    def worth(self, present: Sequence[str]) -> Estimate:
        """Minus the mean loss with just these modalities, nats."""
        return self.estimate(self.worths[frozenset(self.modalities.index(name) for name in present)])

    def estimate(self, values: Tensor) -> Estimate:
        """The mean of a linear combination of worths."""
        return Estimate.of(values, self.weights)


@dataclass(frozen=True)
class InteractionStrength:
    """`shapley`: what each modality is worth on average over the order in which they come; `interactions`: what a pair is worth
    beyond the two alone. Nats per sample; above 0 a pair complements each other, below 0 one repeats the other.
    """

    shapley: Mapping[str, Estimate]
    interactions: Mapping[Pair, Estimate]


@dataclass(frozen=True)
class Complementarity:
    """How a pair's information about the answer splits, nats per sample; the four parts sum to what the pair is worth together.

    `bounds` are the least and the most redundancy that the three worths allow: the split in between is a convention.
    """

    redundancy: Estimate
    unique: Mapping[str, Estimate]
    synergy: Estimate
    bounds: tuple[float, float]


def players(model: UniversalModel, modalities: Sequence[str] | None) -> tuple[str, ...]:
    """The modalities that are played with. Raises `UsageError` for one that the model does not read, or fewer than two."""
    known = model.adapter.modalities
    chosen = tuple(known if modalities is None else modalities)
    for name in chosen:
        if name not in known:
            raise UsageError(f"{model.name} reads no {name!r}.", remedy=nearest(name, known))
    if len(chosen) < 2:
        raise UsageError(
            f"{model.name} reads {', '.join(chosen) or 'nothing'}: there is nothing to compare.",
            remedy="Give a model and data of several modalities.",
        )
    return chosen


def coalition_batches(model: UniversalModel, batch: Batch, chosen: Sequence[str]) -> Iterator[tuple[Coalition, Batch]]:
    """Every set of modalities, by position in `chosen`, with the batch in which the others are missing; all of them first."""
    for present in games.coalitions(len(chosen), len(chosen)):
        yield present, model.adapter.masked(batch, [name for i, name in enumerate(chosen) if i not in present])


def modal_game(model: UniversalModel, data: Data, modalities: Sequence[str] | None = None) -> ModalGame:
    """The worth of every set of modalities: 2^M forward passes over `data`, which should be held out.

    Without labels the loss is the divergence from the model's own answer with everything there. Raises `UsageError` as `players`.
    """
    chosen = players(model, modalities)
    found: dict[Coalition, list[Tensor]] = {}
    weights: list[Tensor] = []
    for raw in tracked(data, "leaving modalities out", total=len(data)):
        batch = raw.to(model.device)
        model.see(batch)
        assert model.task is not None  # set by see
        reference = model.predict(batch)
        for present, changed in coalition_batches(model, batch, chosen):
            # the labels and weights are those of the whole batch: a text that is missing must still be predicted
            values, counts = model.task.losses(model.predict(changed), batch, reference)
            found.setdefault(present, []).append(-values.double().cpu().reshape(len(values), -1).sum(1))
        weights.append(counts.double().cpu().reshape(len(counts), -1).sum(1))
    return ModalGame(chosen, {s: torch.cat(parts) for s, parts in found.items()}, torch.cat(weights))


def modal_interaction_strength(game: ModalGame) -> InteractionStrength:
    """Shapley values of the modalities and Shapley interaction indices of their pairs (Grabisch & Roubens 1999).

    For two modalities the interaction is v(ab) − v(a) − v(b) + v(∅), the term of second order of the functional ANOVA that is
    anchored where both are missing.
    """
    n = len(game.modalities)
    values = games.values(game.worths, n)
    pairs = games.interactions(game.worths, n)
    names = game.modalities
    return InteractionStrength(
        {name: game.estimate(values[i]) for i, name in enumerate(names)},
        {(names[a], names[b]): game.estimate(value) for (a, b), value in pairs.items()},
    )


def modal_complementarity(game: ModalGame) -> dict[Pair, Complementarity]:
    """Redundant, unique and synergistic information of every pair about the answer, the other modalities missing.

    With i(S) = log p(y | S) − log p(y | ∅) per sample, a sample's redundancy is the co-information c = i(a) + i(b) − i(ab) where
    i(a), i(b), i(ab) and c have one sign, and else 0 (Ince 2017, common change in surprisal; we take the model's own predictive
    distributions where Ince takes those of maximum entropy). The rest follows from what the three worths must sum to.
    """
    return {
        (game.modalities[a], game.modalities[b]): _split(game, a, b)
        for a, b in itertools.combinations(range(len(game.modalities)), 2)
    }


def _split(game: ModalGame, a: int, b: int) -> Complementarity:
    none = game.worths[frozenset()]
    one, two, both = (game.worths[frozenset(s)] - none for s in ({a}, {b}, {a, b}))
    common = one + two - both
    signs = torch.stack([one, two, both, common]).sign()
    redundancy = torch.where((signs == signs[0]).all(0), common, 0.0)
    first, second, together = (game.estimate(x).value for x in (one, two, both))
    return Complementarity(
        game.estimate(redundancy),
        {game.modalities[a]: game.estimate(one - redundancy), game.modalities[b]: game.estimate(two - redundancy)},
        game.estimate(both - one - two + redundancy),
        (max(0.0, first + second - together), max(0.0, min(first, second))),
    )


def missing_cost(game: ModalGame) -> dict[str, Estimate]:
    """What the loss rises by when one modality is missing and the others are there, nats per sample."""
    everyone = frozenset(range(len(game.modalities)))
    return {name: game.estimate(game.worths[everyone] - game.worths[everyone - {i}]) for i, name in enumerate(game.modalities)}


__all__ = [
    "Complementarity", "Estimate", "InteractionStrength", "ModalGame", "Pair", "coalition_batches", "missing_cost",
    "modal_complementarity", "modal_game", "modal_interaction_strength", "players",
]  # fmt: skip
