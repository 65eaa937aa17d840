"""`ImportanceReport`: the frame's columns, agreement against scipy, consensus, round trip."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from layerwise.errors import CorruptRun, UsageError
from layerwise.importance import COLUMNS, ImportanceReport, LayerInfo, RemovalCurve
from layerwise.scores import LayerScore, Scores, Status


def report(**methods: list[float]) -> ImportanceReport:
    count = len(next(iter(methods.values())))
    layers = tuple(LayerInfo(f"blocks.{i}", i, "attention", 10 * (i + 1), True, "blocks") for i in range(count))
    scores = {
        name: Scores(
            name,
            "nats",
            {
                f"blocks.{i}": LayerScore(v) if math.isfinite(v) else LayerScore.missing(Status.NOT_APPLICABLE, "why")
                for i, v in enumerate(values)
            },
            samples=5,
            settings={"baseline": True} if name == "depth" else {},
        )
        for name, values in methods.items()
    }
    return ImportanceReport("net", "classification", "digits", layers, scores, {"accuracy": 0.9})


def test_the_frame_has_the_promised_columns_one_row_per_layer_and_method() -> None:
    frame = report(a=[1.0, 3.0, 2.0], b=[1.0, math.nan, 2.0]).to_frame()
    assert list(frame.columns) == COLUMNS
    assert len(frame) == 6
    row = frame[(frame.method == "b") & (frame.layer == "blocks.1")].iloc[0]
    assert (row.status, row.reason) == ("not_applicable", "why")
    assert np.isnan(row.score)
    assert frame[frame.method == "a"]["rank"].tolist() == [3, 1, 2]


def test_agreement_is_pairwise_with_an_interval_around_it() -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(size=30)
    pairs = report(a=list(base), b=list(base + 0.5 * rng.normal(size=30)), c=list(rng.normal(size=30))).agreement()
    assert [(p.first, p.second) for p in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    close = pairs[0]
    assert close.low < close.rho < close.high <= 1.0
    assert close.low > 0.5
    assert pairs[1].low < 0 < pairs[1].high
    assert close.layers == 30
    (same,) = report(a=list(base), b=list(base)).agreement()
    assert (same.rho, same.low, same.high) == (pytest.approx(1.0), pytest.approx(1.0), pytest.approx(1.0))


def test_layers_without_a_score_are_left_out_of_agreement() -> None:
    (pair,) = report(a=[1, 2, 3, math.nan], b=[1, 2, 3, 4]).agreement()
    assert (pair.layers, pair.rho) == (3, pytest.approx(1.0))


def test_consensus_is_bordas_count_and_baselines_have_no_vote() -> None:
    found = report(a=[1.0, 3.0, 2.0], b=[1.0, 2.0, 3.0], depth=[9.0, 8.0, 7.0]).consensus()
    assert [found[f"blocks.{i}"] for i in range(3)] == [0.0, 0.75, 0.75]
    assert found.entries["blocks.1"].stderr == pytest.approx(0.25)
    only = report(depth=[3.0, 2.0, 1.0]).consensus()
    assert only["blocks.0"] == 1.0


def test_a_layer_that_nobody_scored_is_said() -> None:
    found = report(a=[1.0, math.nan]).consensus()
    assert found.entries["blocks.1"].status is Status.NOT_APPLICABLE


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    original = report(a=[1.0, math.nan, 2.0], depth=[1.0, 2.0, 3.0])
    original = ImportanceReport(**{**vars(original), "removal": RemovalCurve("accuracy", ("blocks.0",), (0.9, 0.5))})
    original.save(tmp_path / "report.json")
    again = ImportanceReport.load(tmp_path)
    assert str(again) == str(original)
    assert again.to_frame().equals(original.to_frame())


def test_a_file_that_is_no_report_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"model": 1}')
    with pytest.raises(CorruptRun, match=r"LW-R11 .*report\.json"):
        ImportanceReport.load(tmp_path)


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'fisher_information'"):
        report(fisher_information=[1.0])["fischer"]
