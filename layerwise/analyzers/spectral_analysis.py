"""What the singular values of a layer's weight matrices say. No data, no passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from layerwise.analyzer import ANALYZERS
from layerwise.errors import UsageError, nearest
from layerwise.scores import LayerScore, Status
from layerwise.zeroshot import BLOCK, WeightAnalyzer, blocks, matrices, weighted_mean

MIN_EIGENVALUES = 50  # below, a fitted tail exponent means nothing
STAIRS = 4  # pieces of a Gram matrix: 5/8 of it are formed
BINS = 100  # of the histogram of log λ whose peak `alpha_peak` starts from


def eigenvalues(matrix: Tensor) -> Tensor:
    """Squared singular values, ascending, float64, from the smaller Gram matrix, which is summed over blocks.

    Against singular values this costs a third; what lies below about 1e-16 λ_max is noise, and the tail fits leave it out. Of
    the symmetric matrix the stairs down to its diagonal are enough; BLAS's own symmetric product would need buffers.
    """
    wide = matrix.detach() if matrix.shape[0] <= matrix.shape[1] else matrix.detach().T
    side = wide.shape[0]
    gram = torch.zeros(side, side, dtype=torch.float64, device=wide.device)
    stairs = range(0, side, math.ceil(side / STAIRS))
    for block in blocks(wide, dim=1):
        for top, end in zip(stairs, [*stairs[1:], side], strict=True):
            gram[top:end, :end].addmm_(block[top:end], block[:end].T)
    return torch.linalg.eigvalsh(gram, UPLO="L").clamp_min_(0)


def effective_rank(lam: Tensor) -> float:
    """exp(entropy of λ/Σλ) as a share of the largest possible rank: 1 for an orthogonal matrix, 1/d for rank one."""
    p = lam / lam.sum()
    p = p[p > 0]
    return math.exp(float(-(p * p.log()).sum())) / len(lam)


def stable_rank(lam: Tensor) -> float:
    """‖W‖²_F / σ₁²: d for an orthogonal matrix, 1 for rank one; does not depend on the scale."""
    return float(lam.sum() / lam[-1])


def log_spectral_norm(lam: Tensor) -> float:
    """log₁₀ λ_max."""
    return float(lam[-1].log10())


def mp_soft_rank(lam: Tensor, aspect: float) -> float:
    """λ⁺ / λ_max, with the Marchenko–Pastur edge λ⁺ = mean(λ) (1 + √q)² of a random matrix of the same size and variance.

    `aspect` is q = smaller side / larger side. 1 for a random matrix, less when eigenvalues stand out of the bulk.
    """
    return float(lam.mean() / lam[-1]) * (1 + math.sqrt(aspect)) ** 2


class PowerLaw(NamedTuple):
    """A fitted tail: density ~ λ^−alpha above `xmin`; `distance` is that of Kolmogorov and Smirnov, `tail` the values above."""

    alpha: float
    xmin: float
    distance: float
    tail: int


NO_FIT = PowerLaw(math.nan, math.nan, math.nan, 0)


def positive(lam: Tensor) -> Tensor:
    """The eigenvalues that are not rounding noise of the largest."""
    return lam[lam > lam[-1] * len(lam) * torch.finfo(lam.dtype).eps]


def power_law(lam: Tensor, low: float = 0.0, high: float = math.inf) -> PowerLaw:
    """Clauset's fit: α = 1 + n / Σ log(λ/xmin) by maximum likelihood, for the xmin whose fit has the smallest KS distance.

    Every eigenvalue but the last is tried as xmin, or those in `low` … `high`; all at once, in blocks.
    """
    x = positive(lam)
    if len(x) < MIN_EIGENVALUES:
        return NO_FIT
    logs = x.log()
    counts = torch.arange(len(x), 1, -1, dtype=x.dtype, device=x.device)
    excess = logs.flip(0).cumsum(0).flip(0)[:-1] - counts * logs[:-1]
    tried = ((x[:-1] >= low) & (x[:-1] <= high) & (excess > 0)).nonzero().flatten()
    if not len(tried):
        return NO_FIT
    slopes = counts / excess  # α − 1
    steps = tried.split(max(1, BLOCK // len(x)))
    distances = torch.cat([_distances(logs, slopes, counts, some) for some in steps])
    best = int(distances.argmin())
    i = int(tried[best])
    return PowerLaw(1 + float(slopes[i]), float(x[i]), float(distances[best]), len(x) - i)


def _distances(logs: Tensor, slopes: Tensor, counts: Tensor, tried: Tensor) -> Tensor:
    """max_j |F_fit(x_j) − F_empirical(x_j)| over j ≥ i for each candidate i, `tried` ascending.

    1 − F_fit is exp(−slope_i (log x_j − log x_i)) and 1 − F_empirical is 1 − (j − i)/count_i: both are products of a matrix of
    two columns and one of two rows, which saves most of the passes over candidates × places.
    """
    first = int(tried[0])
    place = torch.arange(first, len(logs), dtype=logs.dtype, device=logs.device)
    start, slope, count, one = tried.to(logs.dtype), slopes[tried], counts[tried], torch.ones_like(place)
    logs = logs - logs[-1]  # the smallest numbers where the slopes are the largest
    gap = torch.stack([-slope, slope * logs[tried]], 1) @ torch.stack([logs[first:], one])
    gap.exp_().addmm_(torch.stack([1 / count, -start / count - 1], 1), torch.stack([place, one]))
    return gap.masked_fill_(place < start[:, None], 0).abs_().amax(1)


def alpha(lam: Tensor) -> float:
    """−α of the power law with the xmin of the smallest KS distance: heavier tails (smaller α) count as more important."""
    return -power_law(lam).alpha


def alpha_peak(lam: Tensor) -> float:
    """−α with xmin sought only around the peak of the histogram of log λ, 0.95 … 1.5 of it (``xmin_peak``)."""
    x = positive(lam).log10()
    if len(x) < MIN_EIGENVALUES:
        return math.nan
    low, high = float(x[0]), float(x[-1])
    if low == high:
        return math.nan
    at = int(torch.histc(x.cpu(), BINS, low, high).argmax())
    peak = 10 ** (low + at * (high - low) / BINS)
    return -power_law(lam, 0.95 * peak, 1.5 * peak).alpha


def hill(lam: Tensor) -> float:
    """−α of the upper half of the spectrum by Hill's estimator, k = M/2 (``xmin_mid``)."""
    if len(lam) < MIN_EIGENVALUES:
        return math.nan
    k = len(lam) // 2
    threshold, tail = lam[-k - 1], lam[-k:]
    return -(1.0 + k / float((tail / threshold).log().sum())) if threshold > 0 else math.nan


def _without_aspect(measure: Callable[[Tensor], float]) -> Callable[[Tensor, float], float]:
    return lambda lam, aspect: measure(lam)


MEASURES: dict[str, Callable[[Tensor, float], float]] = {
    "effective_rank": _without_aspect(effective_rank),
    "stable_rank": _without_aspect(stable_rank),
    "log_spectral_norm": _without_aspect(log_spectral_norm),
    "mp_soft_rank": mp_soft_rank,
    "alpha": _without_aspect(alpha),
    "alpha_peak": _without_aspect(alpha_peak),
    "hill": _without_aspect(hill),
}
UNITS = {
    "effective_rank": "share of full rank", "stable_rank": "rank", "log_spectral_norm": "log₁₀ λ", "mp_soft_rank": "λ⁺ / λ_max",
    "alpha": "−α", "alpha_peak": "−α", "hill": "−α",
}  # fmt: skip


@dataclass(frozen=True)
@ANALYZERS.register("spectral_analysis")
class SpectralAnalyzer(WeightAnalyzer):
    """Mean over the layer's weight matrices, weighted by their size, of a function of the squared singular values λ.

    A convolution is the matrix (outputs, inputs × kernel), a fused query-key-value projection its three parts. No standard
    error: weights are no sample. Cost: min(m, n)² max(m, n) per matrix, no passes.

    Parameters
    ----------
    measure
        ``effective_rank``: share of the rank that is used, 0 … 1 (default); ``stable_rank``; ``log_spectral_norm``;
        ``mp_soft_rank``: the edge of a random matrix over λ_max; −α of the spectrum's tail, not defined for fewer than 50
        eigenvalues: ``alpha`` (xmin by KS distance), ``alpha_peak`` (xmin near the peak), ``hill`` (the upper half).

    References
    ----------
    Roy, Vetterli (2007), "The effective rank"; Clauset et al. (2009), "Power-law distributions in empirical data"; Martin,
    Mahoney (2021), "Implicit self-regularization in deep neural networks"; Lu et al. (2024), "AlphaPruning". We differ: the
    soft rank takes the variance of all weights, not one fitted to the bulk, so that for one shape it ranks as the stable rank;
    convolutions are not cut into a matrix for each kernel position; only eigenvalues that are rounding noise are left out of a
    fit, not those below a fixed number; AlphaPruning's code compares the lower end of its window for the peak with λ itself
    although it is a logarithm, so its window is open below, and ours is not.
    """

    method: ClassVar[str] = "spectral_analysis"
    unit: ClassVar[str] = "share of full rank"

    measure: Literal["effective_rank", "stable_rank", "log_spectral_norm", "mp_soft_rank", "alpha", "alpha_peak", "hill"] = (
        "effective_rank"
    )

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise UsageError(f"Unknown measure {self.measure!r} of spectral_analysis.", remedy=nearest(self.measure, MEASURES))

    def measured_in(self) -> str:
        return UNITS[self.measure]

    def summarize(self, tensor: Tensor, whole: bool = True) -> list[tuple[int, float | None]]:
        """(size, value) of each matrix; None as value for one of zeros, NaN where the measure is not defined."""
        return [(w.numel(), self._value(w)) for w in matrices(tensor, whole)]

    def _value(self, matrix: Tensor) -> float | None:
        lam = eigenvalues(matrix)
        return MEASURES[self.measure](lam, min(matrix.shape) / max(matrix.shape)) if float(lam[-1]) > 0 else None

    def combine(self, summaries: Sequence[list[tuple[int, float | None]]]) -> LayerScore:
        found = [part for summary in summaries for part in summary]
        measured = [(n, value) for n, value in found if value is not None]
        usable = [(n, value) for n, value in measured if math.isfinite(value)]
        if not found:
            return LayerScore.missing(Status.NOT_APPLICABLE, "has no weight matrix")
        if not measured:
            return LayerScore.measured(0.0)
        if not usable:
            return LayerScore.missing(
                Status.NOT_APPLICABLE, f"every matrix has fewer than {MIN_EIGENVALUES} singular values: too few for a tail"
            )
        return LayerScore.measured(weighted_mean(usable))
