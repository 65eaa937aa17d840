"""Weights from reliability, and the words of methods that contradict each other."""

from __future__ import annotations

import math

import numpy as np
import pytest

from layerwise.consensus import combined, disagreements, reliability, reliability_weights
from layerwise.errors import UsageError
from layerwise.importance import ImportanceReport, LayerInfo
from layerwise.ranks import spearman
from layerwise.scores import LayerScore, Scores, Status

NAMES = [f"blocks.{i}" for i in range(12)]


def scores(method: str, values: np.ndarray, stderr: float = math.nan) -> Scores:
    return Scores(method, "nats", {n: LayerScore(float(v), stderr) for n, v in zip(NAMES, values, strict=True)})


def report(*methods: Scores) -> ImportanceReport:
    layers = tuple(LayerInfo(n, i, "mlp", 10, True, "blocks") for i, n in enumerate(NAMES))
    return ImportanceReport("net", "classification", "digits", layers, {s.method: s for s in methods})


def test_ranks_without_error_are_fully_reliable_and_ranks_of_noise_are_not() -> None:
    values = np.arange(12.0)
    assert reliability(scores("a", values, 0.0)) == pytest.approx(1.0)
    assert abs(reliability(scores("a", values, 1e6))) < 0.05
    assert math.isnan(reliability(scores("a", values)))


def test_reliability_is_the_expected_rank_correlation_of_a_repeated_measurement() -> None:
    values, rng = np.arange(12.0), np.random.default_rng(9)
    slow = np.mean([spearman(values, values + 4.0 * rng.standard_normal(12)) for _ in range(4000)])
    assert reliability(scores("a", values, 4.0)) == pytest.approx(slow, abs=0.02)


def test_a_method_without_an_error_gets_the_median_weight() -> None:
    values = np.arange(12.0)
    voters = {
        "a": scores("a", values, 0.0),
        "b": scores("b", values, 1e6),
        "c": scores("c", values, 1.0),
        "w": scores("w", values),
    }
    weights = reliability_weights(voters)
    assert weights["w"] == weights["c"]
    assert weights["a"] > weights["c"] > weights["b"]
    assert reliability_weights({"w": voters["w"]}) == {"w": 1.0}


def test_the_reliable_method_decides_where_the_other_is_noise() -> None:
    truth = np.arange(12.0)
    noise = np.random.default_rng(0).normal(size=12)
    found = report(scores("firm", truth, 0.01), scores("noise", noise, 50.0))
    assert spearman(np.array(list(found.consensus("reliability").values())), truth) > 0.99
    assert spearman(np.array(list(found.consensus().values())), truth) < 0.9
    assert found.consensus("reliability").settings["how"] == "reliability"


def test_equal_weights_give_the_mean_and_its_standard_error() -> None:
    a, b, c = (scores(m, np.random.default_rng(i).normal(size=12)) for i, m in enumerate("abc"))
    votes = np.array([[(v > np.array(list(s.values()))).sum() / 11 for v in s.values()] for s in (a, b, c)])
    found = combined(NAMES, {"a": a, "b": b, "c": c}, dict.fromkeys("abc", 2.0), "borda")
    assert list(found.values()) == pytest.approx(votes.mean(0))
    assert [e.stderr for e in found.entries.values()] == pytest.approx(votes.std(0, ddof=1) / math.sqrt(3))


def test_a_layer_that_nobody_scored_has_no_consensus() -> None:
    entries = {**scores("a", np.arange(12.0)).entries, "blocks.3": LayerScore.missing(Status.FAILED, "why")}
    found = report(Scores("a", "nats", entries)).consensus("reliability")
    assert found.entries["blocks.3"].status is Status.NOT_APPLICABLE


def test_the_pair_that_disagrees_is_named_with_the_layers_it_disagrees_about() -> None:
    base = np.arange(12.0)
    moved = base.copy()
    moved[[0, 11]] = moved[[11, 0]]
    moved[[1, 10]] = moved[[10, 1]]
    found = report(scores("a", base), scores("b", base + 0.1), scores("c", moved))
    pairs = disagreements(found.scores)
    assert [(p.first, p.second) for p in pairs] == [("a", "c"), ("b", "c")]
    assert [(c.layer, c.first, c.second) for c in pairs[0].contested[:2]] == [("blocks.0", 12, 1), ("blocks.11", 1, 12)]
    assert "a and c disagree" in found.disagreement()
    assert "blocks.0 (rank 12 against 1)" in found.disagreement()
    assert "a and b" not in found.disagreement()


def test_methods_that_agree_or_have_too_few_layers_raise_no_warning() -> None:
    base = np.arange(12.0)
    assert report(scores("a", base), scores("b", base**2)).disagreement() == ""
    few = {n: LayerScore(v) for n, v in zip(NAMES[:3], (1.0, 2.0, 3.0), strict=True)}
    back = {n: LayerScore(-v) for n, v in zip(NAMES[:3], (1.0, 2.0, 3.0), strict=True)}
    assert disagreements({"a": Scores("a", "", few), "b": Scores("b", "", back)}) == []


def test_many_disagreeing_pairs_are_counted_and_not_listed() -> None:
    rng = np.random.default_rng(3)
    found = report(*(scores(f"m{i}", rng.normal(size=12)) for i in range(5)))
    lines = found.disagreement().splitlines()
    assert lines[:3] == [str(pair) for pair in found.disagreements()[:3]]
    assert lines[3:] == [f"So do {len(found.disagreements()) - 3} more pairs of methods."]


def test_the_matrix_is_the_list_with_its_interval() -> None:
    rng = np.random.default_rng(3)
    found = report(*(scores(m, rng.normal(size=12)) for m in "abc"))
    matrix = found.agreement_matrix()
    for pair in found.agreement():
        for key in ("rho", "low", "high"):
            assert matrix[key].loc[pair.first, pair.second] == matrix[key].loc[pair.second, pair.first] == getattr(pair, key)
    assert (np.diag(matrix["rho"]) == 1.0).all()


def test_an_unknown_consensus_is_told_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="borda"):
        report(scores("a", np.arange(12.0))).consensus("brda")  # type: ignore[arg-type]
