"""What a layer's output says about an answer: joint moments of pooled features and answers, and a few samples as points.

The answer y is the label where labels are whole numbers, one per sample; otherwise the model's own output, pooled over positions.
Features and answers wider than their limit go through a fixed seeded projection with orthonormal rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from layerwise.analyzer import Signal, Statistic
from layerwise.covariance import Covariance, Triple
from layerwise.features import by_group, pooled
from layerwise.landmarks import Landmarks
from layerwise.sweep import Seen
from layerwise.task import classes_last, output_mask

CLASSES = 64  # at most, for labels to be classes
ANSWERS = 8  # dimensions of an answer that is the model's output
VIEWS = ("leaving", "entering")


class JointMoments(Statistic):
    """(layer, view) → `Covariance` of [features, answer] in `folds` parts, and `points` `Landmarks` of these rows."""

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.ACTIVATIONS})

    def __init__(self, *, folds: int, dimensions: int, points: int = 0, views: int = 1) -> None:
        self.folds, self.dimensions, self.points, self.views = folds, dimensions, points, VIEWS[:views]
        self.covariances: dict[str, Covariance] = {}
        self.landmarks: dict[str, Landmarks] = {}
        self.seen = torch.zeros(1, dtype=torch.float64)
        self.kind = torch.zeros(2, dtype=torch.int64)  # width of the answer, and whether it is a class

    def observe(self, seen: Seen) -> None:
        self.seen = self.seen + seen.batch.size
        answer, classes = answers(seen)
        self.kind = torch.tensor([answer.shape[1], int(classes)])
        parts = by_group(seen.ids, self.folds, seed=1)
        for layer in seen.layers:
            if not seen.complete(layer):
                continue
            for view in self.views:
                stream = (seen.leaving if view == "leaving" else seen.entering)[layer.index]
                assert stream is not None  # complete
                features = projected(pooled(seen.batch, layer, stream), self.dimensions)
                self._add(f"{layer.index}.{view}", torch.cat([features, answer], 1), parts, seen.ids)

    def _add(self, key: str, rows: Tensor, parts: list[Tensor], ids: Tensor) -> None:
        covariance = self.covariances.setdefault(key, Covariance(self.folds))
        fold = torch.zeros(len(rows), 1, dtype=rows.dtype)
        for g, chosen in enumerate(parts):
            fold[chosen] = g
            if len(chosen):
                covariance.add_(g, rows[chosen.to(rows.device)])
        if self.points:
            points = torch.cat([rows, fold.to(rows.device)], 1)
            self.landmarks.setdefault(key, Landmarks(self.points)).add_(ids, points)

    def merge_(self, other: JointMoments) -> None:
        self.seen = self.seen + other.seen
        self.kind = torch.maximum(self.kind.cpu(), other.kind.cpu())
        for key, covariance in other.covariances.items():
            self.covariances.setdefault(key, Covariance(self.folds)).merge_(covariance)
        for key, landmarks in other.landmarks.items():
            self.landmarks.setdefault(key, Landmarks(self.points)).merge_(landmarks)

    def state(self) -> dict[str, Tensor]:
        found = {"seen": self.seen, "kind": self.kind}
        for name, kept in (("sums", self.covariances), ("points", self.landmarks)):
            for key, value in kept.items():
                found |= {f"{name}.{key}.{part}": tensor for part, tensor in value.state().items()}
        return found

    def load_(self, state: Mapping[str, Tensor]) -> None:
        self.seen, self.kind = state["seen"], state["kind"]
        groups: dict[tuple[str, str], dict[str, Tensor]] = {}
        for name in sorted(set(state) - {"seen", "kind"}):
            kind, layer, view, part = name.split(".")
            groups.setdefault((kind, f"{layer}.{view}"), {})[part] = state[name]
        self.covariances, self.landmarks = {}, {}
        for (kind, key), tensors in groups.items():
            into: Covariance | Landmarks
            if kind == "sums":
                into = self.covariances[key] = Covariance(self.folds)
            else:
                into = self.landmarks[key] = Landmarks(self.points)
            into.load_(tensors)

    @property
    def samples(self) -> int:
        return int(self.seen)

    @property
    def width(self) -> int:
        """Dimensions of the answer."""
        return int(self.kind[0])

    @property
    def classes(self) -> bool:
        """Whether the answer is a class, one-hot."""
        return bool(self.kind[1])


def answers(seen: Seen) -> tuple[Tensor, bool]:
    """(samples, q) float64 and whether it is one-hot classes: the labels, else the model's own output."""
    labels, output = seen.batch.labels, seen.output
    assert output is not None
    whole = isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point()
    if whole and output.dim() == 2 and output.shape[1] <= CLASSES:
        classes = torch.arange(output.shape[1], device=output.device)
        return (labels.to(output.device)[:, None] == classes).double(), True
    weights = output_mask(seen.batch, output).to(output.device)
    y = classes_last(output.detach().double()).reshape(*weights.shape, -1)
    mean = torch.einsum("npd,np->nd", y, weights) / weights.sum(1, keepdim=True).clamp_min(1)
    return projected(mean, ANSWERS), False


def projected(x: Tensor, dimensions: int) -> Tensor:
    """`x` (n, d) in at most `dimensions`, by a matrix with orthonormal rows that depends on d alone."""
    d = x.shape[1]
    if d <= dimensions:
        return x
    noise = torch.randn(d, dimensions, dtype=torch.float64, generator=torch.Generator().manual_seed(d))
    return x @ torch.linalg.qr(noise)[0].to(x.device)


def gaussian_information(moments: Triple, features: int, noise: float = 0.0) -> float:
    """½ log(det S_yy / det S_y|z) in nats, with Gaussian noise of variance `noise` on z: −½ Σ log(1 − canonical correlation²).

    A ridge of 1e-9 of the variances keeps it finite where an answer is a function of others.
    """
    count, _, scatter = moments
    s = scatter / count.clamp_min(1)
    zz, zy, yy = s[:features, :features], s[:features, features:], s[features:, features:]
    zz = zz + (noise + 1e-9 * _variance(zz)) * torch.eye(features, dtype=s.dtype)
    left = yy - zy.T @ torch.linalg.solve(zz, zy)
    ridge = 1e-9 * _variance(yy) * torch.eye(len(yy), dtype=s.dtype)
    return max(0.5 * float(torch.logdet(yy + ridge) - torch.logdet(_symmetric(left) + ridge)), 0.0)


def noise_information(moments: Triple, features: int, noise: float) -> float:
    """½ log det(I + C / noise) in nats: the most that z + N(0, noise) can carry about what z is a function of."""
    c = moments[2][:features, :features] / moments[0].clamp_min(1)
    return 0.5 * float(torch.linalg.eigvalsh(c).clamp_min(0).div(noise).log1p().sum())


def _symmetric(matrix: Tensor) -> Tensor:
    """Without the asymmetry and the negative eigenvalues of rounding."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return vectors * values.clamp_min(0) @ vectors.T


def _variance(matrix: Tensor) -> float:
    """The mean variance; 1 where nothing varies, so that a ridge remains."""
    return float(matrix.diagonal().mean()) or 1.0


def log_ratio(train: Triple, rows: Tensor, features: int, *, classes: bool) -> Tensor:
    """log q(y|z) − log q(y) of held-out `rows` [z, y] in nats, with q a linear probe from the `train` moments.

    Classes: linear discriminant analysis. Vectors: linear regression with Gaussian errors. Covariances are shrunk by d/(n + d)
    towards a ball (features) and towards knowing nothing (errors), so that few samples make the probe timid, not wild.
    """
    probe = _discriminant if classes else _regression
    return probe(train, rows[:, :features], rows[:, features:], features)


def _ridged(zz: Tensor, total: Tensor, count: float) -> tuple[Tensor, float]:
    d = len(zz)
    alpha = d / (count + d)
    return (1 - alpha) * zz + (alpha + 1e-9) * _variance(total) * torch.eye(d, dtype=zz.dtype), alpha


def _discriminant(train: Triple, z: Tensor, y: Tensor, d: int) -> Tensor:
    count, mean, scatter = float(train[0]), train[1], train[2]
    prior = (mean[d:] * count + 1) / (count + y.shape[1])  # one sample more of each class: none is impossible
    sizes = (mean[d:] * count).clamp_min(1e-300)
    shift = scatter[:d, d:] / sizes * (mean[d:] > 0)  # class mean − mean, (d, classes)
    within = scatter[:d, :d] - (shift * sizes) @ shift.T
    shared, _ = _ridged(within / count, scatter[:d, :d] / count, count)
    weights = torch.linalg.solve(shared, shift)
    score = (z - mean[:d]) @ weights - (shift * weights).sum(0) / 2 + prior.log()
    return ((score.log_softmax(1) - prior.log()) * y).sum(1)


def _regression(train: Triple, z: Tensor, y: Tensor, d: int) -> Tensor:
    count, mean, s = float(train[0]), train[1], train[2] / train[0].clamp_min(1)
    zz, zy, yy = s[:d, :d], s[:d, d:], s[d:, d:]
    ridged, alpha = _ridged(zz, zz, count)
    weights = torch.linalg.solve(ridged, zy)
    errors = _symmetric(yy - zy.T @ weights - weights.T @ zy + weights.T @ zz @ weights)
    floor = 1e-9 * _variance(yy) * torch.eye(len(yy), dtype=s.dtype)
    away = y - mean[d:]
    return _log_density(away - (z - mean[:d]) @ weights, (1 - alpha) * errors + alpha * yy + floor) - _log_density(
        away, yy + floor
    )


def _log_density(x: Tensor, covariance: Tensor) -> Tensor:
    """Of N(0, covariance), without the constant."""
    factor = torch.linalg.cholesky(covariance)
    white = torch.linalg.solve_triangular(factor, x.T, upper=False)
    return -0.5 * white.square().sum(0) - factor.diagonal().log().sum()


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean and its standard error; NaN for a single value."""
    n = len(values)
    return float(values.mean()), float(values.std()) / math.sqrt(n) if n > 1 else math.nan
