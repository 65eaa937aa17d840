"""What a layer's units do: how much they add to the stream, how often they are silent, how many directions they use."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from layerwise.analyzer import ANALYZERS, ImportanceAnalyzer, Signal, Statistic, unskippable
from layerwise.covariance import Covariance, Triple, jackknife
from layerwise.errors import UsageError, nearest
from layerwise.features import by_group, observations
from layerwise.model import UniversalModel
from layerwise.moments import Moments
from layerwise.scores import LayerScore, Status
from layerwise.statistics import UNREACHED, MomentsStatistic
from layerwise.sweep import Seen
from layerwise.unit_moments import joined_units, unit_moments

GROUPS = 10  # parts of the data, for the jackknife
SCATTERS = 4  # the same where each part costs a matrix
WIDEST = 1024  # units of which a scatter matrix is kept

Measure = Literal[
    "contribution", "magnitude", "variance", "activity", "alive", "kurtosis", "peak", "outliers", "effective_rank",
    "participation_ratio",
]  # fmt: skip


class Contribution(MomentsStatistic):
    """Per sample: Σ over positions of ‖what the layer adds‖², weighted by Σ ‖what enters‖²."""

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.ACTIVATIONS})

    def __init__(self, layers: int) -> None:
        super().__init__(Moments(layers))

    def observe(self, seen: Seen) -> None:
        for layer in seen.layers:
            entering, branch = seen.entering[layer.index], seen.branch(layer)
            if entering is None or branch is None or not layer.skippable or not seen.complete(layer):
                continue
            added, weights = observations(seen.batch, layer, branch)
            stream, _ = observations(seen.batch, layer, entering)
            self.moments.add_(layer.index, _energy(added, weights), _energy(stream, weights))

    def ratio(self, layer: int) -> LayerScore:
        """√(Σ ‖added‖² / Σ ‖entering‖²); the standard error of the root is that of the ratio over twice the root."""
        if not float(self.moments.sums[0, layer]):
            return LayerScore.missing(Status.NOT_APPLICABLE, UNREACHED)
        score = self.moments.score(layer)
        root = math.sqrt(score.value) if score.value >= 0 else math.nan
        return LayerScore.measured(root, score.stderr / (2 * root) if root else math.nan)


def _energy(x: Tensor, weights: Tensor) -> Tensor:
    return (x.square().sum(-1) * weights).sum(1)


class GroupStatistic(Statistic):
    """What each layer adds to its stream, in parts of the data; layers appear in the state once they were seen."""

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.ACTIVATIONS})
    groups: ClassVar[int] = GROUPS

    def __init__(self) -> None:
        self.seen = torch.zeros(1, dtype=torch.float64)

    def observe(self, seen: Seen) -> None:
        self.seen = self.seen + seen.batch.size
        parts = by_group(seen.ids, self.groups, seed=0)
        for layer in seen.layers:
            branch = seen.branch(layer)
            if branch is not None and seen.complete(layer):
                self.add_(layer.index, *observations(seen.batch, layer, branch), parts)

    @abstractmethod
    def add_(self, layer: int, x: Tensor, weights: Tensor, parts: list[Tensor]) -> None:
        """Takes (samples, positions, units) apart by `parts`."""

    @property
    def samples(self) -> int:
        return int(self.seen)


class UnitSums(GroupStatistic):
    """layer → (groups, 8, units)."""

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.sums: dict[int, Tensor] = {}

    def add_(self, layer: int, x: Tensor, weights: Tensor, parts: list[Tensor]) -> None:
        new = x.new_zeros(GROUPS, 8, x.shape[-1])
        for g, chosen in enumerate(parts):
            if len(chosen):
                at = chosen.to(x.device)
                new[g] = unit_moments(x[at].flatten(0, 1), weights[at].flatten(), self.epsilon)
        self._join(layer, new)

    def _join(self, layer: int, new: Tensor) -> None:
        self.sums[layer] = joined_units(self.sums[layer].to(new.device), new) if layer in self.sums else new

    def merge_(self, other: UnitSums) -> None:
        self.seen = self.seen + other.seen
        for layer, sums in other.sums.items():
            self._join(layer, sums)

    def state(self) -> dict[str, Tensor]:
        return {"seen": self.seen} | {str(layer): sums for layer, sums in self.sums.items()}

    def load_(self, state: Mapping[str, Tensor]) -> None:
        self.seen = state["seen"]
        self.sums = {int(key): sums for key, sums in state.items() if key != "seen"}

    def total(self, layer: int, without: int = -1) -> Tensor:
        """(8, units) of all parts but one."""
        parts = self.sums[layer].cpu()
        whole = torch.zeros_like(parts[0])
        for g in range(GROUPS):
            if g != without:
                whole = joined_units(whole, parts[g])
        return whole

    def parts(self, layer: int) -> list[int]:
        """The parts in which something was seen."""
        return [g for g in range(GROUPS) if float(self.sums[layer][g, 0].max()) > 0]


class UnitScatter(GroupStatistic):
    """layer → `Covariance` of its units; a layer of more than `WIDEST` is only remembered as too wide."""

    groups: ClassVar[int] = SCATTERS

    def __init__(self) -> None:
        super().__init__()
        self.covariances: dict[int, Covariance] = {}
        self.wide: dict[int, Tensor] = {}

    def add_(self, layer: int, x: Tensor, weights: Tensor, parts: list[Tensor]) -> None:
        if x.shape[-1] > WIDEST:
            self.wide[layer] = torch.tensor([x.shape[-1]])
            return
        covariance = self.covariances.setdefault(layer, Covariance(SCATTERS))
        for g, chosen in enumerate(parts):
            if len(chosen):
                at = chosen.to(x.device)
                covariance.add_(g, x[at].flatten(0, 1), weights[at].flatten())

    def merge_(self, other: UnitScatter) -> None:
        self.seen = self.seen + other.seen
        self.wide = self.wide | other.wide
        for layer, covariance in other.covariances.items():
            self.covariances.setdefault(layer, Covariance(SCATTERS)).merge_(covariance)

    def state(self) -> dict[str, Tensor]:
        sums = {f"{layer}.{key}": t for layer, c in self.covariances.items() for key, t in c.state().items()}
        return {"seen": self.seen} | sums | {f"{layer}.wide": width for layer, width in self.wide.items()}

    def load_(self, state: Mapping[str, Tensor]) -> None:
        self.seen = state["seen"]
        self.wide = {int(key.split(".")[0]): t for key, t in state.items() if key.endswith(".wide")}
        self.covariances = {}
        for layer in sorted({int(key.split(".")[0]) for key in state if key.endswith(".mean")}):
            self.covariances[layer] = Covariance(SCATTERS)
            self.covariances[layer].load_({k: state[f"{layer}.{k}"] for k in ("count", "mean", "scatter")})

    def score(self, layer: int, measure: Callable[[Tensor], float]) -> LayerScore:
        """`measure` of the eigenvalues of the covariance."""
        if layer in self.wide:
            units = int(self.wide[layer])
            return LayerScore.missing(Status.NOT_APPLICABLE, f"{units} units: a scatter matrix is kept of {WIDEST} at most")
        if layer not in self.covariances:
            return LayerScore.missing(Status.NOT_APPLICABLE, UNREACHED)
        covariance = self.covariances[layer]
        parts = [g for g in range(SCATTERS) if float(covariance.count[g])]

        def value(without: int) -> float:
            return measure(eigenvalues(covariance.total(without)))

        return LayerScore.measured(value(-1), jackknife(value, parts))


def eigenvalues(moments: Triple) -> Tensor:
    """Of the covariance matrix, without the negative ones that rounding makes."""
    return torch.linalg.eigvalsh(moments[2] / moments[0].clamp_min(1)).clamp_min(0)


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of λ/Σλ; 0 where nothing varies."""
    total = values.sum()
    return float(torch.special.entr(values / total).sum().exp()) if float(total) > 0 else 0.0


def participation_ratio(values: Tensor) -> float:
    """(Σλ)² / Σλ²; 0 where nothing varies."""
    values = values / values.max().clamp_min(1e-300)  # else the squares of a faint layer underflow
    return float(values.sum() ** 2 / values.square().sum().clamp_min(1e-300))


def _kurtosis(sums: Tensor, spread: float) -> float:
    varies = sums[2] > 0
    excess = sums[0] * sums[4] / sums[2].square().clamp_min(1e-300) - 3
    return float(excess[varies].mean()) if bool(varies.any()) else math.nan


def _outliers(sums: Tensor, spread: float) -> float:
    rms = (sums[2] / sums[0] + sums[1].square()).sqrt()
    return float((rms > spread * rms.mean()).double().mean())


UNIT_MEASURES: dict[str, Callable[[Tensor, float], float]] = {
    "magnitude": lambda s, _: float((s[5] / s[0]).mean()),
    "variance": lambda s, _: float((s[2] / s[0]).mean()),
    "activity": lambda s, _: 1.0 - float((s[6] / s[0]).mean()),
    "alive": lambda s, _: float((s[6] < s[0]).double().mean()),
    "kurtosis": _kurtosis,
    "peak": lambda s, _: float(s[7].max()),
    "outliers": _outliers,
}
RANKS = {"effective_rank": effective_rank, "participation_ratio": participation_ratio}
UNITS = {
    "contribution": "share of the stream", "magnitude": "activation", "variance": "activation²", "peak": "activation",
    "activity": "share of activations", "alive": "share of units", "outliers": "share of units", "kurtosis": "excess kurtosis",
    "effective_rank": "dimensions", "participation_ratio": "dimensions",
}  # fmt: skip


@dataclass(frozen=True)
@ANALYZERS.register("neuron_activation")
class NeuronActivationAnalyzer(ImportanceAnalyzer):
    """What a layer adds to its stream, by its units: root mean square relative to what enters (default).

    Units are features of tokens or vectors and channels of maps; padding is left out. One forward. Of a layer that changes the
    stream's shape, what leaves is taken.

    Parameters
    ----------
    measure
        ``contribution``: √(Σ‖added‖² / Σ‖entering‖²), for layers that keep the shape (default); ``magnitude``: mean |a|;
        ``variance``: mean over units; ``activity``: 1 − P(|a| < `epsilon`); ``alive``: share of units that reach `epsilon` at
        least once; ``kurtosis``: mean excess kurtosis of the units that vary; ``peak``: the largest |a|; ``outliers``: share of
        units whose root mean square is above `outlier` × their mean; ``effective_rank``: exp H(λ/Σλ) and
        ``participation_ratio``: (tr C)²/tr C² of the units' covariance, for at most 1024 units.
    epsilon
        Below it an activation counts as silent. GELU and SiLU are never exactly 0.
    outlier
        How far above the mean a unit is an outlier.

    Standard errors: over samples for ``contribution`` (ratio estimator, delta method), else a jackknife over ten parts of the
    data (four for the ranks); none (NaN) for ``peak``, an extreme.

    References
    ----------
    Yin et al. (2024), "Outlier weighed layerwise sparsity" (there |weight| × ‖input‖ per weight; here the units' activations
    alone); Roy, Vetterli (2007), "The effective rank"; Pébay (2008), "Formulas for robust, one-pass parallel computation of
    covariances and arbitrary-order statistical moments".
    """

    method: ClassVar[str] = "neuron_activation"
    unit: ClassVar[str] = UNITS["contribution"]
    sees: ClassVar[frozenset[str]] = frozenset({"dead", "vital"})

    measure: Measure = "contribution"
    epsilon: float = 1e-6
    outlier: float = 5.0

    def __post_init__(self) -> None:
        if self.measure not in UNITS:
            raise UsageError(f"Unknown measure {self.measure!r} of neuron_activation.", remedy=nearest(self.measure, UNITS))
        if not self.epsilon > 0 or not self.outlier > 0:
            raise UsageError(f"epsilon {self.epsilon} and outlier {self.outlier} of neuron_activation must be above 0.")

    def measured_in(self) -> str:
        return UNITS[self.measure]

    def statistic(self, model: UniversalModel) -> Statistic:
        if self.measure == "contribution":
            return Contribution(len(model.layers))
        return UnitScatter() if self.measure in RANKS else UnitSums(self.epsilon)

    def score(self, model: UniversalModel, statistic: Contribution | UnitScatter | UnitSums) -> Mapping[str, LayerScore]:
        if isinstance(statistic, UnitScatter):
            return {x.name: statistic.score(x.index, RANKS[self.measure]) for x in model.layers}
        if isinstance(statistic, UnitSums):
            return {x.name: self._of_units(statistic, x.index) for x in model.layers}
        reasons = {x.name: unskippable(x) for x in model.layers}
        return {
            x.name: LayerScore.missing(Status.NOT_APPLICABLE, f"{reasons[x.name]} (magnitude has a value)")
            if reasons[x.name]
            else statistic.ratio(x.index)
            for x in model.layers
        }

    def _of_units(self, statistic: UnitSums, layer: int) -> LayerScore:
        if layer not in statistic.sums:
            return LayerScore.missing(Status.NOT_APPLICABLE, UNREACHED)

        def value(without: int) -> float:
            return UNIT_MEASURES[self.measure](statistic.total(layer, without), self.outlier)

        parts = [] if self.measure == "peak" else statistic.parts(layer)
        return LayerScore.measured(value(-1), jackknife(value, parts))
