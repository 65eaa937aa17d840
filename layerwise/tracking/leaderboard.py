"""Ranking: rows of runs → a table, best first. Plain functions on plain rows.

The rule: only rows with the same task, data (name and fingerprint), device and quality metric are compared; each such group
has its own rank 1. In a group, proven rows come before unproven ones, a better figure before a worse one, and at equal
figures the smaller model, then the faster one. `pareto` marks the proven rows that no other proven row of the group matches in
quality and size while beating one of them: there is no single best trade-off, and rank 1 does not claim one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from layerwise.errors import UsageError, nearest
from layerwise.metric import METRICS

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, Any]

COSTS = ("size", "params", "nonzero", "macs", "latency", "ratio")
# A task's own quality; for other tasks the first of PREFERRED that was measured.
QUALITY = {
    "classification": "accuracy",
    "detection": "map",
    "fidelity": "divergence",
    "generation": "perplexity",
    "language_modelling": "perplexity",
    "multi_label": "auc",
    "question_answering": "f1_score",
    "recommendation": "ndcg",
    "regression": "rmse",
    "reinforcement_learning": "mean_return",
    "retrieval": "mrr",
    "segmentation": "mean_iou",
    "summarization": "perplexity",
    "token_classification": "accuracy",
    "translation": "perplexity",
}
PREFERRED = (
    "accuracy", "f1", "f1_score", "auc", "ndcg", "map", "miou", "recall", "precision", "bleu", "rouge", "agreement",
    "perplexity", "wer", "cer", "rmse", "mse", "mae", "divergence", "loss",
)  # fmt: skip
LOWER_IS_BETTER = {*COSTS, "wer", "cer", *(name for name, known in METRICS.items() if not known.higher_is_better)}
LOWER_ENDINGS = ("_loss", "_error", "error_rate", "_distance", "_perplexity", "_divergence")

COLUMNS = [
    "rank", "model", "domain", "task", "data", "data_fingerprint", "device", "quality", "before", "after", "retained",
    "methods", "ratio", "size", "size_before", "params", "params_before", "macs", "macs_before",
    "latency_before", "latency_after", "proven", "pareto", "seed", "created", "id", "parent",
]  # fmt: skip
GROUP = ("task", "data", "data_fingerprint", "device", "quality")


def lower_is_better(metric: str) -> bool:
    """The direction of a metric by its name; unknown ones are better when higher."""
    return metric in LOWER_IS_BETTER or metric.endswith(LOWER_ENDINGS)


def rank(runs: Iterable[Mapping[str, Any]], *, metric: str | None = None, limit: int | None = None) -> list[Row]:
    """Rows with `COLUMNS`, group after group, best first; at most `limit` rows per group.

    `runs` hold the columns of `Run`. `metric`: what to rank by, a metric or one of `COSTS`; by default the task's quality.
    Raises `UsageError` for a `metric` that no run has.
    """
    runs = list(runs)
    if metric is not None:
        _require_metric(metric, runs)
    rows = sorted((_row(run, metric) for run in runs), key=_group)
    return [row for _, group in groupby(rows, key=_group) for row in _ranked(list(group), metric)[:limit]]


def to_frame(rows: Sequence[Row]) -> pd.DataFrame:
    """The rows as a frame with `COLUMNS`; `rank` and `parent` are missing where there is none."""
    import pandas as pd

    # pandas takes half a second to import: `import layerwise.tracking` does without
    frame = pd.DataFrame(list(rows), columns=COLUMNS)
    return frame.astype({"rank": "Int64", "parent": "Int64", "id": "int64", "proven": "bool", "pareto": "bool"})


def _require_metric(metric: str, runs: Sequence[Mapping[str, Any]]) -> None:
    known = {*COSTS, *(name for run in runs for name in run["after"].get("metrics", {}))}
    if metric not in known:
        raise UsageError(f"No run has the metric {metric!r}.", remedy=nearest(metric, known))


def _row(run: Mapping[str, Any], metric: str | None) -> Row:
    before, after = run["before"], run["after"]
    quality = metric if metric is not None and metric not in COSTS else _quality(run["task"], after.get("metrics", {}))
    row = {name: run[name] for name in ("model", "domain", "task", "data", "data_fingerprint", "device", "proven", "seed")}
    row |= {name: _figure(after, name) for name in ("size", "params", "macs")}
    row |= {f"{name}_before": _figure(before, name) for name in ("size", "params", "macs", "latency")}
    row |= {"latency_after": _figure(after, "latency"), "methods": ", ".join(run["methods"])}
    row |= {"ratio": math.nan if run["ratio"] is None else run["ratio"], "created": run["created"], "id": run["id"]}
    row |= {"quality": quality, "before": _figure(before, quality), "after": _figure(after, quality), "parent": run["parent_id"]}
    row["retained"] = _retained(row["before"], row["after"], quality)
    by = metric or quality
    row["_by"] = row["ratio"] if by == "ratio" else _figure(after, by)
    return row


def _quality(task: str, metrics: Mapping[str, Any]) -> str:
    own = QUALITY.get(task)
    if own in metrics:
        return str(own)
    return next((name for name in PREFERRED if name in metrics), min(metrics, default=""))


def _figure(measured: Mapping[str, Any], name: str) -> float:
    value = measured.get("metrics", {}).get(name, measured.get(name))
    return math.nan if value is None else float(value)


def _retained(before: float, after: float, metric: str) -> float:
    """The share of the quality that is left: 1 is all of it, for errors as for accuracies; NaN where no ratio makes sense."""
    worse, better = (after, before) if lower_is_better(metric) else (before, after)
    return better / worse if worse > 0 and better >= 0 else math.nan


def _group(row: Row) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in GROUP)


def _ranked(rows: list[Row], metric: str | None) -> list[Row]:
    lower = lower_is_better(metric or rows[0]["quality"])
    rows.sort(key=lambda row: (_order(row, lower), row["id"]))
    quality_lower = lower_is_better(rows[0]["quality"])
    for position, row in enumerate(rows, start=1):
        tied = position > 1 and _order(rows[position - 2], lower) == _order(row, lower)
        row["rank"] = None if math.isnan(row["_by"]) else rows[position - 2]["rank"] if tied else position
        known = row["proven"] and not math.isnan(row["after"] + row["size"])
        row["pareto"] = known and not any(_dominates(other, row, quality_lower) for other in rows)
    return rows


def _order(row: Row, lower: bool) -> tuple[bool, bool, float, float, float]:
    """The sort key, smallest first. An absent figure is worse than any."""
    by = row["_by"]
    key = math.inf if math.isnan(by) else by if lower else -by
    return not row["proven"], math.isnan(by), key, _absent_last(row["size"]), _absent_last(row["latency_after"])


def _absent_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _dominates(other: Row, row: Row, lower: bool) -> bool:
    if not other["proven"]:
        return False
    sign = 1.0 if lower else -1.0
    theirs = (sign * other["after"], other["size"])
    ours = (sign * row["after"], row["size"])
    return all(a <= b for a, b in zip(theirs, ours, strict=True)) and theirs != ours
