"""Layers are found by structure; the numbers per family are fixed here."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layerwise.data import Batch
from layerwise.errors import ModelError, UserModelError
from layerwise.structure import coverage, outside, read_layers
from tests.models import CASES, Case, Residual, ResidualNet, vectors


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_finds_the_layers_of_every_family(case: Case) -> None:
    model = case.model()
    assert (len(model.layers), sum(x.skippable for x in model.layers)) == (case.layers, case.skippable)


def test_layers_are_disjoint_named_by_path_and_in_order(case: Case) -> None:
    model = case.model()
    inside = [m for layer in model.layers for m in layer.module.modules()]
    assert len(inside) == len(set(inside))
    assert [x.index for x in model.layers] == list(range(case.layers))
    for layer in model.layers:
        assert model.module.get_submodule(layer.name) is layer.module
        assert layer.reason or layer.skippable


def test_a_skipped_layer_can_really_be_skipped(case: Case) -> None:
    model = case.model()
    for layer in model.layers:
        if layer.skippable:
            with model.skipping([layer.name]):
                assert torch.isfinite(model.predict(case.batch(3))).all()


def test_kinds_come_from_what_ran() -> None:
    kinds = {name: {x.kind for x in CASES[name].model().layers} for name in ("vit", "resnet", "sequential", "encoder")}
    assert kinds == {"vit": {"attention"}, "resnet": {"convolution"}, "sequential": {"linear"}, "encoder": {"attention"}}


def test_stage_borders_of_a_convnet_say_why_they_cannot_be_skipped() -> None:
    border = next(x for x in CASES["resnet"].model().layers if x.name == "layer2.0")
    assert border.reason == "input (2, 64, 8, 8) and output (2, 128, 4, 4) differ in shape"


def test_a_shared_layer_is_one_layer() -> None:
    (layer,) = CASES["albert"].model().layers
    assert layer.calls == 3


def test_a_shared_submodule_counts_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Residual(8)
            self.blocks = nn.ModuleList([self.block, self.block, Residual(8)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    net, other = Twice(), Twice()
    layers = read_layers(net, vectors()(2))
    assert [x.calls for x in layers] == [2, 1]
    assert (coverage(net, layers), coverage(other, layers)) == (1.0, 0.0)


def test_macs_of_a_linear_layer_are_its_matrix() -> None:
    layers = CASES["sequential"].model().layers
    assert [x.macs for x in layers] == [64, 64, 24]


def test_coverage_and_what_lies_outside() -> None:
    net = ResidualNet()
    layers = read_layers(net, vectors()(2))
    assert [name for name, _ in outside(net, layers)] == ["stem.weight", "stem.bias", "head.weight", "head.bias"]
    total = sum(p.numel() for p in net.parameters())
    assert coverage(net, layers) == pytest.approx(1 - (72 + 27) / total)


def test_a_block_is_not_torn_into_its_attention_and_feed_forward() -> None:
    assert [x.name for x in CASES["t5"].model().layers][:2] == ["encoder.block.0", "encoder.block.1"]


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(UserModelError, match=r"LW-U75 .*no parameters") as caught:
        read_layers(nn.Sequential(nn.ReLU()), Batch((torch.randn(2, 3),)))
    assert caught.value.exit_code == 3


def test_a_model_that_runs_no_weight_is_refused() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(ModelError, match=r"LW-M20 .*No layers"):
        read_layers(Idle(), Batch((torch.randn(2, 2),)))


def test_a_forward_that_raises_names_the_users_line() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyError("mine")

    with pytest.raises(UserModelError, match=r"LW-U73 .*test_structure\.py:\d+.*KeyError: 'mine'"):
        read_layers(Broken(), Batch((torch.randn(2, 2),)))


def test_reading_leaves_no_trace(case: Case) -> None:
    from tests.replicas import same_state, state_of

    model = case.model()
    model.module.train()
    before = state_of(model)
    assert model.layers
    assert same_state(before, state_of(model)) == []


def test_an_embedding_in_front_of_the_stack_is_no_layer() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4
    )
    layers = read_layers(ViTForImageClassification(config), Batch((torch.randn(2, 3, 16, 16),)))
    assert [x.name.rpartition(".")[2] for x in layers] == ["0", "1"]
    assert all(x.skippable for x in layers)


def test_the_tensors_of_a_block_are_its_parameters_each_once() -> None:
    for case in (CASES["bert"], CASES["albert"]):
        for layer in case.model().layers:
            found = dict(layer.tensors())
            assert list(found) == [name for name, _ in layer.module.named_parameters()]
            assert sum(t.numel() for t in found.values()) == layer.parameters
