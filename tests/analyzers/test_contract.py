"""What every registered analyzer promises."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from layerwise.analyzer import ANALYZERS, ImportanceAnalyzer
from layerwise.data import Batch, Data
from layerwise.errors import UserModelError
from layerwise.feeding import Feeder
from layerwise.model import UniversalModel
from layerwise.observe import observe
from layerwise.scores import Status
from layerwise.task import Classification, Fidelity
from tests.models import CASES, AttendingNet, Case, ResidualNet, vectors
from tests.replicas import same_state, state_of

NAMES = sorted(ANALYZERS)
OBSERVING = [name for name in NAMES if ANALYZERS[name]().statistic(CASES["residual"].model()) is not None]
CLAIMS = [(name, kind) for name in NAMES for kind in sorted(ANALYZERS[name].sees)]
RANKS = {"dead": 5, "vital": 1}  # of five
SUBJECTS = ["vit", "resnet", "bert", "t5", "sequential", "albert"]
HOLDS = {name: frozenset({"attention"}) for name in ("vit", "bert", "t5", "albert")}  # what a method may ask of a subject
NETS: dict[frozenset[str], type[ResidualNet]] = {frozenset(): ResidualNet, frozenset({"attention"}): AttendingNet}


def net_for(name: str) -> type[ResidualNet]:
    """A residual net that has what the analyzer asks for."""
    return NETS[ANALYZERS[name].asks]


def case_for(name: str) -> Case:
    return CASES["attending" if ANALYZERS[name].asks else "residual"]


@pytest.fixture(params=NAMES)
def analyzer(request: pytest.FixtureRequest) -> ImportanceAnalyzer:
    return ANALYZERS[request.param]()


@pytest.mark.parametrize("subject", SUBJECTS)
def test_keys_are_the_layers_in_order_and_scores_are_finite_or_explained(analyzer: ImportanceAnalyzer, subject: str) -> None:
    case = CASES[subject]
    model = case.model()
    scores = analyzer.analyze(model, case.data())
    assert list(scores) == [x.name for x in model.layers]
    for entry in scores.entries.values():
        assert math.isfinite(entry.value) == (entry.status is Status.OK)
        assert bool(entry.reason) == (entry.status is not Status.OK)
    lacking = analyzer.asks - HOLDS.get(subject, frozenset())
    if lacking:
        assert {e.status for e in scores.entries.values()} == {Status.NOT_APPLICABLE}
        assert all(word in e.reason for e in scores.entries.values() for word in lacking)
    else:
        assert scores.usable(), "not one layer has a score"
    assert scores.unit
    assert scores.method == analyzer.get_method_name()


def test_two_runs_agree_to_the_bit(analyzer: ImportanceAnalyzer) -> None:
    case = CASES["vit"]
    first, second = (analyzer.analyze(case.model(), case.data()) for _ in range(2))
    assert first.entries == second.entries or str(first.entries) == str(second.entries)  # NaN errors compare by their text


def test_nothing_is_touched(analyzer: ImportanceAnalyzer) -> None:
    case = CASES["bert"]
    model = case.model()
    model.see(case.batch(2))
    model.module.train()
    assert model.layers
    before = state_of(model)
    analyzer.analyze(model, case.data())
    assert same_state(before, state_of(model)) == []


@pytest.mark.parametrize("name", OBSERVING)
def test_nothing_is_left_after_an_error(name: str) -> None:
    class Trap(net_for(name)):  # type: ignore[misc]
        armed = False

        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](self.stem(x))
            for block in self.blocks[1:]:
                x = block(x)
            if self.armed:
                raise ArithmeticError("trap")
            return self.head(x)

    model = UniversalModel(Trap(), task=Classification(), example=vectors()(2))
    assert model.layers
    model.module.armed = True
    before = state_of(model)
    with pytest.raises(UserModelError, match="trap"):
        ANALYZERS[name]().analyze(model, Data.of([vectors()(4)]))
    assert same_state(before, state_of(model)) == []


@pytest.mark.parametrize("name", OBSERVING)
def test_merged_shards_equal_one_pass(name: str) -> None:
    analyzer = ANALYZERS[name]()
    case = case_for(name)
    model = case.model(Classification())
    whole, left, right = (analyzer.statistic(model) for _ in range(3))
    data = case.data(5, 6)
    model.see(data[0])
    for statistic, numbers in ((whole, [0, 1]), (left, [0]), (right, [1])):
        feeder = Feeder(model, {"x": statistic}, data, seed=0)
        for number in numbers:  # of the batch in the whole data set: samples are chosen by their numbers there
            feeder.feed(number)
        feeder.finish()
    left.merge_(right)
    merged, expected = analyzer.finish(model, left, 0), analyzer.finish(model, whole, 0)
    for name in expected.usable():
        assert merged[name] == pytest.approx(expected[name], rel=1e-12)
    assert merged.samples == expected.samples == 11


@pytest.mark.parametrize("name", OBSERVING)
def test_a_saved_state_is_the_same_state(name: str) -> None:
    analyzer = ANALYZERS[name]()
    case = case_for(name)
    model = case.model(Classification())
    fed, loaded = analyzer.statistic(model), analyzer.statistic(model)
    observe(model, case.data(), {"x": fed})
    loaded.load_({k: v.clone() for k, v in fed.state().items()})
    assert str(analyzer.finish(model, fed, 0).entries) == str(analyzer.finish(model, loaded, 0).entries)


def planted(name: str, kind: str) -> tuple[UniversalModel, Data]:
    """A residual net in which one block does nothing (``dead``) or does the work (``vital``): block 2 of 5."""
    torch.manual_seed(1)
    net = net_for(name)(depth=5, width=8, classes=4)
    for block in net.blocks:
        block.down.weight.data *= 0.3
        block.down.bias.data.zero_()
    target = net.blocks[2]
    if kind == "dead":
        target.down.weight.data.zero_()
    else:
        target.up.weight.data *= 3
        target.down.weight.data *= 10
    inputs = torch.randn(64, 8)
    # Judged by fidelity, where doing without a block can only cost: with labels, a random net may do better without it.
    model = UniversalModel(net, task=Fidelity(), example=Batch((inputs[:2],)))
    return model, Data.of([inputs[:40], inputs[40:]])


@pytest.mark.parametrize(("name", "kind"), CLAIMS)
def test_a_planted_layer_is_found_by_those_who_claim_to_see_it(name: str, kind: str) -> None:
    model, data = planted(name, kind)
    assert ANALYZERS[name]().analyze(model, data).ranks()["blocks.2"] == RANKS[kind]


def test_somebody_claims_each_kind() -> None:
    assert {kind for _, kind in CLAIMS} == set(RANKS)


def test_without_labels_every_analyzer_still_works(analyzer: ImportanceAnalyzer) -> None:
    model, data = planted(analyzer.method, "vital")
    scores = analyzer.analyze(model, data)
    assert len(scores.usable()) == 5
    assert max(scores.values()) > 0


def test_a_layer_that_no_gradient_reaches_is_not_scored_zero(analyzer: ImportanceAnalyzer) -> None:
    class Detached(net_for(analyzer.method)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](self.stem(x))
            x = self.blocks[1](x)
            return self.head(self.blocks[3](self.blocks[2](x.detach())))

    model = UniversalModel(Detached(), task=Classification(), example=vectors()(2))
    scores = analyzer.analyze(model, Data.of([vectors()(6)]))
    if analyzer.method in {"fisher_information", "gradient_based", "gradient_flow", "attention_analysis", "layer_conductance"}:
        assert scores.entries["blocks.0"].status is Status.NOT_APPLICABLE
        assert "no gradient" in scores.entries["blocks.0"].reason
    else:
        assert scores.entries["blocks.0"].status is Status.OK


def test_a_docstring_says_what_is_computed(analyzer: ImportanceAnalyzer) -> None:
    assert len((type(analyzer).__doc__ or "").split()) > 8
    assert isinstance(analyzer.unit, str)


def test_batchnorm_in_training_mode_does_not_couple_samples() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).train()
    model = UniversalModel(net, task=Classification(), example=vectors()(4))
    one = ANALYZERS["fisher_information"]().analyze(model, Data.of([vectors()(8)]))
    two = ANALYZERS["fisher_information"]().analyze(model, Data.of([vectors()(8).narrow(0, 3), vectors()(8).narrow(3, 8)]))
    for name in one:
        assert one[name] == pytest.approx(two[name], rel=1e-6)
    assert net.training
