"""The composite gives its parts exactly what they would see alone, and its scores are the consensus of theirs."""

from __future__ import annotations

import pytest
import torch

from layerwise import stacking
from layerwise.analyzers.meta_learning import Composite, MetaLearningAnalyzer, components
from layerwise.engine import analyze
from layerwise.errors import UsageError
from layerwise.observe import observe
from layerwise.task import Classification
from tests.models import CASES


@pytest.fixture(autouse=True)
def unfitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no stacker had been fitted."""
    monkeypatch.setattr(stacking, "stackers", dict)


def test_every_part_scores_as_it_would_alone_in_one_shared_pass() -> None:
    case = CASES["vit"]
    model = case.model(Classification())
    composite = MetaLearningAnalyzer().statistic(model)
    seen = observe(model, case.data(), {"x": composite})
    for label, analyzer in components().items():
        alone = analyzer.analyze(model, case.data())
        together = analyzer.finish(model, composite.parts.get(label), 0.0)
        assert dict(alone) == dict(together), label
    assert seen.counts.forwards == len(case.data())
    assert composite.needs == frozenset().union(*(part.needs for part in composite.parts.values()))


def test_unfitted_it_is_the_consensus_of_its_voting_parts() -> None:
    case = CASES["bert"]
    model = case.model(Classification())
    report = analyze(model, case.data(), list(components().values()))
    found = MetaLearningAnalyzer().analyze(model, case.data())
    expected = report.consensus()
    assert "weight_norm" not in report.voters()
    assert len(report.voters()) == 4
    assert dict(found) == pytest.approx(dict(expected))
    assert found.settings["learned"] is False
    assert found.settings["why"]


def test_states_of_parts_do_not_mix() -> None:
    case = CASES["residual"]
    model = case.model(Classification())
    fed = MetaLearningAnalyzer().statistic(model)
    observe(model, case.data(), {"x": fed})
    read = MetaLearningAnalyzer().statistic(model)
    read.load_(fed.state())
    for label, part in fed.parts.items():
        for key, tensor in part.state().items():
            assert torch.equal(read.parts[label].state()[key], tensor)
    assert isinstance(fed, Composite)


def test_it_has_no_vote_beside_its_own_parts() -> None:
    case = CASES["residual"]
    report = analyze(case.model(Classification()), case.data(), ["layer_correlation", "fisher_information", "meta_learning"])
    assert list(report.voters()) == ["layer_correlation", "fisher_information"]
    alone = analyze(case.model(Classification()), case.data(), ["depth", "meta_learning"])
    assert list(alone.voters()) == ["meta_learning"]


def test_an_unknown_operation_is_told() -> None:
    with pytest.raises(UsageError, match="skip"):
        MetaLearningAnalyzer(op="skp")
