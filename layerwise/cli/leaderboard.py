"""Show the results recorded so far, best first."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerwise.cli import checks
from layerwise.cli.options import verb
from layerwise.cli.screen import Screen, plain
from layerwise.config import RunConfig
from layerwise.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd

RIGHT = "rank before after size ratio id"
Domain = Annotated[str | None, typer.Option("--domain", help="text, vision, audio, …", show_default=False)]
Metric = Annotated[str | None, typer.Option("--metric", help="Rank by this figure.", show_default=False)]


@verb("task", "limit", "database", "force")
def command(config: RunConfig, screen: Screen, *, domain: Domain = None, metric: Metric = None) -> None:
    """Only rows with the same task, data and device are ranked against each other. --out FILE.csv or .json saves it."""
    from layerwise import engine

    out = checks.output(config.out, [], force=config.force) if config.out else None
    frame = engine.leaderboard(domain, database=config.database, task=config.task, metric=metric, limit=config.limit)
    if out:
        _save(frame, out)
    screen.document(rows_of(frame))
    show_leaderboard(frame, screen)
    if out:
        screen.say(f"Saved: {out}")


def show_leaderboard(frame: pd.DataFrame, screen: Screen) -> None:
    """One table for each group of results that can be compared."""
    from layerwise.report import formats

    if frame.empty:
        screen.say("Nothing is recorded yet. `layerwise run` and `layerwise demo` record their results.")
        return
    for about, group in groupby(rows_of(frame), key=lambda row: (row["task"], row["data"], row["device"], row["quality"])):
        task, data, device, quality = about
        rows = [
            [
                formats.DASH if row["rank"] is None else str(row["rank"]),
                row["model"],
                row["methods"] or formats.DASH,
                formats.figure(quality, number(row["before"])),
                formats.figure(quality, number(row["after"])),
                formats.size(number(row["size"])),
                formats.times(number(row["ratio"])),
                "yes" if row["proven"] else "no",
                str(row["id"]),
            ]
            for row in group
        ]
        screen.say(f"{task} on {data}, {device}{f', by {quality}' if quality else ''}:")
        screen.table(["rank", "model", "methods", "before", "after", "size", "ratio", "proven", "id"], rows, right=RIGHT)


def rows_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The frame's rows as plain data; what is missing is None."""
    rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return list(plain(rows))


def number(value: Any) -> float:
    """A figure that may be missing: NaN then."""
    return float("nan") if value is None else float(value)


def _save(frame: pd.DataFrame, out: Path) -> None:
    from layerwise.files import write_atomic

    if out.suffix not in {".csv", ".json"}:
        raise UsageError(
            f"{out.suffix or 'no suffix'!r} is not possible.", place="--out", remedy="Use .csv or .json.", code="LW-C05"
        )
    text = frame.to_csv(index=False) if out.suffix == ".csv" else json.dumps(rows_of(frame), indent=1, ensure_ascii=False) + "\n"
    write_atomic(out, text)
