"""The four figures at the top of the page: of the compression where there is one, else of the analysis."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from layerwise.report import formats
from layerwise.report.story import Story
from layerwise.report.verdict import AGREE, size, speed
from layerwise.result import CompressionResult
from layerwise.scores import Status


@dataclass(frozen=True)
class Tile:
    """One figure that is read at a glance, with the tone of the sentence that explains it."""

    tone: str
    value: str
    name: str


def tiles(story: Story) -> Iterator[Tile]:
    """What was gained and what it cost, or how much was analysed; the agreement of the methods last."""
    rho = story.concord.median
    yield from _analysed(story) if story.result is None else _compressed(story, story.result)
    yield Tile("good" if rho >= AGREE else "warn", formats.number(rho, 2), story.say("tile.agreement"))


def _analysed(story: Story) -> Iterator[Tile]:
    entries = [e for s in story.report.scores.values() for e in s.entries.values()]
    lost = sum(e.status is not Status.OK for e in entries)
    yield Tile("info", formats.count(len(story.report.layers)), story.say("tile.layers"))
    yield Tile("info", formats.count(len(story.report.scores)), story.say("tile.methods"))
    yield Tile("warn" if lost else "good", formats.count(lost), story.say("tile.missing"))


def _compressed(story: Story, result: CompressionResult) -> Iterator[Tile]:
    before, after = result.before, result.after
    yield Tile(size(story, result).tone, formats.times(formats.quotient(before.size, after.size)), story.say("tile.size"))
    for name in [n for n in before.metrics if n in after.metrics][:1]:
        by = after.metrics[name] - before.metrics[name]
        title = story.metric(name)
        title = story.say("tile.points", metric=title) if name in formats.SHARES else title
        yield Tile("info", formats.change(name, by), title)
    quick = formats.times(formats.quotient(after.latency, before.latency))
    yield Tile(speed(story, result).tone, quick, story.say("tile.speed"))
    held, applied = (sum(p.passed in wanted for p in result.proofs) for wanted in ((True,), (True, False)))
    yield Tile("good" if held == applied and held else "bad", f"{held}/{applied}", story.say("tile.proofs"))
