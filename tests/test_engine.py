"""The whole walk through the verbs, on a trained small net, and what the verbs refuse."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import layerwise as lw
from layerwise.analyzers.layer_correlation import LayerCorrelationAnalyzer
from layerwise.analyzers.random import RandomAnalyzer
from layerwise.data import Data
from layerwise.engine import AUTO
from layerwise.errors import TargetMissed, UsageError
from layerwise.importance import ImportanceReport
from layerwise.model import UniversalModel
from layerwise.scores import Status
from tests.models import CASES, ResidualNet
from tests.replicas import same_state, state_of


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Data]:
    """A residual net of six blocks that separates three clouds, and held-out points."""
    torch.manual_seed(0)
    net, centres = ResidualNet(depth=6, width=8), torch.randn(3, 8) * 2

    def points(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.randint(0, 3, (n,))
        return centres[labels] + torch.randn(n, 8), labels

    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(80):
        x, y = points(128)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    x, y = points(300)
    return net.eval(), Data.of([(x[i : i + 60], y[i : i + 60]) for i in range(0, 300, 60)], name="clouds")


def test_the_walk_from_a_module_to_a_leaderboard_row(trained: tuple[nn.Module, Data], tmp_path: Path) -> None:
    net, data = trained
    model = lw.load(net)
    report = lw.analyze(model, data)
    assert report.methods == list(AUTO)
    assert report.metrics["accuracy"] > 0.9
    assert report.removal is not None
    assert report.removal.values[0] == report.metrics["accuracy"]
    assert len(report.removal.values) == 7

    plan = lw.plan(model, report, targets=["params<=0.7x", "accuracy>=0.95x"], data=data)
    before = state_of(model)
    result = lw.compress(model, plan, data=data, report=report)
    assert same_state(before, state_of(model)) == []
    assert result.missed() == []
    assert result.proven
    assert result.after.params <= 0.7 * result.before.params
    assert {p.name for p in result.proofs} >= {"shrinkage", "reload"}
    assert len(result.proofs) == len(plan.steps) + 2, "one proof of equivalence per step"

    result.save(tmp_path / "model")
    row = lw.track(result, report=report)
    assert row == lw.track(result, report=report), "the same result twice is one row"
    board = lw.leaderboard()
    assert len(board) == 1
    assert board.iloc[0]["ratio"] == pytest.approx(result.ratio)


def test_planned_figures_are_those_measured_afterwards(trained: tuple[nn.Module, Data]) -> None:
    net, data = trained
    model = lw.load(net)
    report = lw.analyze(model, data, ["layer_ablation", "gradient_based"])
    plan = lw.plan(model, report, ["size<=0.5x", "accuracy>=0.9x"], data)
    figures = lw.compress(model, plan, data).after.figures()
    for metric, value in plan.predicted.items():
        assert figures[metric] == pytest.approx(value, rel=1e-6), metric
    assert any(c.feasible for c in plan.candidates)
    assert plan.model == model.fingerprint


def test_a_budget_that_nothing_meets_is_refused_with_the_nearest(trained: tuple[nn.Module, Data]) -> None:
    net, data = trained
    model = lw.load(net)
    report = lw.analyze(model, data, "layer_ablation")
    with pytest.raises(TargetMissed, match=r"LW-T01 .*params<=0\.01x.*nearest.*params [\d.e+]+ \(allowed <=") as caught:
        lw.plan(model, report, ["params<=0.01x"], data)
    assert caught.value.exit_code == 1


def test_the_menu_can_be_restricted(trained: tuple[nn.Module, Data]) -> None:
    net, data = trained
    model = lw.load(net)
    report = lw.analyze(model, data, "layer_ablation")
    plan = lw.plan(model, report, ["size<=0.6x"], data, methods=["half_precision"])
    assert {s.method for s in plan.steps} == {"half_precision"}


def test_a_target_that_the_task_cannot_measure_is_refused(trained: tuple[nn.Module, Data]) -> None:
    net, data = trained
    model = lw.load(net)
    report = lw.analyze(model, data, "layer_ablation")
    with pytest.raises(UsageError, match="classification has no perplexity"):
        lw.plan(model, report, ["perplexity<=1.1x"], data)


def test_without_labels_everything_still_works() -> None:
    case = CASES["residual"]
    data = Data.of([b.args[0] for b in case.data(8, 8)])
    model = lw.load(case.build())
    report = lw.analyze(model, data, "all")
    assert report.task == "fidelity"
    plan = lw.plan(model, report, ["size<=0.9x"], data)
    result = lw.compress(model, plan, data)
    assert result.before.metrics["divergence"] == pytest.approx(0.0, abs=1e-12)
    assert result.proven


@pytest.mark.parametrize("form", ["tensor", "tuple", "pair", "dict", "generator", "loader"])
def test_ready_batches_pass_through_in_every_accepted_form(form: str) -> None:
    x, y = torch.randn(6, 8), torch.randint(0, 3, (6,))
    forms = {
        "tensor": [x],
        "tuple": [(x,)],
        "pair": [(x, y)],
        "dict": [{"x": x, "labels": y}],
        "generator": ((x, y) for _ in range(2)),
        "loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=3),
    }
    report = lw.analyze(lw.load(ResidualNet()), forms[form], ["layer_ablation"])
    assert report.task == ("fidelity" if form in {"tensor", "tuple"} else "classification")
    assert len(report["layer_ablation"].usable()) == 4


def test_instances_are_accepted_wherever_names_are() -> None:
    case = CASES["vit"]
    methods = ["layer_correlation", LayerCorrelationAnalyzer(measure="cka"), "depth"]
    report = lw.analyze(case.model(), case.data(5), methods)
    assert report.methods == ["layer_correlation", "layer_correlation(measure=cka)", "depth"]
    assert report["layer_correlation"] != report["layer_correlation(measure=cka)"]


def test_the_seed_reaches_the_random_baseline() -> None:
    case = CASES["residual"]
    first, second = (lw.analyze(case.model(), case.data(), "random", seed=s)["random"] for s in (1, 2))
    assert first.entries != second.entries
    assert first.entries == RandomAnalyzer(seed=1).analyze(case.model()).entries


def test_methods_that_read_weights_need_no_data() -> None:
    report = lw.analyze(CASES["bert"].model(), None, ["spectral_analysis", "weight_norm"])
    assert report.removal is None
    assert all(len(report[m].usable()) == 3 for m in report.methods)
    with pytest.raises(UsageError, match="layer_ablation need data"):
        lw.analyze(CASES["bert"].model(), None, ["spectral_analysis", "layer_ablation"])


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"Unknown analyzer 'fischer'\. Did you mean 'fisher_information'"):
        lw.analyze(CASES["residual"].model(), CASES["residual"].data(), "fischer")


def test_the_frame_tells_why_a_layer_has_no_score() -> None:
    case = CASES["resnet"]
    frame = lw.analyze(case.model(), case.data(), ["layer_ablation", "fisher_information"]).to_frame()
    missing = frame[(frame.method == "layer_ablation") & (frame.status != Status.OK)]
    assert list(missing.layer) == ["layer2.0", "layer3.0", "layer4.0"]
    assert missing.reason.str.contains("differ in shape").all()
    assert missing["rank"].isna().all()
    assert math.isnan(missing.score.iloc[0])


def test_forward_with_hooks_and_the_layers_parameters_as_the_mission_names_them() -> None:
    case = CASES["vit"]
    model: UniversalModel = case.model()
    seen = model.forward_with_hooks(case.batch(3), 1)
    assert set(seen) == {"input", "output", "model_output"}
    assert torch.equal(seen["output"], model.module.blocks[1](seen["input"]))
    assert set(model.get_layer_parameters(1)) == {n for n, _ in model.module.blocks[1].named_parameters()}
    assert model.get_layers() is model.layers
    with pytest.raises(UsageError, match=r"layers 0 … 3, not 4"):
        model.get_layer_parameters(4)


def test_one_report_holds_several_granularities() -> None:
    case = CASES["vit"]
    report = lw.analyze(
        case.model(), case.data(), ["gradient_based", "parameter_count"], granularity=("sublayer", "block", "head")
    )
    assert report.granularities == ("block", "sublayer", "head")
    assert [len(report.at(g).layers) for g in report.granularities] == [4, 8, 8]
    assert {x.parent for x in report.at("head").layers} == {x.name for x in report.at("block").layers}
    assert report.removal is not None
    assert set(report.removal.order) == {x.name for x in report.at("block").layers}
    frame = report.to_frame()
    for granularity, count in (("block", 4), ("sublayer", 8), ("head", 8)):
        rows = frame[(frame.granularity == granularity) & (frame.method == "gradient_based")]
        assert sorted(rows["rank"]) == list(range(1, count + 1)), "ranked among their own"
        part = report.consensus().entries
        assert {n: part[n] for n in rows.layer} == dict(report.at(granularity).consensus().entries)
    assert str(ImportanceReport.from_dict(report.to_dict())) == str(report)
    with pytest.raises(UsageError, match=r"granularity 'channel'"):
        report.at("channel")


def test_many_units_have_no_removal_curve_and_the_report_says_so() -> None:
    case = CASES["vit"]
    report = lw.analyze(case.model(), case.data(), "gradient_based", granularity="channel")
    assert report.removal is None
    assert report.metrics
    assert any("No removal curve was measured: it would take 512 runs" in note for note in report.notes)


def test_what_was_not_found_is_a_note_of_the_report() -> None:
    report = lw.analyze(CASES["resnet"].model(), None, "parameter_count", granularity="sublayer")
    assert "No residual branch was found in: layer2.0, layer3.0, layer4.0." in report.notes


def test_a_plan_is_not_made_from_units() -> None:
    case = CASES["vit"]
    model = case.model()
    report = lw.analyze(model, case.data(), "gradient_based", granularity="head")
    with pytest.raises(UsageError, match="ranks no blocks, only heads"):
        lw.plan(model, report, "params<=0.9x", case.data())


def test_the_page_of_many_channels_shows_both_ends_and_says_so() -> None:
    from layerwise.report.views import MOST_ROWS, heatmap

    case = CASES["vit"]
    report = lw.analyze(case.model(), case.data(), ["gradient_based", "weight_norm"], granularity="channel")
    chart = heatmap(report)
    assert (len(chart.layers), chart.hidden) == (MOST_ROWS, 512 - MOST_ROWS)
    ranked = list(report.consensus().ranks())
    assert set(chart.layers) == {*ranked[: MOST_ROWS // 2], *ranked[-MOST_ROWS // 2 :]}
    page = report.to_html()
    assert f"{512 - MOST_ROWS} of 512 layers stand between" in page


def test_a_report_on_a_single_layer_says_how_to_see_more() -> None:
    model = CASES["albert"].model()
    (note,) = lw.analyze(model, methods="weight_norm").notes
    assert note.startswith("One layer only, which runs 3 times: granularity='sublayer'")
    assert len(lw.analyze(model, methods="weight_norm", granularity="sublayer").layers) == 2
    assert not lw.analyze(CASES["bert"].model(), methods="weight_norm").notes
