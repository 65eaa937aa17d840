"""The information plane: what a noisy copy of a layer's output says about the answer, minus what it keeps of the input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from layerwise.analyzer import ANALYZERS, ImportanceAnalyzer, Statistic
from layerwise.covariance import Covariance, jackknife
from layerwise.errors import UsageError
from layerwise.information import JointMoments, gaussian_information, noise_information
from layerwise.model import UniversalModel
from layerwise.scores import LayerScore, Status
from layerwise.statistics import UNREACHED

FOLDS = 10  # parts of the data, for the jackknife


@dataclass(frozen=True)
@ANALYZERS.register("information_bottleneck")
class InfoBottleneckAnalyzer(ImportanceAnalyzer):
    """I(Z; Y) − β I(X; Z) in nats, Z the layer's pooled output with Gaussian noise: a description, not a measure of damage.

    Z = z + N(0, σ²s²), with s² the mean variance of the layer's features. Without noise I(X; Z) of a deterministic net is
    infinite or says nothing. Both terms are the Gaussian ones of the streamed moments: I(X; Z) ≤ ½ log det(I + C/σ²s²), and
    I(Z; Y) = −½ Σ log(1 − canonical correlation²). The value moves with σ, so compare layers at one σ only. Features and Y as for
    mutual_information: pooled without padding, projected, the label or else the model's own output.

    Parameters
    ----------
    beta
        β, the price of a nat about the input; at 1 or above every layer is below 0, by the data processing inequality.
    sigma
        σ relative to the layer's spread.
    dimensions
        Most features, the rest is projected.

    In sample: with few samples I(Z; Y) is too high by about (features × answer) / 2n. Cost: one forward. Standard errors: a
    jackknife over ten parts of the data.

    References
    ----------
    Tishby, Pereira, Bialek (1999), "The information bottleneck method"; Chechik et al. (2005), "Information bottleneck for
    Gaussian variables"; Saxe et al. (2018), "On the information bottleneck theory of deep learning" (compression as an artefact).
    """

    method: ClassVar[str] = "information_bottleneck"
    unit: ClassVar[str] = "nats"

    beta: float = 0.1
    sigma: float = 0.5
    dimensions: int = 64

    def __post_init__(self) -> None:
        if not self.beta >= 0 or not self.sigma > 0 or self.dimensions < 1:
            raise UsageError("information_bottleneck needs beta of at least 0, sigma above 0 and at least 1 dimension.")

    def statistic(self, model: UniversalModel) -> Statistic:
        return JointMoments(folds=FOLDS, dimensions=self.dimensions)

    def score(self, model: UniversalModel, statistic: JointMoments) -> Mapping[str, LayerScore]:
        return {x.name: self._of(statistic, x.index) for x in model.layers}

    def _of(self, statistic: JointMoments, layer: int) -> LayerScore:
        covariance = statistic.covariances.get(f"{layer}.leaving")
        if covariance is None:
            return LayerScore.missing(Status.NOT_APPLICABLE, UNREACHED)

        def value(without: int) -> float:
            about_answer, about_input = self.plane(covariance, statistic.width, without)
            return about_answer - self.beta * about_input

        return LayerScore.measured(value(-1), jackknife(value, [g for g in range(FOLDS) if float(covariance.count[g])]))

    def plane(self, covariance: Covariance, answer: int, without: int = -1) -> tuple[float, float]:
        """(I(Z; Y), I(X; Z)) in nats, of all parts of the data but one; `answer` dimensions are the answer's."""
        moments = covariance.total(without)
        features = covariance.mean.shape[1] - answer
        variance = float(moments[2].diagonal()[:features].mean() / moments[0].clamp_min(1))
        noise = self.sigma**2 * (variance or 1.0)
        return gaussian_information(moments, features, noise), noise_information(moments, features, noise)
