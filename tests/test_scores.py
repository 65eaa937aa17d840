"""`Scores`: direction, ranks, status, round trip."""

from __future__ import annotations

import math

from layerwise.scores import LayerScore, Scores, Status


def example() -> Scores:
    entries = {
        "a": LayerScore(1.0, 0.1),
        "b": LayerScore.missing(Status.NOT_APPLICABLE, "changes the shape"),
        "c": LayerScore(3.0),
        "d": LayerScore(1.0),
    }
    return Scores("method", "nats", entries, samples=7, seconds=0.5, settings={"form": "absolute"})


def test_the_most_important_layer_has_rank_1_and_equal_scores_share_a_rank() -> None:
    assert example().ranks() == {"c": 1, "a": 2, "d": 2}
    assert list(example().ranks()) == ["c", "a", "d"]  # in order, ties in the order of the layers


def test_a_layer_without_a_score_stays_in_the_mapping_with_its_reason() -> None:
    scores = example()
    assert list(scores) == ["a", "b", "c", "d"]
    assert math.isnan(scores["b"])
    assert list(scores.usable()) == ["a", "c", "d"]
    assert scores.entries["b"].reason == "changes the shape"


def test_a_value_that_is_not_finite_is_a_failure_with_a_reason() -> None:
    entry = LayerScore.measured(math.inf)
    assert (entry.status, entry.reason) == (Status.FAILED, "the score came out as inf")


def test_plain_data_and_back() -> None:
    again = Scores.from_dict(example().to_dict())
    assert str(again) == str(example())  # NaN does not equal itself, its text does
