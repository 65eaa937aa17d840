"""What is committed agrees with itself: the page with the results, and the default methods with the protocol's rule."""

from __future__ import annotations

from typing import Any

import pytest

from layerwise.benchmark.choice import auto_rule, overall
from layerwise.benchmark.faithfulness import load_results
from layerwise.benchmark.page import page
from layerwise.benchmark.protocol import LEAST_LAYERS, LEAST_RELIABILITY, PROTOCOL
from layerwise.selection import AUTO
from tests.conftest import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "faithfulness.json"


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return load_results(RESULTS)


def test_the_page_is_the_one_that_the_results_give(results: dict[str, Any]) -> None:
    assert page(results) == (ROOT / "docs" / "faithfulness.md").read_text(encoding="utf-8"), (
        "run benchmarks/faithfulness.py --page"
    )


def test_the_default_methods_are_those_that_the_rule_gives(results: dict[str, Any]) -> None:
    assert auto_rule(results) == tuple(results["auto"]) == AUTO


def test_the_results_are_of_this_protocol_and_hold_enough_models(results: dict[str, Any]) -> None:
    assert results["protocol"]["version"] == PROTOCOL
    assert len(results["subjects"]) >= 8
    assert {s["domain"] for s in results["subjects"]} == {"text", "vision", "audio"}


def test_no_refused_target_was_judged(results: dict[str, Any]) -> None:
    refused = {(t["model"], t["damage"], t["metric"]) for t in results["targets"] if t["refused"]}
    judged = {(r["model"], r["damage"], r["metric"]) for r in results["correlations"]}
    assert not refused & judged
    for target in results["targets"]:
        good = target["layers"] >= LEAST_LAYERS and (target["reliability"] or 0) >= LEAST_RELIABILITY
        assert good == (not target["refused"])


def test_every_trained_model_learned_its_task(results: dict[str, Any]) -> None:
    quality = {s["model"]: s["quality"] for s in results["subjects"]}
    for name in ("digits_vit", "digits_mlp", "fsdd_cnn", "fsdd_transformer"):
        assert quality[name]["accuracy"] > 0.9, name
    assert quality["charlm"]["perplexity"] < 8  # 65 characters, each as likely as the next, would be 65


def test_scores_that_look_at_weights_change_with_them(results: dict[str, Any]) -> None:
    """The sanity check of the protocol: only what knows nothing of weights or data may stay the same."""
    same = {r["method"] for r in overall(results) if r["changed"] is False}
    assert same <= {"random", "depth", "depth(reverse)", "parameter_count"}
