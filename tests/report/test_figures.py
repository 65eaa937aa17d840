"""Charts: valid plotly figures with titled axes, SVG files that parse, and missing scores that are seen."""

from __future__ import annotations

import html
import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from layerwise.plan import Candidate
from layerwise.report import figures, views
from layerwise.report.drawings import alternatives, drawings
from layerwise.report.palette import blend, readable_on
from layerwise.report.story import Story
from layerwise.report.svg import Scale, padded
from layerwise.report.words import Words
from layerwise.scores import Status
from tests.report import factory

NAMES = {"heatmap", "agreement", "removal", "pareto"}
EVIL = "</script><script>alert(\"x\")</script>\n.layer & '0'"


@pytest.fixture(scope="module")
def story() -> Story:
    base = factory.report(methods=3)
    base = factory.with_missing(base, "encoder.layer.2", Status.NOT_APPLICABLE, "no matrix of two dimensions")
    return Story(replace(base, removal=factory.removal(base)), Words("en"), result=factory.result())


def test_each_figure_is_valid_plotly_with_titled_axes(story: Story) -> None:
    from plotly.graph_objects import Figure

    drawn = figures.figures(story)
    assert drawn.keys() == NAMES
    for figure in drawn.values():
        checked = Figure({"data": figure["data"], "layout": _coloured(figure["layout"])}, skip_invalid=False)
        assert checked.layout.xaxis.title.text
        assert checked.layout.yaxis.title.text


def _coloured(layout: dict[str, object]) -> dict[str, object]:
    """The page's script replaces var(--name) by colours; for plotly's own check any colour will do."""
    import json
    import re

    plain: dict[str, object] = json.loads(re.sub(r"var\(--[a-z]+\)", "#000000", json.dumps(layout)))
    return plain


def test_a_layer_without_a_score_is_hatched_and_says_why(story: Story) -> None:
    figure = figures.heatmap(story)
    assert figure is not None
    missing, ranked = figure["data"]
    assert ranked["z"][2][0] is None
    assert missing["z"][2][0] == 0
    assert [z for row in missing["z"] for z in row].count(0) == 1
    assert any(s["type"] == "path" and s["path"] for s in figure["layout"]["shapes"])
    assert "does not apply<br>no matrix of two dimensions" in missing["hovertext"][2][0]


def test_hover_shows_score_error_unit_and_rank(story: Story) -> None:
    figure = figures.heatmap(story)
    assert figure is not None
    shown = figure["data"][1]["hovertext"][0][1]
    assert "± 0.02" in shown
    assert "nats" in shown
    assert "rank 1 of 6" in shown


def test_the_consensus_comes_last_and_baselines_do_not_vote(story: Story) -> None:
    chart = story.heatmap
    assert chart.methods[-1] == "consensus"
    assert story.method("random") == "random (baseline)"
    assert all("random" not in (p.first, p.second) for p in story.concord.drawn)
    assert any("random" in (p.first, p.second) for p in story.concord.pairs)


def test_pareto_states_limits_and_front(story: Story) -> None:
    chart = story.pareto
    assert chart is not None
    assert [p.state for p in chart.points].count("chosen") == 1
    assert {p.state for p in chart.points} == {"before", "chosen", "feasible", "infeasible"}
    assert chart.size_limit == pytest.approx(43e6)
    assert chart.quality_limit == pytest.approx(0.98 * 0.924)
    assert [p.size for p in chart.front()] == [30e6, 40e6, 42e6, 60e6, 86e6]


def test_the_front_of_a_loss_goes_down() -> None:
    points = tuple(views.Point("feasible", s, q, "") for s, q in ((1.0, 3.0), (2.0, 4.0), (3.0, 1.0)))
    assert [p.size for p in views.Pareto("loss", points, math.nan, math.nan, 0).front()] == [1.0, 3.0]


def test_a_candidate_without_figures_is_counted_not_drawn() -> None:
    plan = factory.plan()
    broken = Candidate(plan.steps[:1], {"size": 1.0}, False)
    chart = views.pareto(replace(plan, candidates=(*plan.candidates, broken)))
    assert chart is not None
    assert chart.unplaced == 1
    assert chart.points == views.pareto(plan).points  # type: ignore[union-attr]


def test_a_plan_without_figures_has_no_scatter() -> None:
    assert views.pareto(replace(factory.plan(("size<=0.5x",)), candidates=(), before={}, predicted={})) is None


def test_each_svg_parses_and_is_described(story: Story) -> None:
    drawn = drawings(story)
    assert drawn.keys() == NAMES == alternatives(story).keys()
    for text in drawn.values():
        root = ElementTree.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert len(root.findtext("{*}title") or "") > 5
        assert len(root.findtext("{*}desc") or "") > 10
        assert len(root.findall("{*}text")) > 4
        assert not [e for e in root.iter() if e.get("id") or e.get("href")]
    assert drawn["heatmap"].count("#e4e4e4") == 2  # the one cell and the legend


def test_what_a_user_named_cannot_break_out() -> None:
    base = factory.renamed(factory.report(layers=4, methods=2), "encoder.layer.0", EVIL)
    scores = {f"{name}{EVIL}": replace(s, method=f"{name}{EVIL}") for name, s in base.scores.items()}
    story = Story(replace(base, scores=scores), Words("en"))
    for text in drawings(story).values():
        ElementTree.fromstring(text)
        assert "<script" not in text
    figure = figures.heatmap(story)
    assert figure is not None
    texts = [*figure["layout"]["yaxis"]["ticktext"], *figure["layout"]["xaxis"]["ticktext"], figure["data"][1]["hovertext"][0][0]]
    assert not [t for t in texts if "<script" in t or "\n" in t]
    assert html.escape("\\n.layer & '0'") in figure["data"][1]["hovertext"][0][0]


def test_short_names() -> None:
    assert views.short_names(["a.b.0", "a.b.1"]) == ["b.0", "b.1"]
    assert views.short_names(["a.b.conv", "a.c.conv"]) == ["b.conv", "c.conv"]
    assert views.short_names(["only.one"]) == ["only.one"]
    assert views.short_names([]) == []


def test_scales() -> None:
    assert list(Scale(0.0, 8.0, 0, 100).ticks()) == [0, 2, 4, 6, 8]
    flat = padded([2.0, math.nan, 2.0], 0, 100)
    assert flat(2.0) == pytest.approx(50)


def test_text_is_readable_on_every_colour() -> None:
    assert readable_on("#ffffff") == "#1a1a1a"
    assert readable_on("#440154") == "#ffffff"
    assert blend(("#000000", "#ffffff"), 0.5) == "#808080"


def test_layers_with_equal_scores_share_a_rank_and_the_middle_colour() -> None:
    base = factory.report(layers=4, methods=2)
    scores = base.scores["method_0"] if "method_0" in base.scores else next(iter(base.scores.values()))
    equal = {name: replace(entry, value=1.0) for name, entry in scores.entries.items()}
    chart = views.heatmap(replace(base, scores={**base.scores, scores.method: replace(scores, entries=equal)}))
    column = [row[chart.methods.index(scores.method)] for row in chart.rows]
    assert {cell.place for cell in column} == {"=1"}
    assert {cell.share for cell in column} == {0.5}


def test_the_last_methods_of_many_keep_their_names() -> None:
    figure = figures.heatmap(Story(factory.report(methods=20), Words("en")))
    assert figure is not None
    assert figure["layout"]["xaxis"]["ticklabeloverflow"] == "allow"  # plotly leaves out what leans over the edge otherwise
    assert figure["layout"]["margin"]["r"] > figure["narrow"]["margin.r"]
