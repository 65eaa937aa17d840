"""The verdict in words, before any chart: what was asked, what was reached, what it cost, and how far to trust it.

Decision: every sentence carries its numbers, and a sentence that can disappoint ("it did not get faster") is written as plainly
as one that can please. The page shows these sentences and adds no judgement of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from layerwise.consensus import DISAGREE, Disagreement
from layerwise.report import formats
from layerwise.report.story import Story
from layerwise.result import CompressionResult, Proof
from layerwise.scores import Status
from layerwise.target import Target

SENSES = {"<=": "≤", ">=": "≥"}
AGREE = 0.7  # median rho: "agree" from here on (its interval above `DISAGREE`), "disagree" below `DISAGREE`
SAME_SIZE = 0.995  # a change below half a percent is not called smaller
NAMED = 3


@dataclass(frozen=True)
class Statement:
    """One sentence and its tone: good, bad, warn or info."""

    tone: str
    text: str


@dataclass(frozen=True)
class Verdict:
    """The headline and the sentences under it."""

    headline: Statement
    statements: tuple[Statement, ...]


def verdict(story: Story) -> Verdict:
    """What the page says first."""
    if story.result is not None:
        parts = [asked(story), *reached(story, story.result), *costs(story, story.result)]
        parts += [speed(story, story.result), proofs(story, story.result)]
    elif story.plan is not None:
        parts = [asked(story), *planned(story)]
    else:
        parts = []
    parts += [agreement(story), *disagreements(story), *removal(story), *layers(story)]
    parts += [Statement("info", note) for note in story.report.notes]
    return Verdict(headline(story), tuple(parts))


def headline(story: Story) -> Statement:
    """The one sentence for those who read no further; the worst news wins."""
    say, result = story.say, story.result
    if result is None:
        plan = story.plan
        return Statement("info", say("head.analysis" if plan is None else "head.plan" if plan.steps else "head.empty"))
    if not result.proven:
        return Statement("bad", say("head.proof"))
    if any(met is not True for _, met in outcomes(result)):
        return Statement("bad", say("head.missed"))
    if not any(p.passed for p in result.proofs):
        return Statement("warn", say("head.unproven"))
    return Statement("good", say("head.met" if result.plan.targets else "head.free"))


def outcomes(result: CompressionResult) -> list[tuple[Target, bool | None]]:
    """Each target with whether it is met; None where a figure it needs was not measured."""
    before, after = result.before.figures(), result.after.figures()
    return [
        (t, t.met(before.get(t.metric, math.nan), after[t.metric]) if _judgeable(t, before, after) else None)
        for t in result.plan.targets
    ]


def asked(story: Story) -> Statement:
    """The budget, each relative bound also in its own unit."""
    plan = story.planned
    if plan is None or not plan.targets:
        return Statement("info", story.say("asked.nothing"))
    before = story.result.before.figures() if story.result is not None else plan.before
    targets = [target_in_words(story, t, before.get(t.metric, math.nan)) for t in plan.targets]
    return Statement("info", story.say("asked", targets=story.say("comma").join(targets)))


def target_in_words(story: Story, target: Target, before: float) -> str:
    """``size ≤ 0.5× the original (that is 43 MB)``."""
    sense, metric = SENSES[target.sense], story.metric(target.metric)
    if not target.relative:
        return story.say("target", metric=metric, sense=sense, bound=formats.figure(target.metric, target.bound))
    bound = story.say("target.before", bound=formats.times(target.bound))
    if not math.isfinite(before):
        return story.say("target", metric=metric, sense=sense, bound=bound)
    limit = formats.figure(target.metric, target.limit(before))
    return story.say("target.limit", metric=metric, sense=sense, bound=bound, limit=limit)


def reached(story: Story, result: CompressionResult) -> Iterator[Statement]:
    """Each target with the measured figure; the size is always said."""
    say, before, after = story.say, result.before.figures(), result.after.figures()
    for target, met in outcomes(result):
        name, was = target.metric, before.get(target.metric, math.nan)
        if met is None:
            yield Statement("warn", say("target.unknown", target=target_in_words(story, target, was)))
            continue
        yield Statement(
            "good" if met else "bad",
            say(
                "target.met" if met else "target.missed",
                metric=story.metric(name),
                after=formats.figure(name, after[name]),
                ratio=formats.times(formats.quotient(was, after[name])),
                sense=SENSES[target.sense],
                limit=formats.figure(name, target.limit(was) if target.relative else target.bound),
            ),
        )
    if "size" not in {t.metric for t in result.plan.targets}:
        yield size(story, result)
    zeros = 1 - result.after.nonzero / max(result.after.params, 1)
    if zeros > 0.05:
        yield Statement("info", say("zeros", share=formats.percent(round(zeros, 4))))


def size(story: Story, result: CompressionResult) -> Statement:
    """Whether the model got smaller at all."""
    before, after = formats.size(result.before.size), formats.size(result.after.size)
    if formats.quotient(result.before.size, result.after.size) > SAME_SIZE:
        return Statement("warn", story.say("size.same", before=before, after=after))
    ratio = formats.times(formats.quotient(result.before.size, result.after.size))
    return Statement("good", story.say("size", before=before, after=after, ratio=ratio))


def costs(story: Story, result: CompressionResult) -> Iterator[Statement]:
    """What each metric lost, with the standard error of the difference."""
    names = [name for name in result.before.metrics if name in result.after.metrics]
    for name in names:
        before, after = result.before.metrics[name], result.after.metrics[name]
        errors = [m.stderr.get(name, math.nan) for m in (result.before, result.after)]
        error = math.hypot(*errors)
        tone, phrase = _quality(name, after - before, error)
        text = story.say(
            phrase,
            metric=story.metric(name),
            before=formats.with_spread(name, before, errors[0]),
            after=formats.with_spread(name, after, errors[1]),
            change=change_in_words(story, name, after - before, error),
            error=story.say("quality.error" if math.isfinite(error) else "quality.noerror"),
        )
        yield Statement(tone, text)
    if not names:
        yield Statement("warn", story.say("quality.none"))


def _quality(name: str, by: float, error: float) -> tuple[str, str]:
    if name not in formats.HIGHER_IS_BETTER | formats.LOWER_IS_BETTER or not math.isfinite(by):
        return "info", "quality.changed"
    if math.isfinite(error) and abs(by) <= error:
        return "info", "quality.same"
    better = by >= 0 if name in formats.HIGHER_IS_BETTER else by <= 0
    return ("good", "quality.better") if better else ("warn", "quality.worse")


def change_in_words(story: Story, name: str, by: float, error: float = math.nan) -> str:
    """A signed change of one metric; shares in percentage points."""
    text = formats.change(name, by, error)
    return story.say("points", change=text) if name in formats.SHARES else text


def speed(story: Story, result: CompressionResult) -> Statement:
    """Whether it got faster: only when the two spreads (half the interquartile range each) do not overlap."""
    say, before, after = story.say, result.before, result.after
    if before.device != after.device:
        reason = say("speed.devices", before=before.device, after=after.device)
        return Statement("warn", say("speed.unknown", reason=reason))
    if not (math.isfinite(before.latency) and math.isfinite(after.latency)):
        return Statement("warn", say("speed.unknown", reason=say("speed.unmeasured")))
    gap = before.latency - after.latency
    noise = sum(s for s in (before.latency_spread, after.latency_spread) if math.isfinite(s))
    phrase = "speed.none" if abs(gap) <= noise else "speed.faster" if gap > 0 else "speed.slower"
    return Statement(
        "good" if phrase == "speed.faster" else "warn",
        say(
            phrase,
            ratio=formats.times(formats.quotient(after.latency, before.latency)),
            before=formats.with_spread("latency", before.latency, before.latency_spread),
            after=formats.with_spread("latency", after.latency, after.latency_spread),
            batch=formats.count(before.batch_size),
            device=before.device,
        ),
    )


def proofs(story: Story, result: CompressionResult) -> Statement:
    """How many checks held; the first that failed is named."""
    say, checks = story.say, result.proofs
    failed = [p for p in checks if p.passed is False]
    passed = sum(p.passed is True for p in checks)
    absent = len(checks) - passed - len(failed)
    if failed:
        first = failed[0]
        text = say("proofs.failed", failed=len(failed), passed=passed, na=absent, name=first.name, detail=_detail(first))
        return Statement("bad", text + (" " + say("proofs.layer", layer=first.layer) if first.layer else ""))
    return Statement("good", say("proofs.held", passed=passed, na=absent)) if passed else Statement("warn", say("proofs.none"))


def planned(story: Story) -> Iterator[Statement]:
    """The planner's own figures, while there is no result."""
    plan = story.plan
    if plan is None:
        return
    for name in [m for m in plan.predicted if m in plan.before]:
        before, after = plan.before[name], plan.predicted[name]
        text = story.say(
            "plan.figure",
            metric=story.metric(name),
            before=formats.figure(name, before),
            after=formats.figure(name, after),
            ratio=formats.times(formats.quotient(before, after)),
        )
        broken = any(not t.met(before, after) for t in plan.targets if t.metric == name)
        yield Statement("bad" if broken else "info", text)


def agreement(story: Story) -> Statement:
    """Whether the methods say the same, by the median rho over the pairs of voting methods."""
    concord = story.concord
    if not math.isfinite(concord.median):
        return Statement("warn", story.say("agree.none"))
    firm = concord.median >= AGREE and concord.low >= DISAGREE
    tone, phrase = ("good", "agree.strong") if firm else ("warn", "agree.part")
    phrase = "agree.weak" if concord.median < DISAGREE else phrase
    rho, low, high = (formats.number(x, 2) for x in (concord.median, concord.low, concord.high))
    return Statement(tone, story.say(phrase, rho=rho, low=low, high=high, methods=len(story.report.voters())))


def disagreements(story: Story) -> Iterator[Statement]:
    """Which methods disagree about which layers, the worst pairs by name."""
    found = story.report.disagreements()
    for pair in found[:NAMED]:
        yield Statement("warn", _disagreement(story, pair))
    if len(found) > NAMED:
        yield Statement("warn", story.say("disagree.more", more=len(found) - NAMED))


def _disagreement(story: Story, pair: Disagreement) -> str:
    say = story.say
    named = [say("disagree.layer", layer=formats.label(c.layer, 48), a=c.first, b=c.second) for c in pair.contested]
    rho = formats.number(pair.rho, 2)
    first, second = story.method(pair.first), story.method(pair.second)
    return say("disagree.pair", first=first, second=second, rho=rho, layers=pair.layers, names=say("comma").join(named))


def removal(story: Story) -> Iterator[Statement]:
    """Where the removal curve ends."""
    curve = story.report.removal
    if curve is None or len(curve.values) < 2:
        return
    before, after = (formats.figure(curve.metric, v) for v in (curve.values[0], curve.values[-1]))
    k, total = len(curve.values) - 1, len(story.report.coarsest().layers)
    yield Statement(
        "info", story.say("removal.said", k=k, total=total, metric=story.metric(curve.metric), before=before, after=after)
    )


def layers(story: Story) -> Iterator[Statement]:
    """The ends of the consensus ranking, the caveat, and what has no score."""
    say, report = story.say, story.report.coarsest()
    ranked = list(report.consensus().ranks())
    shown = min(NAMED, len(ranked) // 2)
    if shown:
        names = [formats.label(n, 48) for n in ranked]
        yield Statement("info", say("layers.top", names=say("comma").join(names[:shown])))
        lowest = say("layers.low", names=say("comma").join(reversed(names[-shown:])))
        yield Statement("info", f"{lowest} {say('layers.caveat')}")
    if story.heatmap.hidden:
        yield Statement("info", say("layers.hidden", hidden=story.heatmap.hidden, total=len(story.report.layers)))
    entries = [e for s in story.report.scores.values() for e in s.entries.values()]
    lost = sum(e.status is not Status.OK for e in entries)
    if lost:
        failed = sum(e.status is Status.FAILED for e in entries)
        yield Statement("warn", say("layers.missing", missing=lost, total=len(entries), failed=failed))


def _judgeable(target: Target, before: dict[str, float], after: dict[str, float]) -> bool:
    needed = [after.get(target.metric, math.nan)] + [before.get(target.metric, math.nan)] * target.relative
    return all(map(math.isfinite, needed))


def _detail(proof: Proof) -> str:
    return proof.detail.rstrip(".") + "." if proof.detail else formats.DASH
