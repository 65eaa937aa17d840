"""The four charts as SVG: for ``figures/``, for paper, and for readers without a script."""

from __future__ import annotations

import math
from collections.abc import Callable

from layerwise.report import formats, views
from layerwise.report.figures import MEGABYTE, quality_title
from layerwise.report.palette import STATES, VIRIDIS, blend, readable_on
from layerwise.report.story import Story
from layerwise.report.svg import INK, MUTED, Scale, axes, document, line, mark, padded, text, width_of

CELL = 24.0
ROW = 20.0
DASHED: dict[str, object] = {"stroke": MUTED, "stroke_dasharray": "5 4"}
BLUE = STATES["feasible"][0]


def drawings(story: Story) -> dict[str, str]:
    """Name → SVG text, those there is something to draw for."""
    drawn = {"heatmap": heatmap(story), "agreement": agreement(story), "removal": removal(story), "pareto": pareto(story)}
    return {name: svg for name, svg in drawn.items() if svg is not None}


def alternatives(story: Story) -> dict[str, str]:
    """Name → what the chart shows, in words, for those who cannot see it."""
    say, chart, rhos = story.say, story.heatmap, [p.rho for p in story.concord.drawn]
    found = {"heatmap": say("heatmap.alt", layers=len(chart.layers), methods=len(chart.methods))}
    if rhos:
        low, high = formats.number(rhos[0], 2), formats.number(rhos[-1], 2)
        found["agreement"] = say("agreement.alt", pairs=len(rhos), low=low, high=high)
    curve = story.report.removal
    if curve is not None and curve.values:
        before, after = (formats.figure(curve.metric, v) for v in (curve.values[0], curve.values[-1]))
        metric = story.metric(curve.metric)
        found["removal"] = say("removal.alt", metric=metric, before=before, after=after, k=len(curve.values) - 1)
    if story.pareto is not None:
        found["pareto"] = say("pareto.alt", points=len(story.pareto.points), metric=story.metric(story.pareto.metric))
    return found


def heatmap(story: Story) -> str | None:
    """Rank of each layer in each method; a cell without a score is grey and hatched."""
    chart = story.heatmap
    if not chart.methods or not chart.layers:
        return None
    names = views.short_names(chart.layers, 30)
    methods = [formats.label(story.method(m), 26) for m in chart.methods]
    left, top = 46 + width_of(names), 58 + 0.72 * width_of(methods)
    marks = [text(n, left - 8, top + (i + 0.68) * CELL, text_anchor="end") for i, n in enumerate(names)]
    for i, name in enumerate(methods):
        x = left + (i + 0.6) * CELL * 1.4
        marks.append(text(name, x, top - 8, transform=f"rotate(-45 {x:.1f} {top - 8:.1f})"))
    for row, cells in enumerate(chart.rows):
        marks += [m for column, c in enumerate(cells) for m in _cell(c, left + column * CELL * 1.4, top + row * CELL)]
    bottom, right = top + len(names) * CELL, left + len(methods) * CELL * 1.4
    if chart.has_consensus:
        x = right - CELL * 1.4 - 1
        marks.append(line(x, top, x, bottom, stroke=INK, stroke_width=2))
    middle = (top + bottom) / 2
    marks.append(
        text(story.say("axis.layer"), 18, middle, fill=MUTED, text_anchor="middle", transform=f"rotate(-90 18 {middle:.1f})")
    )
    marks.append(text(story.say("axis.method"), right + 14, top - 8, fill=MUTED))
    legend, end = _legend(story, left, bottom + 30)
    width = max(right + 0.72 * width_of(methods[-1:]) + 60, end + 20)
    title = story.say("heatmap.title")
    return document(title, alternatives(story)["heatmap"], width, bottom + 60, marks + legend)


def _cell(cell: views.Cell, x: float, y: float) -> list[str]:
    width, height = CELL * 1.4 - 2, CELL - 2
    if cell.rank is None:
        grey = mark("rect", x=x, y=y, width=width, height=height, fill="#e4e4e4")
        path = "".join(f"M{x + a:.1f} {y + height:.1f}L{x + a + 10:.1f} {y:.1f}" for a in (0, 10, 20))
        return [grey, mark("path", d=path, stroke="#8a8a8a", fill="none")]
    colour = blend(VIRIDIS, cell.share)
    box = mark("rect", x=x, y=y, width=width, height=height, fill=colour)
    rank = text(cell.place, x + width / 2, y + 15.5, fill=readable_on(colour), text_anchor="middle", font_size=11)
    return [box, rank]


def _legend(story: Story, x: float, y: float) -> tuple[list[str], float]:
    """The colour bar and the meaning of the hatching, and where it ends."""
    low, high, none = story.say("axis.least"), story.say("axis.most"), story.say("noscore")
    start = x + width_of([low]) + 8
    bars = [mark("rect", x=start + 18 * i, y=y - 10, width=18, height=12, fill=c) for i, c in enumerate(VIRIDIS)]
    end = start + 18 * len(VIRIDIS) + 8
    box = end + width_of([high]) + 24
    hatched = mark("path", d=f"M{box:.1f} {y + 2:.1f}l12 -12m0 12l12 -12", stroke="#8a8a8a", fill="none")
    grey = mark("rect", x=box, y=y - 10, width=24, height=12, fill="#e4e4e4")
    words = [text(low, x, y), text(high, end, y), text(none, box + 32, y)]
    return [*bars, *words, grey, hatched], box + 32 + width_of([none])


def agreement(story: Story) -> str | None:
    """One dot and interval per pair of methods."""
    pairs = story.concord.drawn
    if not pairs:
        return None
    names = [f"{formats.label(p.first, 24)} × {formats.label(p.second, 24)}" for p in pairs]
    left, top = 40 + width_of(names), 48.0
    bottom = top + ROW * len(pairs)
    x = Scale(-1.0, 1.0, left, left + 380)
    marks = []
    for value in (-1.0, -0.5, 0.0, 0.5, 1.0):
        marks.append(line(x(value), top, x(value), bottom, stroke="#999999" if value == 0 else "#dddddd"))
        marks.append(text(formats.number(value), x(value), bottom + 18, text_anchor="middle", font_size=11))
    for i, (pair, name) in enumerate(zip(pairs, names, strict=True)):
        y = top + (i + 0.5) * ROW
        marks.append(text(name, left - 12, y + 4, text_anchor="end"))
        if math.isfinite(pair.low):
            marks.append(line(x(pair.low), y, x(pair.high), y, stroke=BLUE, stroke_width=1.5))
        marks.append(mark("circle", cx=x(pair.rho), cy=y, r=4.5, fill=BLUE))
    marks.append(text(story.say("axis.rho"), (x.start + x.end) / 2, bottom + 40, text_anchor="middle", fill=MUTED))
    middle = (top + bottom) / 2
    marks.append(
        text(story.say("axis.pair"), 18, middle, text_anchor="middle", fill=MUTED, transform=f"rotate(-90 18 {middle:.1f})")
    )
    return document(story.say("agreement.title"), alternatives(story)["agreement"], left + 400, bottom + 56, marks)


def removal(story: Story) -> str | None:
    """The metric against the number of skipped layers."""
    curve = story.report.removal
    finite = [] if curve is None else [(float(k), v) for k, v in enumerate(curve.values) if math.isfinite(v)]
    if curve is None or len(finite) < 2:
        return None
    x = Scale(0.0, float(len(curve.values) - 1), 90.0, 640.0)
    y = padded([v for _, v in finite], 300.0, 50.0)
    titles = (story.say("axis.skipped"), quality_title(story, curve.metric))
    marks = axes(x, y, titles, (_whole, _writer(curve.metric)))
    path = "M" + "L".join(f"{x(k):.1f} {y(v):.1f}" for k, v in finite)
    marks.append(mark("path", d=path, fill="none", stroke=BLUE, stroke_width=2))
    marks += [mark("circle", cx=x(k), cy=y(v), r=4.0, fill=BLUE) for k, v in finite]
    return document(story.say("removal.title"), alternatives(story)["removal"], 670, 356, marks)


def pareto(story: Story) -> str | None:
    """Size against quality of every model the planner measured."""
    chart = story.pareto
    if chart is None:
        return None
    x = padded([p.size / MEGABYTE for p in chart.points] + [chart.size_limit / MEGABYTE], 90.0, 640.0)
    y = padded([p.quality for p in chart.points] + [chart.quality_limit], 330.0, 50.0)
    titles = (story.say("axis.size"), quality_title(story, chart.metric))
    marks = axes(x, y, titles, (formats.number, _writer(chart.metric)))
    if math.isfinite(chart.size_limit):
        at = x(chart.size_limit / MEGABYTE)
        marks.append(line(at, y.start, at, y.end, **DASHED))
    if math.isfinite(chart.quality_limit):
        at = y(chart.quality_limit)
        marks.append(line(x.start, at, x.end, at, **DASHED))
    front = [(x(p.size / MEGABYTE), y(p.quality)) for p in chart.front()]
    path = f"M{front[0][0]:.1f} {front[0][1]:.1f}" + "".join(f"H{a:.1f}V{b:.1f}" for a, b in front[1:])
    marks.append(mark("path", d=path, fill="none", stroke="#999999"))
    for state in STATES:
        marks += [_symbol(state, x(p.size / MEGABYTE), y(p.quality)) for p in chart.points if p.state == state]
    legend, end = _states(story, {p.state for p in chart.points})
    return document(story.say("pareto.title"), alternatives(story)["pareto"], max(670.0, end), 420, marks + legend)


def _states(story: Story, present: set[str]) -> tuple[list[str], float]:
    """The legend under the scatter, and where it ends."""
    marks, place = [], 30.0
    for state in [s for s in STATES if s in present]:
        name = story.say(f"state.{state}")
        marks += [_symbol(state, place, 396), text(name, place + 14, 400)]
        place += 44 + width_of([name])
    for phrase, style in (("state.front", {"stroke": "#999999"}), ("state.limit", DASHED)):
        name = story.say(phrase)
        marks += [line(place - 6, 396, place + 14, 396, **style), text(name, place + 20, 400)]
        place += 50 + width_of([name])
    return marks, place


def _symbol(state: str, x: float, y: float) -> str:
    colour = STATES[state][0]
    if state == "infeasible":
        d = f"M{x - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10"
        return mark("path", d=d, stroke=colour, stroke_width=2, fill="none")
    if state == "before":
        return mark("path", d=f"M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7 -7z", fill=colour)
    if state == "chosen":
        corners = [(i * math.pi / 5, 9 if i % 2 == 0 else 4) for i in range(10)]
        points = " ".join(f"{x + r * math.sin(a):.1f},{y - r * math.cos(a):.1f}" for a, r in corners)
        return mark("polygon", points=points, fill=colour)
    return mark("circle", cx=x, cy=y, r=4.5, fill=colour)


def _writer(metric: str) -> Callable[[float], str]:
    return formats.percent if metric in formats.SHARES else formats.number


def _whole(value: float) -> str:
    return str(int(value)) if value == int(value) else ""
