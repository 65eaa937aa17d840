"""The verdict says what happened, above all when it disappoints."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from layerwise.report.story import Story
from layerwise.report.tiles import tiles
from layerwise.report.verdict import Verdict, verdict
from layerwise.report.words import Words
from layerwise.result import Proof
from layerwise.scores import Scores, Status
from tests.report import factory


def told(lang: str = "en", **parts: Any) -> Verdict:
    base = parts.pop("report", None) or factory.report(methods=2)
    return verdict(Story(base, Words(lang), **parts))


def tones(found: Verdict, start: str) -> list[str]:
    return [s.tone for s in found.statements if s.text.startswith(start)]


def text(found: Verdict) -> str:
    return "\n".join(s.text for s in found.statements)


def test_met() -> None:
    found = told(result=factory.result())
    assert found.headline.tone == "good"
    assert found.headline.text == "The budget was met, and every proof that applies held."
    assert "Asked for: size ≤ 0.5× the original (that is 43 MB), accuracy ≥ 0.98× the original (that is 90.55 %)." in text(found)
    assert "Met: size is 42 MB (0.488× the original), allowed ≤ 43 MB." in text(found)
    assert "accuracy went from 92.4 ± 0.4 % to 91.7 ± 0.41 %, −0.7 ± 0.57 points" in text(found)
    assert tones(found, "It got faster: 1.5× the speed") == ["good"]
    assert tones(found, "All proofs that apply held: 3 passed, 1 not applicable.") == ["good"]


def test_missed() -> None:
    found = told(result=factory.result(after=factory.smaller(size=50_000_000)))
    assert found.headline.text == "The budget was not met."
    assert tones(found, "Missed: size is 50 MB (0.581× the original), allowed ≤ 43 MB.") == ["bad"]


def test_a_target_whose_metric_was_not_measured_is_not_met() -> None:
    found = told(result=factory.result(targets=("perplexity<=1.1x",)))
    assert found.headline.text == "The budget was not met."
    assert tones(found, "Not measured: nothing says whether perplexity") == ["warn"]


def test_an_absolute_target_needs_no_original() -> None:
    found = told(result=factory.result(targets=("latency<=9ms",)))
    assert "Asked for: latency per batch ≤ 9 ms." in text(found)
    assert tones(found, "Met: latency per batch is 8 ms") == ["good"]


def test_a_failed_proof_outweighs_a_met_budget() -> None:
    failed = Proof("reload", False, "outputs differ", 0.3, 1e-6, layer="encoder.layer.2")
    found = told(result=factory.result(proofs=(*factory.PROOFS[:2], failed)))
    assert found.headline.tone == "bad"
    assert found.headline.text == "A proof failed: do not use this compressed model."
    said = "Proofs failed: 1 failed, 2 passed, 0 not applicable. First failure: reload – outputs differ."
    assert f"{said} The first layer that diverges is encoder.layer.2." in text(found)


@pytest.mark.parametrize("proofs", [(), (Proof("reload", None, "no artifact"),)])
def test_without_a_proof_nothing_is_proven(proofs: tuple[Proof, ...]) -> None:
    found = told(result=factory.result(proofs=proofs))
    assert found.headline.text.startswith("Nothing is proven")
    assert tones(found, "No proof applied") == ["warn"]


@pytest.mark.parametrize(
    ("latency", "said"),
    [
        (11.8, "It did not get faster: 12 ± 0.3 ms before, 11.8 ± 0.3 ms after"),
        (15.0, "It did not get faster but slower: 12 ± 0.3 ms → 15 ± 0.3 ms"),
        (math.nan, "Speed was not compared: a latency is missing."),
    ],
)
def test_no_speed_up_is_said_plainly(latency: float, said: str) -> None:
    found = told(result=factory.result(after=factory.smaller(latency=latency)))
    assert tones(found, said) == ["warn"]


def test_two_devices_cannot_be_compared() -> None:
    found = told(result=factory.result(after=factory.smaller(device="cuda:0")))
    assert tones(found, "Speed was not compared: before ran on cpu, after on cuda:0.") == ["warn"]


def test_a_model_that_did_not_shrink_and_zeros_that_cost_the_same() -> None:
    after = factory.smaller(size=86_000_000, params=100, nonzero=60)
    found = told(result=factory.result(after=after, targets=()))
    assert tones(found, "The model did not get smaller: 86 MB before, 86 MB after.") == ["warn"]
    assert tones(found, "40 % of the parameters are zero.") == ["info"]
    assert tones(found, "No budget was asked for.") == ["info"]


@pytest.mark.parametrize(
    ("accuracy", "stderr", "said", "tone"),
    [
        (0.922, 0.004, "No change of accuracy beyond its standard error", "info"),
        (0.95, 0.004, "Quality did not fall: accuracy went", "good"),
        (0.80, math.nan, "Quality was lost: accuracy went", "warn"),
    ],
)
def test_the_cost_in_quality(accuracy: float, stderr: float, said: str, tone: str) -> None:
    after = factory.smaller(metrics={"accuracy": accuracy}, stderr={"accuracy": stderr})
    found = told(result=factory.result(after=after))
    assert tones(found, said) == [tone]
    assert ("the standard error is not known" in text(found)) is math.isnan(stderr)


def test_lower_is_better_for_a_loss_and_unknown_metrics_are_not_judged() -> None:
    before = factory.measured(metrics={"loss": 0.3, "spice": 30.0}, stderr={})
    after = factory.smaller(metrics={"loss": 0.2, "spice": 10.0}, stderr={})
    found = told(result=factory.result(before=before, after=after, targets=()))
    assert tones(found, "Quality did not fall: loss went") == ["good"]
    assert tones(found, "spice went from 30 to 10, −20") == ["info"]


@pytest.mark.parametrize(
    ("noise", "said", "tone"),
    [
        (0.05, "The importance methods agree: median pairwise ρ = 1 (95 % interval 1 … 1) over 3 methods.", "good"),
        (0.4, "The importance methods agree only in part: median pairwise ρ = 0.66 (95 % interval −1 … 0.92)", "warn"),
        (3.0, "The importance methods disagree: median pairwise ρ = −0.14", "warn"),
    ],
)
def test_agreement_in_words(noise: float, said: str, tone: str) -> None:
    found = told(report=factory.report(methods=3, noise=noise))
    assert tones(found, said) == [tone]


def test_methods_that_disagree_are_named_with_their_layers_in_both_languages() -> None:
    base = factory.report(layers=8, methods=2, noise=0.0)
    turned = {n: replace(e, value=-e.value) for n, e in base.scores["method_1"].entries.items()}
    base = replace(base, scores={**base.scores, "method_1": replace(base.scores["method_1"], entries=turned)})
    said = "method_0 and method_1 disagree (ρ = −1 over 8 layers), most about encoder.layer.0 (rank 1 against 8)"
    assert tones(told(report=base), said) == ["warn"]
    assert tones(told("zh", report=base), "method_0 与 method_1 不一致（8 层，ρ = −1），分歧最大的是") == ["warn"]
    assert tones(told(report=factory.report(methods=2, noise=0.0)), "method_0 and") == []


def test_one_method_has_nothing_to_agree_with() -> None:
    assert tones(told(report=factory.report(methods=1)), "The agreement of methods is unknown") == ["warn"]


def test_analysis_only_names_the_ends_and_the_caveat() -> None:
    found = told(report=factory.report(methods=3))
    assert found.headline.text == "An analysis only: nothing was compressed."
    assert "Most important by consensus: encoder.layer.0, encoder.layer.1, encoder.layer.2." in text(found)
    assert "Least important by consensus: encoder.layer.5, encoder.layer.4, encoder.layer.3." in text(found)
    assert "not a proof that it can go" in text(found)
    assert "Asked for" not in text(found)


def test_missing_scores_and_notes_are_not_hidden() -> None:
    base = factory.report(methods=2, notes=("Two images could not be read.",))
    found = told(report=factory.with_missing(base, "encoder.layer.3", Status.FAILED, "the score came out as nan"))
    assert tones(found, "1 of 18 scores are missing (1 failed). A layer without a score is not a safe layer.") == ["warn"]
    assert "Two images could not be read." in text(found)


def test_a_plan_is_called_a_plan() -> None:
    found = told(plan=factory.plan())
    assert found.headline.text == "A plan only: nothing has been compressed yet."
    assert tones(found, "Measured while planning: size 86 MB → 42 MB (0.488× the original).") == ["info"]
    tight = replace(factory.plan(("size<=0.4x",)), steps=())
    assert told(plan=tight).headline.text.startswith("The plan has no step")
    assert tones(told(plan=tight), "Measured while planning: size") == ["bad"]


def test_the_removal_curve_in_words() -> None:
    base = factory.report(methods=2)
    found = told(report=replace(base, removal=factory.removal(base)))
    assert "Skipping 4 of 6 layers in the measured order moves accuracy from 92.4 % to 55 %." in text(found)


def test_the_tiles_carry_the_tone_of_their_sentence() -> None:
    story = Story(factory.report(methods=2), Words("en"), result=factory.result(after=factory.smaller(latency=12.0)))
    found = {t.name: (t.value, t.tone) for t in tiles(story)}
    assert found["size"] == ("0.488×", "good")
    assert found["speed"] == ("1×", "warn")
    assert found["accuracy (points)"] == ("−0.7", "info")
    assert found["proofs held"] == ("3/3", "good")


def test_no_layers_and_no_methods_still_give_a_verdict() -> None:
    empty = replace(factory.report(), layers=(), scores={})
    assert told(report=empty).headline.text == "An analysis only: nothing was compressed."
    no_scores = {"m": Scores("m", "nats", {})}
    assert "unknown" in text(told(report=replace(empty, scores=no_scores)))


def test_chinese() -> None:
    found = told("zh", result=factory.result())
    assert found.headline.text == "达到预算要求，所有适用的验证均通过。"
    assert "速度变快：为原来的 1.5×" in text(found)
