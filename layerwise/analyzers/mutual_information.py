"""How much a layer's output says about the answer: usable information of a linear probe, Gaussian or neighbours' estimates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from layerwise.analyzer import ANALYZERS, ImportanceAnalyzer, Statistic
from layerwise.covariance import Covariance, jackknife
from layerwise.errors import UsageError, nearest
from layerwise.information import JointMoments, gaussian_information, log_ratio, mean_and_error
from layerwise.model import UniversalModel
from layerwise.neighbours import ksg, ksg_classes
from layerwise.scores import LayerScore, Status
from layerwise.statistics import UNREACHED

ESTIMATORS = ("linear", "gaussian", "ksg")
FOLDS = {"linear": 2, "gaussian": 10, "ksg": 2}
COMPONENTS = 5  # principal components that nearest neighbours are looked for in
FEW = "too few samples: "


@dataclass(frozen=True)
@ANALYZERS.register("mutual_information")
class MutualInformationAnalyzer(ImportanceAnalyzer):
    """I(Z; Y) in nats of a layer's pooled output Z and the answer Y, as far as a linear probe can use it (default).

    Z is the mean over positions without padding, in at most `dimensions` by a fixed random projection. Y is the label where
    labels are whole numbers, one per sample (and there are at most 64 classes); else the model's own output, pooled and projected
    to 8 dimensions: then the score says how far the layer already settles what the model will answer.

    Parameters
    ----------
    estimator
        ``linear`` (default): E[log q(y|z) − log q(y)] on samples that the probe q has not seen (two halves, each judged by the
        other's probe): linear discriminant analysis for classes, linear regression with Gaussian errors for vectors. A lower
        bound of I(Z; Y) but for sampling error, and below 0 where the probe does worse than knowing nothing. ``gaussian``:
        −½ Σ log(1 − canonical correlation²), in sample, biased upwards by about d·q/2n. ``ksg``: nearest neighbours among the
        first five principal components.
    relative
        ``none`` (default): what the output says; ``gain``: that minus what the input says.
    dimensions
        Most features, the rest is projected.
    points
        How many samples, chosen by a hash of their number, the probe is judged on and neighbours are looked for in.
    neighbours
        Of ``ksg``.

    Cost: one forward. Standard errors: over samples, paired for ``gain``; ``gaussian`` a jackknife over ten parts.

    References
    ----------
    Xu et al. (2020), "A theory of usable information under computational constraints"; Kraskov, Stögbauer, Grassberger (2004),
    "Estimating mutual information"; Ross (2014), "Mutual information between discrete and continuous data sets".
    """

    method: ClassVar[str] = "mutual_information"
    unit: ClassVar[str] = "nats"

    estimator: Literal["linear", "gaussian", "ksg"] = "linear"
    relative: Literal["none", "gain"] = "none"
    dimensions: int = 64
    points: int = 500
    neighbours: int = 3

    def __post_init__(self) -> None:
        for name, value, known in (("estimator", self.estimator, ESTIMATORS), ("relative", self.relative, ("none", "gain"))):
            if value not in known:
                raise UsageError(f"Unknown {name} {value!r} of mutual_information.", remedy=nearest(value, known))
        if min(self.dimensions, self.neighbours) < 1 or self.points < 2:
            raise UsageError("mutual_information needs at least 1 dimension, 1 neighbour and 2 points.")

    def statistic(self, model: UniversalModel) -> Statistic:
        return JointMoments(
            folds=FOLDS[self.estimator],
            dimensions=self.dimensions,
            points=0 if self.estimator == "gaussian" else self.points,
            views=2 if self.relative == "gain" else 1,
        )

    def score(self, model: UniversalModel, statistic: JointMoments) -> Mapping[str, LayerScore]:
        of = self._closed if self.estimator == "gaussian" else self._sampled
        return {
            x.name: of(statistic, x.index)
            if f"{x.index}.leaving" in statistic.covariances
            else LayerScore.missing(Status.NOT_APPLICABLE, UNREACHED)
            for x in model.layers
        }

    def _closed(self, statistic: JointMoments, layer: int) -> LayerScore:
        found = [statistic.covariances[f"{layer}.{view}"] for view in statistic.views]
        samples, width = float(found[0].count.sum()), max(c.mean.shape[1] for c in found)
        if samples <= width + 1:
            return LayerScore.missing(Status.NOT_APPLICABLE, f"{FEW}{samples:.0f} for {width} numbers of features and answer")

        def value(without: int) -> float:
            parts = [gaussian_information(c.total(without), c.mean.shape[1] - statistic.width) for c in found]
            return parts[0] - sum(parts[1:])

        return LayerScore.measured(value(-1), jackknife(value, [g for g in range(found[0].groups) if float(found[0].count[g])]))

    def _sampled(self, statistic: JointMoments, layer: int) -> LayerScore:
        parts = [self._values(statistic, f"{layer}.{view}") for view in statistic.views]
        values = parts[0] - sum(parts[1:])
        values = values[~values.isnan()]
        if not len(values):
            return LayerScore.missing(Status.NOT_APPLICABLE, f"{FEW}{statistic.samples}")
        return LayerScore.measured(*mean_and_error(values))

    def _values(self, statistic: JointMoments, key: str) -> Tensor:
        """One value per landmark, in the order of the hashes; NaN where there is none."""
        covariance, points = statistic.covariances[key], statistic.landmarks[key].rows().cpu()
        features = covariance.mean.shape[1] - statistic.width
        if self.estimator == "linear":
            return self._held_out(covariance, points, features, statistic.classes)
        if len(points) < 3:
            return torch.full((len(points),), torch.nan, dtype=torch.float64)
        z, y = components(covariance, points[:, :features]), points[:, features:-1]
        if statistic.classes:
            return ksg_classes(z, y.argmax(1), self.neighbours)
        spread = y.std(0)
        return ksg(z, y / torch.where(spread > 0, spread, 1.0), self.neighbours)

    def _held_out(self, covariance: Covariance, points: Tensor, features: int, classes: bool) -> Tensor:
        values = torch.full((len(points),), torch.nan, dtype=torch.float64)
        for fold in range(covariance.groups):
            train, mine = covariance.total(without=fold), points[:, -1] == fold
            if float(train[0]) >= 2 and bool(mine.any()):
                values[mine] = log_ratio(train, points[mine, :-1], features, classes=classes)
        return values


def components(covariance: Covariance, z: Tensor) -> Tensor:
    """`z` (n, d) in its first `COMPONENTS` principal components that vary, each of variance 1."""
    d = z.shape[1]
    count, mean, scatter = covariance.total()
    values, vectors = torch.linalg.eigh(scatter[:d, :d] / count)
    vary = values > 1e-12 * values[-1].clamp_min(1e-300)
    values, vectors = values[vary][-COMPONENTS:], vectors[:, vary][:, -COMPONENTS:]
    if not len(values):
        return torch.zeros(len(z), 1, dtype=z.dtype)
    return (z - mean[:d]) @ vectors / values.sqrt()
