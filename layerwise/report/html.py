"""The page itself: one HTML file with its style, its script, plotly.js and its figures inside; nothing is fetched.

Decision: a content security policy forbids every request, so "works offline" is enforced by the browser and not by our care.
The same input gives the same bytes: no time, no random id.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.errors import printable
from layerwise.files import disk_errors, write_atomic
from layerwise.importance import RENDERERS, ImportanceReport
from layerwise.plan import CompressionPlan
from layerwise.report import formats, tables
from layerwise.report.drawings import alternatives, drawings
from layerwise.report.figures import figures
from layerwise.report.palette import DIVERGING, blend, readable_on
from layerwise.report.story import Story
from layerwise.report.tiles import tiles
from layerwise.report.verdict import verdict
from layerwise.report.words import Words
from layerwise.result import CompressionResult

if TYPE_CHECKING:
    import jinja2
    import pandas as pd

TEMPLATES = Path(__file__).parent / "templates"
FIGURES = ("heatmap", "agreement", "removal", "pareto")


def render(
    report: ImportanceReport,
    *,
    plan: CompressionPlan | None = None,
    result: CompressionResult | None = None,
    leaderboard: pd.DataFrame | None = None,
    reproduce: Sequence[str] = (),
    artifacts: Sequence[Mapping[str, Any]] = (),
    lang: str = "en",
) -> str:
    """The report as one HTML file that needs no network, in ``en`` or ``zh``.

    Where `result` is given its own plan is shown. `reproduce` are commands to copy, `artifacts` one mapping per file (``name``,
    ``kind``, ``path``, ``size`` in bytes, ``sha256``, … as far as known). Raises `UsageError` on an unknown language.
    """
    return page(Story(report, Words(lang), plan, result, leaderboard, reproduce, artifacts))


def write_report(
    folder: str | Path,
    report: ImportanceReport,
    *,
    plan: CompressionPlan | None = None,
    result: CompressionResult | None = None,
    leaderboard: pd.DataFrame | None = None,
    reproduce: Sequence[str] = (),
    artifacts: Sequence[Mapping[str, Any]] = (),
    lang: str = "en",
) -> Path:
    """Writes ``report.html`` and ``figures/*.svg`` into `folder`, made if missing, and gives the path of the page.

    A figure of an earlier report that this one does not have is removed: the folder shows one report. Raises what `render` and
    `write_atomic` raise.
    """
    story = Story(report, Words(lang), plan, result, leaderboard, reproduce, artifacts)
    text, drawn = page(story), drawings(story)
    place = Path(folder)
    with disk_errors(place):
        (place / "figures").mkdir(parents=True, exist_ok=True)
    for name in FIGURES:
        if name in drawn:
            write_atomic(place / "figures" / f"{name}.svg", drawn[name])
        else:
            with disk_errors(place):
                (place / "figures" / f"{name}.svg").unlink(missing_ok=True)
    write_atomic(place / "report.html", text)
    return place / "report.html"


@RENDERERS.register("html")
class HtmlRenderer:
    """What `ImportanceReport.to_html` finds in the registry: `render` as an object."""

    def __call__(self, report: ImportanceReport, **details: Any) -> str:
        return render(report, **details)


def page(story: Story) -> str:
    """The whole page of one story."""
    environment = _environment()
    drawn = figures(story)
    return environment.get_template("report.html.jinja").render(
        say=story.say,
        report=story.report,
        planned=story.planned,
        result=story.result,
        leaderboard_rows=0 if story.leaderboard is None else len(story.leaderboard),
        reproduce=[command.splitlines() for command in story.reproduce],
        verdict=verdict(story),
        tiles=list(tiles(story)),
        tables=tables,
        story=story,
        matrix=matrix(story),
        figures=drawn,
        alternatives=alternatives(story),
        drawings=drawings(story),
        charts=_inline_json(drawn),
        style=_source("report.css"),
        script=_source("report.js"),
        plotly=_plotly(),
    )


def matrix(story: Story) -> list[tuple[str, list[tuple[str, str, str, str]]]]:
    """Rows of the agreement matrix: method and, per method, text, background, ink and what a pointer shows."""
    rhos = {frozenset((p.first, p.second)): p for p in story.concord.pairs}
    rows = []
    for first in story.concord.methods:
        cells = []
        for second in story.concord.methods:
            pair = rhos.get(frozenset((first, second)))
            if pair is None or pair.rho != pair.rho:
                cells.append((formats.DASH, "", "", f"{first} × {second}"))
                continue
            colour = blend(DIVERGING, (pair.rho + 1) / 2)
            interval = f"{formats.number(pair.low, 2)} … {formats.number(pair.high, 2)}"
            cells.append(
                (f"{pair.rho:.2f}".replace("-", formats.MINUS), colour, readable_on(colour), f"{first} × {second}: {interval}")
            )
        rows.append((story.method(first), cells))
    return rows


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2
    from markupsafe import Markup

    def one_line(value: Any) -> Any:
        """Control characters of the user's names are shown, not obeyed; markup of our own passes."""
        return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=one_line,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@functools.cache
def _plotly() -> Any:
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())


def _source(name: str) -> Any:
    from markupsafe import Markup

    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))


def _inline_json(data: Any) -> Any:
    """JSON that can stand inside a script element: no ``<``, ``>`` or ``&`` is left in it, and no NaN."""
    from markupsafe import Markup

    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)
