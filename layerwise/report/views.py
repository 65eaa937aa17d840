"""What each chart shows, as plain values: worked out once, drawn twice (plotly for the screen, SVG for paper and files)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from layerwise.importance import Agreement, ImportanceReport
from layerwise.plan import CompressionPlan, Step
from layerwise.report import formats
from layerwise.scores import LayerScore, Scores, Status
from layerwise.target import QUALITIES

CONSENSUS = "consensus"
DRAWN_PAIRS = 40  # more rows than this cannot be read; the table has them all
RESAMPLES = 400
MOST_ROWS = 120  # layers of one granularity that the page shows: blocks of the deepest models, not every channel


@dataclass(frozen=True)
class Cell:
    """One method's word on one layer. `share` is the share of scored layers ranked below (1: most important, NaN: no score).

    `place` is the rank as it is written, with ``=`` where several layers share it; their `share` is that of the middle one.
    """

    entry: LayerScore
    unit: str
    rank: int | None
    of: int
    share: float
    place: str = ""


@dataclass(frozen=True)
class Heatmap:
    """Layers × methods; `rows` follow `layers`, cells follow `methods` (the last is the consensus where several vote)."""

    layers: tuple[str, ...]
    methods: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    hidden: int = 0  # layers that neither end of the ranking holds

    @property
    def has_consensus(self) -> bool:
        return self.methods[-1:] == (CONSENSUS,)


@dataclass(frozen=True)
class Concord:
    """How far the methods agree. `median` (`low`, `high`) is the median rho over the pairs of voting methods (NaN: no pair)."""

    pairs: tuple[Agreement, ...]
    drawn: tuple[Agreement, ...]
    methods: tuple[str, ...]
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Point:
    """A model in the size-quality plane. `state` is before, chosen, feasible or infeasible."""

    state: str
    size: float
    quality: float
    steps: str


@dataclass(frozen=True)
class Pareto:
    """What the planner measured; the limits are NaN where nothing was asked. `unplaced` candidates lack one of the figures."""

    metric: str
    points: tuple[Point, ...]
    size_limit: float
    quality_limit: float
    unplaced: int

    def front(self) -> list[Point]:
        """The points that no other beats in both size and quality, by size."""
        best: list[Point] = []
        sign = -1.0 if self.metric in formats.LOWER_IS_BETTER else 1.0
        for point in sorted(self.points, key=lambda p: (p.size, -sign * p.quality)):
            if not best or sign * point.quality > sign * best[-1].quality:
                best.append(point)
        return best


def heatmap(report: ImportanceReport) -> Heatmap:
    """Every layer against every method, with the consensus last where at least two methods vote."""
    columns = dict(report.scores)
    if len(report.voters()) > 1 and CONSENSUS not in columns:
        columns[CONSENSUS] = report.consensus()
    layers = _shown(report)
    cells = [_cells(report, scores, layers) for scores in columns.values()]
    rows = tuple(zip(*cells, strict=True)) if cells else ((),) * len(layers)
    return Heatmap(layers, tuple(columns), rows, len(report.layers) - len(layers))


def _shown(report: ImportanceReport) -> tuple[str, ...]:
    """The layers in order; of a granularity with more than `MOST_ROWS` the most and the least important ones."""
    names: list[str] = []
    for part in map(report.at, report.granularities):
        layers = [layer.name for layer in part.layers]
        if len(layers) > MOST_ROWS:
            ranked = list(part.consensus().ranks()) or layers
            ends = {*ranked[: MOST_ROWS // 2], *ranked[-MOST_ROWS // 2 :]}
            layers = [name for name in layers if name in ends]
        names += layers
    return tuple(names)


def _cells(report: ImportanceReport, scores: Scores, layers: Iterable[str]) -> list[Cell]:
    ranks = report.ranks(scores)
    granularity = {layer.name: layer.granularity for layer in report.layers}
    sharing = Counter((granularity[n], rank) for n, (rank, _) in ranks.items())
    lost = LayerScore.missing(Status.FAILED, "the method returned nothing for this layer")
    cells = []
    for name in layers:
        entry = scores.entries.get(name, lost)
        if name not in ranks:
            cells.append(Cell(entry, scores.unit, None, 0, math.nan))
            continue
        rank, of = ranks[name]
        tied = sharing[granularity[name], rank]
        share = 1 - (rank - 1 + (tied - 1) / 2) / max(of - 1, 1)
        cells.append(Cell(entry, scores.unit, rank, of, share, formats.place(rank, tied)))
    return cells


def concord(report: ImportanceReport) -> Concord:
    """Agreement of each pair, least first, and the median over voting methods with a bootstrap interval over layers."""
    report = report.coarsest()
    pairs = sorted(report.agreement(), key=lambda p: (math.isnan(p.rho), p.rho))
    voting = report.voters()
    finite = [p for p in pairs if math.isfinite(p.rho) and p.first in voting and p.second in voting]
    median, low, high = _median(pd.DataFrame({name: dict(s) for name, s in voting.items()}), report.seed)
    return Concord(tuple(pairs), tuple(finite[:DRAWN_PAIRS]), tuple(report.scores), median, low, high)


def _median(scores: pd.DataFrame, seed: int) -> tuple[float, float, float]:
    """Median Spearman rho over pairs of columns, with a 95 % percentile bootstrap interval over rows."""
    upper = np.triu_indices(scores.shape[1], k=1)

    def over_pairs(frame: pd.DataFrame) -> float:
        with np.errstate(invalid="ignore"):  # a constant column has no correlation: NaN, left out below
            rhos = frame.corr(method="spearman", min_periods=3).to_numpy()[upper]
        finite = rhos[np.isfinite(rhos)]
        return float(np.median(finite)) if len(finite) else math.nan

    median = over_pairs(scores)
    if not math.isfinite(median):
        return math.nan, math.nan, math.nan
    picks = np.random.default_rng(seed).integers(0, len(scores), size=(RESAMPLES, len(scores)))
    draws = [m for p in picks if math.isfinite(m := over_pairs(scores.iloc[p]))]
    low, high = np.percentile(draws, [2.5, 97.5]) if draws else (math.nan, math.nan)
    return median, float(low), float(high)


def pareto(plan: CompressionPlan) -> Pareto | None:
    """The planner's candidates in size and the first quality of the targets; None where nothing can be placed."""
    metric = quality_of(plan)
    if metric is None:
        return None
    points = [_point("before", plan.before, metric, "")]
    same = [c for c in plan.candidates if c.steps == plan.steps]
    for candidate in plan.candidates:
        state = "chosen" if candidate in same else "feasible" if candidate.feasible else "infeasible"
        points.append(_point(state, candidate.figures, metric, steps_in_words(candidate.steps)))
    if not same and plan.steps:
        points.append(_point("chosen", plan.predicted, metric, steps_in_words(plan.steps)))
    placed = tuple(p for p in points if math.isfinite(p.size) and math.isfinite(p.quality))
    if len(placed) < 2:
        return None
    limits = {t.metric: t.limit(plan.before.get(t.metric, math.nan)) for t in plan.targets}
    lost = sum(p not in placed for p in points if p.state != "before")
    return Pareto(metric, placed, limits.get("size", math.nan), limits.get(metric, math.nan), lost)


def quality_of(plan: CompressionPlan) -> str | None:
    """The quality the plan was made for, or the first one that the candidates' figures know."""
    asked = [t.metric for t in plan.targets if not t.is_cost]
    known = [m for m in QUALITIES if any(m in c.figures for c in plan.candidates) or m in plan.predicted]
    return next(iter([*asked, *known]), None)


def steps_in_words(steps: Iterable[Step]) -> str:
    """``drop_layers: h.3, h.4; quantize_int8: 12``: what is done to what, on one line."""
    return "; ".join(f"{formats.label(s.method)}: {_few(s.layers)}" for s in steps)


def _few(layers: tuple[str, ...], shown: int = 3) -> str:
    names = ", ".join(formats.label(name, 40) for name in layers[:shown])
    return names if len(layers) <= shown else f"{names}, … ({len(layers)})"


def _point(state: str, figures: Mapping[str, float], metric: str, steps: str) -> Point:
    return Point(state, figures.get("size", math.nan), figures.get(metric, math.nan), steps)


def short_names(names: Iterable[str], width: int = 22) -> list[str]:
    """The names without the dotted beginning they all share, short enough for an axis."""
    parts = [name.split(".") for name in names]
    shared = 0
    while len(parts) > 1 and all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    # A bare index ("7") says little: keep one word of the shared beginning before it.
    shared = max(0, shared - 1) if all(p[-1].isdigit() and len(p) == shared + 1 for p in parts) else shared
    return [formats.label(".".join(p[shared:]), width) for p in parts]
