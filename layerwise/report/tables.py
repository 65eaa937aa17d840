"""Every table of the page as plain text cells; the template adds the markup and the escaping."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from layerwise.report import formats, views
from layerwise.report.story import Story
from layerwise.report.verdict import change_in_words, target_in_words
from layerwise.result import Measurement, Proof

DIGITS = 12  # of a fingerprint in the leaderboard
LEADERS = 20  # rows of the leaderboard that are shown
OUTCOMES = {True: ("good", "outcome.passed"), False: ("bad", "outcome.failed"), None: ("info", "outcome.na")}
ORDER = ("name", "kind", "format", "path", "size", "parity", "sha256")  # of an artifact's columns
VERSIONS = ("layerwise", "torch", "numpy", "plotly")
SAME_UNIT = frozenset({"params", "nonzero"})


@dataclass(frozen=True)
class Table:
    """Column titles, rows of text, the columns that hold numbers, and a tone per row where it has one."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[int] = frozenset()
    tones: tuple[str, ...] = ()


def scores(story: Story) -> Table:
    """Every layer and method in full."""
    say, chart = story.say, story.heatmap
    columns = ("axis.layer", "axis.method", "rank", "score", "stderr", "unit", "status", "reason")
    rows = [
        (
            layer,
            story.method(method),
            formats.DASH if cell.rank is None else f"{cell.place}/{cell.of}",
            formats.number(cell.entry.value),
            formats.number(cell.entry.stderr, 2),
            cell.unit,
            say(f"status.{cell.entry.status}"),
            cell.entry.reason,
        )
        for layer, cells in zip(chart.layers, chart.rows, strict=True)
        for method, cell in zip(chart.methods, cells, strict=True)
    ]
    return Table(tuple(map(say, columns)), tuple(rows), frozenset({2, 3, 4}))


def pairs(story: Story) -> Table:
    """Every pair of methods, the least agreement first."""
    say = story.say
    rows = [
        (story.method(p.first), story.method(p.second), formats.number(p.rho, 2), _interval(p.low, p.high), str(p.layers))
        for p in story.concord.pairs
    ]
    columns = (say("axis.method"), say("axis.method"), say("axis.rho"), say("interval"), say("layers"))
    return Table(columns, tuple(rows), frozenset({2, 3, 4}))


def removed(story: Story) -> Table | None:
    """The removal curve's points."""
    curve = story.report.removal
    if curve is None:
        return None
    names = (formats.DASH, *curve.order)
    rows = [
        (str(k), name, formats.figure(curve.metric, value))
        for k, (name, value) in enumerate(zip(names, curve.values, strict=False))
    ]
    columns = (story.say("axis.skipped"), story.say("last"), story.metric(curve.metric))
    return Table(columns, tuple(rows), frozenset({0, 2}))


def steps(story: Story) -> Table | None:
    """The plan's steps in order."""
    if story.planned is None or not story.planned.steps:
        return None
    rows = [
        (str(i), s.method, ", ".join(s.layers), ", ".join(f"{k}={v}" for k, v in s.settings.items()) or formats.DASH)
        for i, s in enumerate(story.planned.steps, start=1)
    ]
    columns = ("step", "axis.method", "layers", "settings")
    return Table(tuple(map(story.say, columns)), tuple(rows), frozenset({0}))


def targets(story: Story) -> list[str]:
    """The plan's targets in words."""
    if story.planned is None:
        return []
    before = story.planned.before
    return [target_in_words(story, t, before.get(t.metric, math.nan)) for t in story.planned.targets]


def candidates(story: Story) -> Table | None:
    """Everything the planner measured, with all figures."""
    plan = story.planned
    if plan is None or not plan.candidates:
        return None
    metrics = list(dict.fromkeys(m for c in plan.candidates for m in c.figures))
    rows = [
        (
            views.steps_in_words(c.steps) or story.say("none"),
            *(formats.figure(m, c.figures.get(m, math.nan)) for m in metrics),
            story.say(f"state.{'chosen' if c.steps == plan.steps else 'feasible' if c.feasible else 'infeasible'}"),
        )
        for c in plan.candidates
    ]
    columns = (story.say("steps"), *map(story.metric, metrics), story.say("status"))
    return Table(columns, tuple(rows), frozenset(range(1, len(metrics) + 1)))


def compare(story: Story) -> Table | None:
    """Before and after in one unit per row, each with its spread, the ratio and the change."""
    if story.result is None:
        return None
    before, after = (_figures(m) for m in (story.result.before, story.result.after))
    rows = [_compared(story, name, before[name], after[name]) for name in before if name in after]
    columns = ("figure", "unit", "before", "after", "ratio", "change")
    return Table(tuple(map(story.say, columns)), tuple(rows), frozenset({2, 3, 4, 5}))


def _compared(story: Story, name: str, before: tuple[float, float], after: tuple[float, float]) -> tuple[str, ...]:
    scale, unit = formats.unit(name, before[0])

    def cell(value: float, spread: float) -> str:
        text = formats.count(value) if name in SAME_UNIT else formats.number(value / scale)
        return f"{text} ± {formats.number(spread / scale, 2)}" if math.isfinite(spread) else text

    by = after[0] - before[0]
    change = change_in_words(story, name, by) if name in formats.SHARES else formats.change(name, by / scale)
    ratio = formats.times(formats.quotient(before[0], after[0]))
    return story.metric(name), _unit(story, name, unit), cell(*before), cell(*after), ratio, change


def _unit(story: Story, name: str, unit: str) -> str:
    if name in SAME_UNIT:
        return story.say("unit.params")
    return f"{unit} {story.say('unit.macs')}".strip() if name == "macs" else story.say.known("unit", unit)


def _figures(measured: Measurement) -> dict[str, tuple[float, float]]:
    """Figure → value and spread (NaN: it has none)."""
    fixed = {name: float(getattr(measured, name)) for name in ("size", "params", "nonzero", "macs")}
    return (
        {name: (value, math.nan) for name, value in fixed.items()}
        | {"latency": (measured.latency, measured.latency_spread)}
        | {name: (value, measured.stderr.get(name, math.nan)) for name, value in measured.metrics.items()}
    )


def proofs(story: Story) -> Table | None:
    """Every check, those that failed first."""
    if story.result is None or not story.result.proofs:
        return None
    ordered = sorted(story.result.proofs, key=lambda p: {False: 0, True: 1, None: 2}[p.passed])
    columns = ("proof", "outcome", "measured", "bound", "layer.first", "detail")
    rows = [_proof(story, p) for p in ordered]
    tones = tuple(OUTCOMES[p.passed][0] for p in ordered)
    return Table(tuple(map(story.say, columns)), tuple(rows), frozenset({2, 3}), tones)


def _proof(story: Story, proof: Proof) -> tuple[str, ...]:
    outcome = story.say(OUTCOMES[proof.passed][1])
    measured, bound = formats.number(proof.measured, 3), formats.number(proof.bound, 3)
    return proof.name, outcome, measured, bound, proof.layer or formats.DASH, proof.detail


def leaderboard(story: Story) -> Table | None:
    """The first rows, in the order given."""
    frame = story.leaderboard
    if frame is None or frame.empty:
        return None
    top = frame.head(LEADERS)
    names = [str(c) for c in top.columns]
    rows = [tuple(_shown(n, v) for n, v in zip(names, row, strict=True)) for row in top.itertuples(index=False, name=None)]
    numeric = frozenset(i for i, dtype in enumerate(top.dtypes) if pd.api.types.is_numeric_dtype(dtype))
    return Table(tuple(story.metric(n) for n in names), tuple(rows), numeric)


def artifacts(story: Story) -> Table | None:
    """The files that were made; known columns first, then whatever else they carry."""
    if not story.artifacts:
        return None
    given = list(dict.fromkeys(str(k) for a in story.artifacts for k in a))
    names = [n for n in ORDER if n in given] + [n for n in given if n not in ORDER]
    rows = [tuple(_value(n, a.get(n)) for n in names) for a in story.artifacts]
    numeric = frozenset(i for i, n in enumerate(names) if not any(isinstance(a.get(n), str) for a in story.artifacts))
    return Table(tuple(story.say.known("artifact", n) for n in names), tuple(rows), numeric)


def facts(story: Story) -> Table:
    """What someone needs to get the same numbers."""
    report, say = story.report, story.say
    given = {
        "model": report.model,
        "fingerprint": report.fingerprint,
        "task": report.task,
        "data": report.data,
        "domain": report.domain,
        "seed": str(report.seed),
        "device": report.device,
        "metrics": _pairs({story.metric(k): formats.figure(k, v) for k, v in report.metrics.items()}),
        "versions": _pairs(versions()),
    }
    return Table((say("name"), say("value")), tuple((say(k), v) for k, v in given.items() if v))


def versions() -> dict[str, str]:
    """Python and the packages that shape the numbers, as installed here; a source tree without metadata is left out."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _pairs(values: Mapping[str, str]) -> str:
    return ", ".join(f"{k} {v}" for k, v in values.items())


def _interval(low: float, high: float) -> str:
    return f"{formats.number(low, 2)} … {formats.number(high, 2)}" if math.isfinite(low) else formats.DASH


def _shown(name: str, value: Any) -> str:
    """As `_value`; of a fingerprint its beginning, which tells the rows apart."""
    return value[:DIGITS] if isinstance(value, str) and name.endswith("fingerprint") else _value(name, value)


def _value(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return ", ".join(map(str, value))
    if value is None or (pd.api.types.is_scalar(value) and pd.isna(value)):
        return formats.DASH
    if pd.api.types.is_bool(value):
        return str(value).lower()
    try:
        return formats.figure(name, float(value))
    except (TypeError, ValueError):
        return str(value)
