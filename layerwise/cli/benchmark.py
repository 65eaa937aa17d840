"""Measure how faithful the methods are: their rankings against the damage of hurting each layer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from layerwise.cli.options import verb
from layerwise.cli.screen import Screen
from layerwise.config import RunConfig
from layerwise.errors import UsageError, nearest

KINDS = ("faithfulness",)
OUT = "runs/faithfulness"
Kind = Annotated[str, typer.Argument(metavar="NAME", help="faithfulness", show_default=False)]
Subjects = Annotated[str | None, typer.Option("--subjects", help="Only these models, with commas between.", show_default=False)]
Judged = Annotated[str | None, typer.Option("--judge", help="Only these methods, with commas between.", show_default=False)]
Record = Annotated[bool, typer.Option("--record", help="Put the results into the database.")]


@verb("database")
def command(
    config: RunConfig, screen: Screen, *, kind: Kind, subjects: Subjects = None, judge: Judged = None, record: Record = False
) -> None:
    """Writes faithfulness.json and faithfulness.md into --out; what was finished before is not done again."""
    from layerwise.benchmark import faithfulness
    from layerwise.benchmark.choice import overall
    from layerwise.tracking import PerformanceTracker

    if kind not in KINDS:
        raise UsageError(f"Unknown benchmark {kind!r}.", remedy=nearest(kind, KINDS), code="LW-C02")
    out = Path(config.out or OUT)
    with Bars(screen) as bars:
        results = faithfulness.run(out, subjects=_names(subjects), methods=_names(judge), progress=bars.move)
    if record:
        with PerformanceTracker(config.database) as tracker:
            tracker.record_faithfulness(results)
    table = overall(results)
    screen.document({"folder": str(out), "auto": results["auto"], "methods": table})
    lines = [[r["method"], *(_figure(r[k]) for k in ("rho", "partial", "auc", "passes"))] for r in table]
    screen.table(["method", "rho", "partial", "curve", "passes"], lines, right="rho partial curve passes")
    screen.say(f"methods='auto' by the protocol's rule: {', '.join(results['auto'])}")
    screen.say(f"The page: {out / faithfulness.PAGE}")


class Bars:
    """One bar at a time, for whatever is being done."""

    def __init__(self, screen: Screen) -> None:
        self.screen, self.what, self.stack = screen, "", ExitStack()
        self.bar: Callable[[int, int], None] = lambda done, total: None

    def move(self, what: str, done: int, total: int) -> None:
        """The bar of `what`; another name opens another bar."""
        if what != self.what:
            self.stack.close()
            self.what, self.bar = what, self.stack.enter_context(self.screen.progress(what))
        self.bar(done, total)

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stack.close()


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def _figure(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.2f}"
