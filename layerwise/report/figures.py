"""The charts for the screen, as plain plotly figures (dictionaries): plotly.js draws them, the plotly package is not imported.

A colour written ``var(--name)`` is the page's own: the script puts the theme's value in, so a chart follows light and dark.
``narrow`` holds what changes on a phone, as plotly's dotted keys. plotly reads a little HTML in its texts, so whatever
comes from the user is escaped here although it then travels as JSON.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Iterable
from typing import Any

from layerwise.importance import Agreement
from layerwise.report import formats, views
from layerwise.report.palette import STATES, VIRIDIS
from layerwise.report.story import Story

Figure = dict[str, Any]
MEGABYTE = 1e6
DIAGONALS = ((0.42, 0.46), (0.14, 0.16), (-0.14, -0.16))  # of a hatched cell, in parts of it from the centre
WHOLE = {"ticklabeloverflow": "allow"}  # plotly otherwise leaves out names that lean over the edge
SLANTED = 84  # pixels
LABELLED = 60  # layers up to which each cell shows its rank


def figures(story: Story) -> dict[str, Figure]:
    """Name → figure, those there is something to draw for."""
    drawn = {"heatmap": heatmap(story), "agreement": agreement(story), "removal": removal(story), "pareto": pareto(story)}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def heatmap(story: Story) -> Figure | None:
    """Rank shares, with the cells that have no score in grey under hatching."""
    chart, say = story.heatmap, story.say
    if not chart.methods or not chart.layers:
        return None
    hover = [
        [_cell_text(story, layer, method, cell) for method, cell in zip(chart.methods, cells, strict=True)]
        for layer, cells in zip(chart.layers, chart.rows, strict=True)
    ]
    grid = {"x": list(range(len(chart.methods))), "y": list(range(len(chart.layers))), "xgap": 2, "ygap": 2}
    common = grid | {"type": "heatmap", "hoverongaps": False, "hovertext": hover, "hovertemplate": "%{hovertext}<extra></extra>"}
    ranked = common | {
        "z": [[_json(cell.share) for cell in cells] for cells in chart.rows],
        "zmin": 0,
        "zmax": 1,
        "colorscale": [[i / (len(VIRIDIS) - 1), colour] for i, colour in enumerate(VIRIDIS)],
        "text": [[cell.place for cell in cells] for cells in chart.rows],
        "texttemplate": "%{text}" if len(chart.layers) <= LABELLED else "",
        "textfont": {"size": 11},
        "colorbar": _bar(say("axis.least"), say("axis.most")),
    }
    missing = common | {
        "z": [[0 if cell.rank is None else None for cell in cells] for cells in chart.rows],
        "colorscale": [[0, "var(--missing)"], [1, "var(--missing)"]],
        "showscale": False,
    }
    names = [story.method(m) for m in chart.methods]
    layout = _layout(height=190 + len(chart.layers) * (24 if len(chart.layers) <= LABELLED else 13))
    layout["xaxis"] = _axis(say("axis.method")) | _named(names, 20) | {"side": "top", "tickangle": -45} | WHOLE
    layout["yaxis"] = _axis(say("axis.layer")) | _ticks(views.short_names(chart.layers)) | {"autorange": "reversed"}
    layout["shapes"] = _hatching(chart)
    edge, layout["margin"] = layout["margin"], layout["margin"] | {"r": SLANTED}  # the last names lean over the edge
    narrow = {
        "yaxis.ticktext": _safe(views.short_names(chart.layers, 11)),
        "xaxis.tickangle": -90,
        "margin.r": edge["r"],
        "data.1.textfont.size": 9 if len(names) < 12 else 7,
    }
    return {"data": [missing, ranked], "layout": layout, "narrow": narrow}


def agreement(story: Story) -> Figure | None:
    """One dot per pair of methods with its interval, the least agreement at the top."""
    chart, say = story.concord, story.say
    if not chart.drawn:
        return None
    number = {name: i for i, name in enumerate(chart.methods, start=1)}
    rows = list(range(len(chart.drawn)))
    dots = {
        "type": "scatter",
        "mode": "markers",
        "x": [p.rho for p in chart.drawn],
        "y": rows,
        "marker": {"size": 9, "color": "var(--blue)"},
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [_json(p.high - p.rho) for p in chart.drawn],
            "arrayminus": [_json(p.rho - p.low) for p in chart.drawn],
            "color": "var(--blue)",
            "thickness": 1.5,
            "width": 3,
        },
        "hovertext": [_pair_text(story, p) for p in chart.drawn],
        "hovertemplate": "%{hovertext}<extra></extra>",
    }
    layout = _layout(height=110 + 21 * len(rows))
    layout["xaxis"] = _axis(say("axis.rho"), grid=True) | {"range": [-1.05, 1.05], "dtick": 0.5}
    numbered = [f"{number[p.first]} × {number[p.second]}" for p in chart.drawn]
    long = [f"{formats.label(p.first, 20)} × {formats.label(p.second, 20)}" for p in chart.drawn]
    layout["yaxis"] = _axis(say("axis.pair")) | _ticks(long) | {"range": [len(rows) - 0.4, -0.6]}
    layout["shapes"] = [_rule(x0=0, x1=0, y0=0, y1=1, yref="paper")]
    return {"data": [dots], "layout": layout, "narrow": {"yaxis.ticktext": numbered}}


def removal(story: Story) -> Figure | None:
    """The metric after each skipped layer."""
    curve = story.report.removal
    if curve is None or len(curve.values) < 2:
        return None
    names = ["", *curve.order]
    hover = [
        _lines(f"{story.say('axis.skipped')}: {k}", formats.label(name), formats.figure(curve.metric, value))
        for k, (name, value) in enumerate(zip(names, curve.values, strict=False))
    ]
    line = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": list(range(len(curve.values))),
        "y": [_json(v) for v in curve.values],
        "line": {"color": "var(--blue)", "width": 2},
        "marker": {"size": 8, "color": "var(--blue)"},
        "hovertext": hover,
        "hovertemplate": "%{hovertext}<extra></extra>",
    }
    layout = _layout(height=340)
    layout["xaxis"] = _axis(story.say("axis.skipped"), grid=True) | {"dtick": max(1, len(names) // 12)}
    layout["yaxis"] = _axis(quality_title(story, curve.metric), grid=True) | _tick_format(curve.metric)
    return {"data": [line], "layout": layout, "narrow": {}}


def pareto(story: Story) -> Figure | None:
    """The planner's candidates by size and quality; colour and shape say what became of each."""
    chart, say = story.pareto, story.say
    if chart is None:
        return None
    front = chart.front()
    line = {
        "type": "scatter",
        "mode": "lines",
        "name": say("state.front"),
        "x": [p.size / MEGABYTE for p in front],
        "y": [p.quality for p in front],
        "line": {"color": "var(--muted)", "width": 1.5, "shape": "hv"},
        "hoverinfo": "skip",
    }
    groups = [_group(story, state, [p for p in chart.points if p.state == state]) for state in STATES]
    layout = _layout(height=420) | {"showlegend": True, "legend": {"orientation": "h", "y": -0.22, "yanchor": "top"}}
    layout["xaxis"] = _axis(say("axis.size"), grid=True)
    layout["yaxis"] = _axis(quality_title(story, chart.metric), grid=True) | _tick_format(chart.metric)
    layout["shapes"], layout["annotations"] = [], []
    if math.isfinite(chart.size_limit):
        x = chart.size_limit / MEGABYTE
        layout["shapes"].append(_rule(x0=x, x1=x, y0=0, y1=1, yref="paper"))
        layout["annotations"].append(_note(say("state.limit"), x=x, y=1, yref="paper", yanchor="bottom"))
    if math.isfinite(chart.quality_limit):
        y = chart.quality_limit
        layout["shapes"].append(_rule(x0=0, x1=1, y0=y, y1=y, xref="paper"))
        layout["annotations"].append(_note(say("state.limit"), x=0, y=y, xref="paper", xanchor="left", yanchor="bottom"))
    return {"data": [line, *(g for g in groups if g["x"])], "layout": layout, "narrow": {}}


def _group(story: Story, state: str, points: list[views.Point]) -> Figure:
    symbol = STATES[state][1]
    sizes = {"chosen": 15, "before": 11}
    metric = story.pareto.metric if story.pareto else ""
    hover = [
        _lines(story.say(f"state.{state}"), p.steps, formats.size(p.size), formats.figure(metric, p.quality)) for p in points
    ]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": story.say(f"state.{state}"),
        "x": [p.size / MEGABYTE for p in points],
        "y": [p.quality for p in points],
        "marker": {"size": sizes.get(state, 9), "color": f"var(--{state})", "symbol": symbol, "line": _edge(state)},
        "hovertext": hover,
        "hovertemplate": "%{hovertext}<extra></extra>",
    }


def _edge(state: str) -> Figure:
    return {"width": 2, "color": "var(--infeasible)"} if state == "infeasible" else {"width": 1, "color": "var(--card)"}


def quality_title(story: Story, metric: str) -> str:
    """A metric's axis title: its name and unit, and which way is better where that is known."""
    unit = story.say.known("unit", formats.unit(metric, 1)[1])
    name = story.metric(metric) + (f" ({unit})" if unit else "")
    if metric in formats.HIGHER_IS_BETTER:
        return story.say("better.up", metric=name)
    return story.say("better.down", metric=name) if metric in formats.LOWER_IS_BETTER else name


def _cell_text(story: Story, layer: str, method: str, cell: views.Cell) -> str:
    say, entry = story.say, cell.entry
    head = f"<b>{_safe([layer])[0]}</b>"
    name = story.method(method)
    if cell.rank is None:
        return f"{head}<br>{_lines(name, say(f'status.{entry.status}'), entry.reason)}"
    score = f"{say('score')} {formats.with_spread('', entry.value, entry.stderr)}"
    rank = say("rank.of", rank=cell.place, of=cell.of)
    return f"{head}<br>{_lines(name, score, cell.unit, rank, entry.reason)}"


def _pair_text(story: Story, pair: Agreement) -> str:
    rho = f"ρ = {formats.number(pair.rho, 2)}"
    interval = f"{story.say('interval')} {formats.number(pair.low, 2)} … {formats.number(pair.high, 2)}"
    return _lines(f"{pair.first} × {pair.second}", rho, interval, f"{story.say('layers')}: {pair.layers}")


def _hatching(chart: views.Heatmap) -> list[Figure]:
    """One path of diagonals over all cells without a score, and the line before the consensus."""
    strokes = [
        f"M{x - 0.46:.2f} {y + a:.2f}L{x + b:.2f} {y - 0.42:.2f}M{x - b:.2f} {y + 0.42:.2f}L{x + 0.46:.2f} {y - a:.2f}"
        for y, cells in enumerate(chart.rows)
        for x, cell in enumerate(cells)
        if cell.rank is None
        for a, b in DIAGONALS
    ]
    shapes: list[Figure] = []
    if strokes:
        shapes.append({"type": "path", "path": "".join(strokes), "line": {"color": "var(--hatch)", "width": 1}})
    if chart.has_consensus:
        x = len(chart.methods) - 1.5
        shapes.append(
            {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "line": {"color": "var(--ink)", "width": 2}}
        )
    return shapes


def _layout(height: int) -> Figure:
    return {
        "height": height,
        "margin": {"l": 10, "r": 12, "t": 24, "b": 10},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "var(--ink)"},
        "hoverlabel": {"bgcolor": "var(--card)", "bordercolor": "var(--muted)", "font": {"color": "var(--ink)"}, "align": "left"},
        "showlegend": False,
        "dragmode": False,
    }


def _axis(title: str, *, grid: bool = False) -> Figure:
    text = {"text": html.escape(title), "standoff": 10, "font": {"size": 12, "color": "var(--muted)"}}
    lines = {"showgrid": grid, "gridcolor": "var(--line)", "zeroline": False, "linecolor": "var(--line)"}
    return {"title": text, "automargin": True, "fixedrange": True, "ticks": "", **lines}


def _ticks(names: list[str]) -> Figure:
    return {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": _safe(names)}


def _named(names: list[str], width: int) -> Figure:
    return _ticks([formats.label(n, width) for n in names])


def _tick_format(metric: str) -> Figure:
    return {"tickformat": ",.1%"} if metric in formats.SHARES else {}


def _bar(low: str, high: str) -> Figure:
    place = {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "thickness": 10, "len": 0.6}
    return place | {"tickvals": [0, 1], "ticktext": [low, high], "outlinewidth": 0}


def _rule(**place: Any) -> Figure:
    return {"type": "line", "line": {"color": "var(--muted)", "width": 1, "dash": "dash"}, "layer": "below", **place}


def _note(text: str, **place: Any) -> Figure:
    return {"text": html.escape(text), "showarrow": False, "font": {"size": 11, "color": "var(--muted)"}, **place}


def _lines(*parts: str) -> str:
    wrapped = [line for part in parts for line in textwrap.wrap(formats.label(part), 56)]
    return "<br>".join(_safe(wrapped))


def _safe(names: Iterable[str]) -> list[str]:
    return [html.escape(formats.label(n)) for n in names]


def _json(x: float) -> float | None:
    return x if math.isfinite(x) else None
