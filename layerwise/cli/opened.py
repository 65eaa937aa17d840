"""What the commands share: loading the model and the data that the settings name, and the tables that several show."""

from __future__ import annotations

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
    screen.say("  ".join(f"{letter} = {method}" for method, letter in letters.items()))
    for note in (report.disagreement(), *report.notes):
        if note:
            screen.say(note)


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
    """Settings on one line."""
    return ", ".join(f"{key}={value}" for key, value in settings.items())
