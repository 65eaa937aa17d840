"""The stacker: known coefficients come back, noise earns nothing, and no model is judged by a fit that saw it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from layerwise import stacking
from layerwise.analyzer import ANALYZERS
from layerwise.errors import CorruptRun, UsageError
from layerwise.importance import ImportanceReport, LayerInfo
from layerwise.ranks import spearman
from layerwise.scores import LayerScore, Scores, Status
from layerwise.stacking import COMPONENTS, QUIET, features, fit_meta, held_out_models, stackers, write_stackers

METHODS = ("a", "b", "c")


def rows(models: int = 8, layers: int = 12, methods: tuple[str, ...] = METHODS, seed: int = 0) -> pd.DataFrame:
    """Scores of pure noise; the damage is to be filled in."""
    rng = np.random.default_rng(seed)
    frames = []
    for m in range(models):
        scores = {f"score.{name}": rng.lognormal(size=layers) for name in methods}
        facts = {"layer": [f"blocks.{i}" for i in range(layers)], "depth": np.linspace(0, 1, layers), "kind": "mlp"}
        frames.append(
            pd.DataFrame({"model": f"m{m}", "parameters": rng.integers(1, 99, layers), **facts, "op": "skip", **scores})
        )
    return pd.concat(frames, ignore_index=True).assign(damage=0.0)


def linear(frame: pd.DataFrame) -> pd.DataFrame:
    x = features(frame, METHODS)
    return frame.assign(damage=0.2 + 0.7 * x["score.a"] - 0.3 * x["score.b"] + 0.1 * x["depth"])


def test_a_known_linear_function_of_ranks_is_recovered() -> None:
    found = fit_meta(linear(rows()), METHODS, target="damage")
    expected = {"intercept": 0.2, "score.a": 0.7, "score.b": -0.3, "score.c": 0.0, "depth": 0.1, "depth²": 0.0, "parameters": 0.0}
    for name, value in expected.items():
        assert found.coefficients[name] == pytest.approx(value, abs=2e-3), name
    assert found.error < 2e-3
    assert found.interval < 5e-3
    assert found.learned


def test_scores_are_seen_by_rank_alone() -> None:
    frame = linear(rows())
    bent = frame.assign(**{"score.a": np.exp(3 * frame["score.a"])})
    assert fit_meta(bent, METHODS).coefficients == fit_meta(frame, METHODS).coefficients


def test_noise_is_no_better_than_depth_alone_and_counts_for_nothing() -> None:
    frame = rows(seed=4)
    noise = np.random.default_rng(1).normal(size=len(frame))
    found = fit_meta(frame.assign(damage=-frame["depth"] + 0.3 * noise), METHODS)
    stacker, prior, _ = np.array(list(found.held_out.values())).mean(0)
    assert prior > 0.5
    assert stacker < prior + 0.02
    assert not found.learned


def test_a_good_stacker_that_only_equals_the_mean_of_ranks_counts_for_nothing() -> None:
    frame = rows()
    x = features(frame, METHODS)
    assert not fit_meta(frame.assign(damage=x[[f"score.{m}" for m in METHODS]].mean(axis=1)), METHODS).learned


def test_no_layer_of_the_model_that_is_judged_is_learned_from() -> None:
    frame = linear(rows(5))
    groups = frame["model"].to_numpy()
    folds = list(held_out_models(groups))
    assert len(folds) == 5
    for learn, judge in folds:
        assert not set(groups[learn]) & set(groups[judge])
        assert set(groups[learn]) | set(groups[judge]) == set(groups)
    honest = fit_meta(frame, METHODS)

    flipped = frame.assign(damage=np.where(groups == "m0", -frame["damage"], frame["damage"]))
    judged = fit_meta(flipped, METHODS).held_out["m0"][0]
    assert judged == pytest.approx(-honest.held_out["m0"][0])  # the fit knows nothing of m0's reversal


def test_the_penalty_of_a_fold_never_sees_the_model_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []
    real = stacking._penalty

    def spy(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> float:
        seen.append(set(groups))
        return real(x, y, groups)

    monkeypatch.setattr(stacking, "_penalty", spy)
    stacking._held_out(np.random.default_rng(0).normal(size=(20, 2)), np.arange(20.0), np.repeat(list("abcd"), 5))
    assert seen == [set("abcd") - {m} for m in "abcd"]


def test_every_model_counts_the_same_however_many_layers_it_has() -> None:
    small, large = linear(rows(6, 6, seed=1)), linear(rows(1, 200, seed=2)).assign(model="large")
    x = features(large, METHODS)
    large["damage"] = 0.2 - 0.7 * x["score.a"]
    found = fit_meta(pd.concat([small, large], ignore_index=True), METHODS, target="damage")
    assert found.coefficients["score.a"] > 0.05  # the mass of the large model's layers says −0.7


def test_the_interval_covers_nine_tenths_of_what_was_left_out() -> None:
    frame, rng = rows(10, seed=5), np.random.default_rng(2)
    x = features(frame, METHODS)
    found = fit_meta(frame.assign(damage=x["score.a"] + 0.2 * rng.normal(size=len(frame))), METHODS, target="damage")
    assert found.interval == pytest.approx(1.645 * 0.2, rel=0.2)
    assert found.error == pytest.approx(0.2, rel=0.2)


def test_a_kind_that_one_model_alone_has_gets_no_coefficient() -> None:
    frame = linear(rows())
    frame.loc[frame["model"] == "m0", "kind"] = "recurrent"
    found = fit_meta(frame, METHODS)
    assert "kind=mlp" in found.coefficients
    assert "kind=recurrent" not in found.coefficients


def test_too_few_models_mixed_operations_and_missing_columns_are_told() -> None:
    with pytest.raises(UsageError, match="3 models are too few"):
        fit_meta(linear(rows(3)), METHODS)
    with pytest.raises(UsageError, match="mix the operations"):
        fit_meta(pd.concat([linear(rows()), linear(rows()).assign(op="w4")]), METHODS)
    with pytest.raises(UsageError, match=r"lack score\.d"):
        fit_meta(linear(rows()), ("a", "d"))


def written(folder: Path) -> Path:
    """A table fitted to made-up rows in which only the first component tells the truth and another is reversed."""
    frame = rows(8, methods=tuple(COMPONENTS))
    x = features(frame, tuple(COMPONENTS))
    frame["damage"] = x["score.layer_correlation"] - 0.8 * x["score.gradient_based"]
    results = folder / "faithfulness.json"
    results.write_text(json.dumps({"rows": frame.to_dict("records")}), encoding="utf-8")
    write_stackers(results, folder / "meta.json")
    return folder / "meta.json"


def test_the_table_is_written_from_results_and_read_back(tmp_path: Path) -> None:
    read = stackers(written(tmp_path))
    assert list(read) == ["skip"]
    assert read["skip"].learned
    assert read["skip"].coefficients["score.layer_correlation"] > 0 > read["skip"].coefficients["score.gradient_based"]
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(CorruptRun):
        stackers(tmp_path / "broken.json")


def report() -> ImportanceReport:
    rng = np.random.default_rng(11)
    layers = tuple(LayerInfo(f"blocks.{i}", i, "mlp", 10 + i, True, "blocks") for i in range(9))
    named = {"layer_correlation": {"measure": "block_influence", "tokens": "all"}, "gradient_based": {"form": "absolute"}}
    scores = {}
    for m, settings in named.items():
        entries = {x.name: LayerScore(float(v)) for x, v in zip(layers, rng.normal(size=9), strict=True)}
        scores[m] = Scores(m, "nats", entries, settings=settings)
    lost = LayerScore.missing(Status.NOT_APPLICABLE, "why")
    scores = {m: replace(s, entries={**s.entries, "blocks.8": lost}) for m, s in scores.items()}
    return ImportanceReport("net", "classification", "digits", layers, scores)


def test_a_learned_consensus_follows_the_coefficients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = stackers(written(tmp_path))
    monkeypatch.setattr(stacking, "stackers", lambda: read)
    found = report().consensus("meta")
    assert found.settings["learned"]
    assert "fisher_information" in found.settings["absent"]
    good, bad = report()["layer_correlation"].usable(), report()["gradient_based"].usable()
    ranked = np.array([sorted(good.values()).index(good[n]) - 0.8 * sorted(bad.values()).index(bad[n]) for n in good])
    assert spearman(np.array(list(found.usable().values())), ranked) > 0.95
    assert found.entries["blocks.8"].status is Status.NOT_APPLICABLE
    assert found.entries["blocks.0"].stderr == read["skip"].error


def test_settings_and_not_labels_decide_which_component_a_method_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = stackers(written(tmp_path))
    monkeypatch.setattr(stacking, "stackers", lambda: read)
    base = report()
    renamed = replace(base, scores={f"my {m}": s for m, s in base.scores.items()})
    assert dict(renamed.consensus("meta").usable()) == dict(base.consensus("meta").usable())
    signed = replace(base["gradient_based"], settings={"form": "signed"})
    other = replace(base, scores={**base.scores, "gradient_based": signed}).consensus("meta")
    assert "gradient_based" in other.settings["absent"]


def test_without_a_fit_the_consensus_is_bordas_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacking, "stackers", dict)
    found, plain = report().consensus("meta"), report().consensus()
    assert found.usable() == plain.usable()
    assert (found.settings["learned"], found.settings["how"]) == (False, "meta")
    assert "no stacker was fitted" in found.settings["why"]


def test_the_shipped_table_reads_and_knows_its_components() -> None:
    for op, stacker in stackers().items():
        assert op
        assert set(stacker.methods) <= set(COMPONENTS)
        assert math.isfinite(stacker.error)
    assert {label for label, (name, _) in COMPONENTS.items() if ANALYZERS[name].baseline} == QUIET
