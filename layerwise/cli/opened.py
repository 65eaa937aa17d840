"""What the commands share: loading the model and the data that the settings name, and the tables that several show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.cli import checks
from layerwise.cli.screen import Screen
from layerwise.config import RunConfig

if TYPE_CHECKING:
    from layerwise.data import Data
    from layerwise.importance import ImportanceReport
    from layerwise.model import UniversalModel
    from layerwise.plan import CompressionPlan
    from layerwise.result import CompressionResult


LONGEST = 40  # characters of a setting that are shown
ACROSS = 4  # methods in a line of the legend
REASONS = 6  # for dashes, that are shown
MOST_ROWS = 120  # of one granularity: blocks of the deepest models, not every channel


def checked(config: RunConfig) -> list[Path]:
    """The inputs, after all that can be checked without loading them; see `layerwise.cli.checks`."""
    found = checks.inputs(config)
    checks.device(config.device)
    return found


def open_model(config: RunConfig, screen: Screen) -> UniversalModel:
    """The model that the settings name; what was assumed on loading it is said."""
    from layerwise import run

    with screen.progress("Loading the model"):
        model = run.open_model(config)
    for note in model.notes:
        screen.note(note)
    return model


def open_data(config: RunConfig, model: UniversalModel, screen: Screen) -> Data | None:
    """The data that the settings name, None without ``--data``."""
    from layerwise import run

    if not config.data:
        return None
    with screen.progress("Loading the data"):
        return run.open_data(config, model, config.data, config.split, config.limit)


def show_report(report: ImportanceReport, screen: Screen) -> None:
    """The layers from most to least important by consensus, with the rank that each method gives them."""
    from layerwise.report import formats

    letters = {method: chr(ord("a") + i) if i < 26 else str(i) for i, method in enumerate(report.scores)}
    columns = ["rank", "layer", "kind", "parameters", *letters.values()]
    on = f"{report.model} on {report.data or 'no data'}"
    for part in map(report.at, report.granularities):
        rows = _ranked(part)
        word = "layers" if part.granularities == ("block",) else f"{part.granularities[0]}s"
        screen.say(f"{on}: {len(rows)} {word}, most important first (1 = most important)")
        if len(rows) > MOST_ROWS:
            screen.say(f"{MOST_ROWS // 2} of each end are shown; --out FILE.json keeps them all.")
            rows = [*rows[: MOST_ROWS // 2], [formats.DASH] * len(columns), *rows[-MOST_ROWS // 2 :]]
        screen.table(columns, rows, right=" ".join(c for c in columns if c not in {"layer", "kind"}))
    for line in (*_legend(letters), *_unscored(report, letters)):
        screen.say(line)
    for note in (report.disagreement(), *report.notes):
        if note:
            screen.say(note)


def _legend(letters: Mapping[str, str]) -> list[str]:
    """What the letters stand for, in columns."""
    entries = [f"{letter} = {method}" for method, letter in letters.items()]
    width = max(map(len, entries), default=0) + 2
    lines = [entries[i : i + ACROSS] for i in range(0, len(entries), ACROSS)]
    return ["".join(entry.ljust(width) for entry in line).rstrip() for line in lines]


def _unscored(report: ImportanceReport, letters: Mapping[str, str]) -> list[str]:
    """Why there is a dash: each reason with the letters of the methods that give it, and of how many layers."""
    from layerwise.scores import Status

    counts: dict[str, Counter[str]] = {}
    for method, scores in report.scores.items():
        for entry in scores.entries.values():
            if entry.status is not Status.OK:
                counts.setdefault(entry.reason, Counter())[letters[method]] += 1
    lines = [f"– {' '.join(given)} ({_layers(given)}): {reason}" for reason, given in counts.items()]
    more = [f"– and {len(lines) - REASONS} more reasons: --out FILE.json keeps them all."] if len(lines) > REASONS else []
    return [*lines[:REASONS], *more]


def _layers(given: Counter[str]) -> str:
    """On how many layers, of the methods that give a reason."""
    low, high = min(given.values()), max(given.values())
    return f"{high} layer{'s' if high > 1 else ''}" if low == high else f"{low} to {high} layers"


def _ranked(report: ImportanceReport) -> list[list[str]]:
    """The table's rows: place, name, kind, parameters and the rank that each method gives."""
    from layerwise.report import formats

    placed = report.consensus().ranks()
    ranks = [formats.places(scores.ranks()) for scores in report.scores.values()]
    infos = {layer.name: layer for layer in report.layers}
    order = [*placed, *(name for name in infos if name not in placed)]
    return [
        [
            str(position),
            name,
            infos[name].kind,
            formats.count(infos[name].parameters),
            *(found.get(name, formats.DASH) for found in ranks),
        ]
        for position, name in enumerate(order, start=1)
    ]


def show_plan(plan: CompressionPlan, screen: Screen) -> None:
    """The steps of a plan, and the figures it was chosen for."""
    if not plan.steps:
        screen.say("The plan has no step: the model stays as it is.")
    rows = [
        [str(i), step.method, str(len(step.layers)), ", ".join(step.layers) or "the whole model", words(step.settings)]
        for i, step in enumerate(plan.steps, start=1)
    ]
    if rows:
        screen.table(["step", "method", "count", "layers", "settings"], rows, right="step count")
    show_figures(plan.before, plan.predicted, screen, "Expected, from the data that the plan was made on")


def show_result(result: CompressionResult, screen: Screen) -> None:
    """Before and after, the proofs, and the targets that were missed."""
    marks = {True: "passed", False: "FAILED", None: "does not apply"}
    show_figures(result.before.figures(), result.after.figures(), screen, f"Measured on {result.after.samples:,} samples")
    rows = [[proof.name, marks[proof.passed], proof.detail] for proof in result.proofs]
    screen.table(["proof", "result", "detail"], rows)
    for missed in result.missed():
        screen.say(f"Target missed: {missed}")


def show_figures(before: Mapping[str, float], after: Mapping[str, float], screen: Screen, title: str) -> None:
    """One row per figure: before, after, and their ratio, with units."""
    from layerwise.report import formats

    rows = [
        [
            name,
            formats.figure(name, before[name]),
            formats.figure(name, after[name]),
            formats.times(formats.quotient(before[name], after[name])),
        ]
        for name in before
        if name in after
    ]
    screen.table(["figure", "before", "after", "ratio"], rows, title=title, right="before after ratio")


def words(settings: Mapping[str, Any]) -> str:
    """Settings on one line; of lists of units, only that there are some."""
    return ", ".join(f"{key}={value if len(str(value)) <= LONGEST else '…'}" for key, value in settings.items())
