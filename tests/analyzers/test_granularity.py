"""What every registered analyzer promises of sublayers, heads and channels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from layerwise.analyzer import ANALYZERS
from layerwise.data import Batch, Data
from layerwise.model import UniversalModel
from layerwise.scores import Status
from layerwise.task import Fidelity
from tests.models import Case, ResidualNet, bert, images, timm_model, tokens
from tests.replicas import same_state, state_of

NAMES = sorted(ANALYZERS)
TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2, "mlp_ratio": 1}
SMALL = {  # few channels: every analyzer goes through all of them
    "vit": Case(timm_model("vit_tiny_patch16_224", **TINY), images(16), 2, 2),
    "bert": Case(bert, tokens(labels=True), 3, 3),
    "resnet": Case(timm_model("resnet18", channels=(2, 2, 4, 4), stem_width=2), images(16), 8, 5),
}
PAIRS = [
    ("vit", "sublayer"), ("vit", "head"), ("vit", "channel"), ("bert", "sublayer"), ("bert", "head"), ("resnet", "sublayer"),
    ("resnet", "channel"), ("vit", ("block", "sublayer", "head")),
]  # fmt: skip
FIND_DEAD = ["layer_ablation", "gradient_based", "fisher_information"]


FEWER: dict[str, dict[str, int]] = {"shap_analysis": {"permutations": 4}}  # many units: each permutation runs the net for each


def view_of(subject: str, granularity: object) -> tuple[UniversalModel, Data]:
    case = SMALL[subject]
    model = case.model()
    data = Data.of([case.batch(4), case.batch(5)])
    model.see(data[0])
    return model.at(granularity), data


@pytest.mark.parametrize(("subject", "granularity"), PAIRS)
@pytest.mark.parametrize("name", NAMES)
def test_every_unit_has_a_score_or_an_explained_status(name: str, subject: str, granularity: object) -> None:
    view, data = view_of(subject, granularity)
    before = state_of(view)
    scores = ANALYZERS[name](**FEWER.get(name, {})).analyze(view, data)
    assert same_state(before, state_of(view)) == []
    assert list(scores) == [x.name for x in view.layers]
    for entry in scores.entries.values():
        assert math.isfinite(entry.value) == (entry.status is Status.OK)
        assert bool(entry.reason) == (entry.status is not Status.OK)


@pytest.mark.parametrize("name", NAMES)
def test_two_runs_agree_to_the_bit(name: str) -> None:
    first, second = (ANALYZERS[name]().analyze(*view_of("vit", ("sublayer", "head"))) for _ in range(2))
    assert str(first.entries) == str(second.entries)


@pytest.mark.parametrize("name", FIND_DEAD)
def test_a_head_whose_output_nobody_reads_ranks_last(name: str) -> None:
    view, data = view_of("bert", "head")
    view.task = Fidelity()
    dead = view.layers[5]
    with torch.no_grad():
        for _, tensor in dead.tensors():
            tensor.zero_()
    scores = ANALYZERS[name]().analyze(view, data)
    assert scores.ranks()[dead.name] == len(view.layers)
    assert scores[dead.name] == 0


@pytest.mark.parametrize("name", FIND_DEAD)
def test_a_dead_and_a_vital_channel_are_found(name: str) -> None:
    torch.manual_seed(2)
    net = ResidualNet(depth=2, width=6, classes=4)
    net.blocks[1].down.weight.data[:, 4] = 0.0
    net.blocks[0].down.weight.data[:, 7] *= 30.0
    net.blocks[0].up.bias.data[7] = 1.0
    inputs = torch.randn(40, 6)
    model = UniversalModel(net, task=Fidelity(), example=Batch((inputs[:2],)))
    ranks = ANALYZERS[name]().analyze(model.at("channel"), Data.of([inputs])).ranks()
    assert ranks["blocks.0.down:channel7"] == 1
    assert ranks["blocks.1.down:channel4"] > len(ranks) / 2


@pytest.mark.parametrize("granularity", ["sublayer", "head"])
def test_ablation_of_a_unit_is_the_mean_loss_with_it_silenced(granularity: str) -> None:
    from tests.replicas import silencing_by_hook

    view, data = view_of("bert", granularity)
    scores = ANALYZERS["layer_ablation"]().analyze(view, data)
    assert view.task is not None
    for unit in view.layers[::3]:
        total = 0.0
        for batch in data:
            whole = view.predict(batch)
            with silencing_by_hook([unit]):
                silenced = view.predict(batch)
            losses = [view.task.losses(output, batch, whole)[0].double().sum() for output in (silenced, whole)]
            total += float(losses[0] - losses[1])
        assert scores[unit.name] == pytest.approx(total / 9, rel=1e-5, abs=1e-9)


def test_forms_of_the_first_order_estimate_agree_on_a_mask() -> None:
    view, data = view_of("vit", "channel")
    forms = [ANALYZERS["gradient_based"](form=form).analyze(view, data) for form in ("absolute", "activation")]
    assert dict(forms[0]) == dict(forms[1])


def test_parameters_shared_out_are_those_of_the_block() -> None:
    model = SMALL["vit"].model()
    view = model.at(("block", "sublayer"))
    scores = ANALYZERS["parameter_count"]().analyze(view)
    assert scores["blocks.0"] == scores["blocks.0.attn"] + scores["blocks.0.mlp"]
    norms = ANALYZERS["weight_norm"]().analyze(view)
    assert norms["blocks.0"] == pytest.approx(math.hypot(norms["blocks.0.attn"], norms["blocks.0.mlp"]))


def test_fisher_of_a_block_is_the_sum_of_its_sublayers() -> None:
    view, data = view_of("vit", ("block", "sublayer"))
    scores = ANALYZERS["fisher_information"]().analyze(view, data)
    assert scores["blocks.1"] == pytest.approx(scores["blocks.1.attn"] + scores["blocks.1.mlp"], rel=1e-6)


def test_the_unfused_attention_of_torch_gets_all_its_parameters_gradients() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    net = nn.Sequential(nn.Unflatten(1, (4, 16)), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    model = UniversalModel(net.eval(), task=Fidelity(), example=Batch((torch.randn(2, 64),)))
    data = Data.of([torch.randn(6, 64)])
    scores = ANALYZERS["fisher_information"]().analyze(model.at(("block", "sublayer")), data)
    parts = [scores[name] for name in ("1.layers.0.self_attn", "1.layers.0:mlp")]
    assert scores["1.layers.0"] == pytest.approx(sum(parts), rel=1e-6)
