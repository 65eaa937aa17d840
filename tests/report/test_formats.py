"""Numbers are written for people."""

from __future__ import annotations

import math

import pytest

from layerwise.report import formats


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (0, "0"),
        (1234567, "1,234,567"),
        (-0.25, "−0.25"),
        (0.123456, "0.1235"),
        (3.1e-6, "3.1×10⁻⁶"),
        (2e12, "2×10¹²"),
        (100, "100"),
        (math.nan, "–"),
        (math.inf, "–"),
    ],
)
def test_number(x: float, text: str) -> None:
    assert formats.number(x) == text


@pytest.mark.parametrize(
    ("metric", "x", "text"),
    [
        ("size", 86_000_000, "86 MB"),
        ("size", 1_240_000_000, "1.24 GB"),
        ("size", 512, "512 B"),
        ("size", 0, "0"),
        ("latency", 12.34, "12.3 ms"),
        ("latency", 1234, "1.23 s"),
        ("latency", 0.042, "42 µs"),
        ("params", 86_567_656, "86,567,656"),
        ("macs", 17_563_828_224, "17.6 G"),
        ("accuracy", 0.924, "92.4 %"),
        ("my_metric", 0.5, "0.5"),
        ("latency", math.nan, "–"),
    ],
)
def test_figure(metric: str, x: float, text: str) -> None:
    assert formats.figure(metric, x) == text


def test_a_figure_and_its_spread_share_one_unit() -> None:
    assert formats.with_spread("latency", 12.13, 0.21) == "12.13 ± 0.21 ms"
    assert formats.with_spread("accuracy", 0.924, 0.004) == "92.4 ± 0.4 %"
    assert formats.with_spread("loss", 0.31, math.nan) == "0.31"


def test_a_change_is_signed_and_shares_are_in_points() -> None:
    assert formats.change("accuracy", -0.007) == "−0.7"
    assert formats.change("loss", 0.04, 0.018) == "+0.04 ± 0.018"
    assert formats.change("loss", math.nan) == "–"


def test_names_stay_on_one_line_and_are_shortened_in_the_middle() -> None:
    assert formats.label("a\nb") == "a\\nb"
    short = formats.label("encoder.layers.11.attention.output", 16)
    assert len(short) == 16
    assert short.endswith("output")
