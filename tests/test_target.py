"""`Target`: what a user may write, and what is refused in words."""

from __future__ import annotations

import pytest

from layerwise.errors import UsageError
from layerwise.target import Target


@pytest.mark.parametrize(
    ("text", "before", "limit"),
    [
        ("size<=0.5x", 200.0, 100.0),
        ("size<=2MB", 1e9, 2e6),
        ("accuracy>=0.98x", 0.9, 0.882),
        ("accuracy>=90%", 0.95, 0.9),
        ("latency<=20ms", 50.0, 20.0),
        ("latency<=0.1s", 50.0, 100.0),
        ("macs <= 1.5G", 4e9, 1.5e9),
        ("loss<=1.02x", 2.0, 2.04),
    ],
)
def test_bounds_in_the_users_terms(text: str, before: float, limit: float) -> None:
    target = Target.parse(text)
    assert target.limit(before) == pytest.approx(limit)
    assert target.met(before, limit)
    beyond = limit * (1.01 if target.sense == "<=" else 0.99)
    assert not target.met(before, beyond)


@pytest.mark.parametrize("text", ["size<=0.5x", "accuracy>=0.98x", "latency<=20"])
def test_the_text_of_a_target_reads_back(text: str) -> None:
    assert Target.parse(str(Target.parse(text))) == Target.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("size=0.5x", "Cannot read the target 'size=0.5x'. Write for example size<=0.5x"),
        ("sise<=0.5x", "Unknown target 'sise' in 'sise<=0.5x'. Did you mean 'size'?"),
        ("size<=0.5y", "Unknown unit 'y'"),
        ("size<=1e999x", "finite number"),
        ("size<=--1x", "'--1' in the target 'size<=--1x' is not a number"),
        ("", "Cannot read the target ''"),
    ],
)
def test_what_cannot_be_read_says_why(text: str, message: str) -> None:
    with pytest.raises(UsageError, match="LW-C") as caught:
        Target.parse(text)
    assert message in str(caught.value)
