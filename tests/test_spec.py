"""Methods written with their settings."""

from __future__ import annotations

import pytest

from layerwise.analyzer import ANALYZERS
from layerwise.analyzers.layer_correlation import LayerCorrelationAnalyzer
from layerwise.analyzers.random import RandomAnalyzer
from layerwise.engine import chosen_analyzers
from layerwise.errors import UsageError
from layerwise.spec import built, split_specs, written


def test_commas_inside_parentheses_do_not_separate() -> None:
    assert split_specs("a, b(x=1, y=2),c , ,") == ["a", "b(x=1, y=2)", "c"]


def test_settings_are_read_with_their_types() -> None:
    assert built(ANALYZERS, "layer_correlation( measure = cka )") == LayerCorrelationAnalyzer(measure="cka")
    assert built(ANALYZERS, "random(seed=7)") == RandomAnalyzer(seed=7)
    assert built(ANALYZERS, "weight_norm(per_parameter=yes)").settings()["per_parameter"] is True


def test_what_is_written_is_read_back() -> None:
    for cls in ANALYZERS.values():
        settings = {k: v for k, v in cls().settings().items() if k != "baseline"}
        if all(isinstance(v, str | int | float | bool | None) for v in settings.values()):
            assert built(ANALYZERS, written(cls.method, settings)) == cls()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("layer_corelation(measure=cka)", "Did you mean 'layer_correlation'"),
        ("layer_correlation(mesure=cka)", "Did you mean 'measure'"),
        ("layer_correlation(measure=cca)", "Did you mean 'cka'"),
        ("layer_correlation(cka)", "setting=value"),
        ("layer_correlation(measure=cka", r"NAME\(setting"),
        ("", r"NAME\(setting"),
    ],
)
def test_what_cannot_be_read_is_told_with_the_way_out(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"LW-C .*{message}"):
        built(ANALYZERS, spec)


def test_two_variants_of_one_method_get_labels_that_can_be_given_again() -> None:
    labels = list(chosen_analyzers(["layer_correlation", "layer_correlation(measure=cka)", "random"], seed=3))
    assert labels[0] == "layer_correlation"
    assert chosen_analyzers([labels[1]])["layer_correlation"].measure == "cka"


def test_a_seed_that_is_written_wins_over_the_runs() -> None:
    assert chosen_analyzers("random(seed=5)", seed=3)["random"].seed == 5
    assert chosen_analyzers("random", seed=3)["random"].seed == 3
