"""|w| · ‖x‖ per row, each layer with what the pruned ones before it give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from layerwise.activations import squares
from layerwise.compress.wanda import Wanda
from layerwise.data import Data
from layerwise.errors import UsageError
from layerwise.method import apply_plan, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.sparsity import matrices_of
from layerwise.structure import Layer
from layerwise.supplies import Supplies
from tests.models import CASES


def pruned(model: UniversalModel, method: Wanda, data: Data, names: list[str]) -> UniversalModel:
    return apply_plan(model, CompressionPlan((step_of(method, names),)), Supplies(calibration=data)).model


def kept(weight: np.ndarray, norms: np.ndarray, amount: float) -> np.ndarray:
    """The paper's rule, row by row in float64."""
    result = weight.copy()
    for row, scores in zip(result, np.abs(weight) * norms, strict=True):
        row[np.argsort(scores, kind="stable")[: round(amount * len(row))]] = 0
    return result


def test_linear_layers_follow_the_slow_way_with_inputs_of_the_pruned_net() -> None:
    model, data = CASES["residual"].model(), CASES["residual"].data(6, 5)
    names = [layer.name for layer in model.layers]
    result = pruned(model, Wanda(0.4), data, names[::-1])  # the order of the names is no matter
    x = torch.cat([b.args[0] for b in data]).double()
    net = model.clone().module.double()
    x = net.stem(x)
    for i, block in enumerate(net.blocks):
        hidden = torch.relu(block.up(x))  # with the unpruned weights of its own block
        for inner, inputs in ((block.up, x), (block.down, hidden)):
            expected = kept(inner.weight.detach().numpy(), inputs.detach().norm(dim=0).numpy(), 0.4)
            inner.weight.data = torch.from_numpy(expected)
            found = result.module.blocks[i].get_submodule("up" if inner is block.up else "down").weight
            np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-7)
        x = block(x)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Conv2d(4, 6, (3, 1), dilation=2, groups=2), nn.Conv1d(4, 4, 3, groups=4),
        nn.Conv3d(2, 2, 2), nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect"),
    ],
    ids=["strided", "grouped", "depthwise", "3d", "reflected"],
)  # fmt: skip
def test_a_convolution_weight_meets_the_pixels_that_unfolding_gives(conv: nn.Module) -> None:
    """One weight at a time: set it alone to 1, and the output is the pixels that it meets."""
    dims = conv.weight.dim() - 2
    x = torch.randn(3, conv.in_channels, *[7] * dims, generator=torch.Generator().manual_seed(0))
    (matrix,) = matrices_of(layer_of(conv))
    found = squares(matrix, x)
    with torch.no_grad():
        for index in np.ndindex(*conv.weight.shape):
            conv.weight.zero_()
            conv.bias.zero_()
            conv.weight[index] = 1
            met: Tensor = conv(x)[:, index[0]]
            assert float(found[index]) == pytest.approx(float(met.double().square().sum()), rel=1e-5)


def layer_of(module: nn.Module) -> Layer:
    return Layer("layer", 0, module, "convolution", 1, False, "")


def test_every_row_has_its_share_and_transposed_layers_are_read_right() -> None:
    model, data = CASES["gpt2"].model(), CASES["gpt2"].data(3)
    result = pruned(model, Wanda(0.5), data, ["transformer.h.1"])
    weight = result.module.get_submodule("transformer.h.1.mlp.c_fc").weight  # (inputs, outputs)
    assert ((weight == 0).sum(0) == weight.shape[0] // 2).all()
    assert not ((weight == 0).sum(1) == weight.shape[1] // 2).all()


def test_inputs_decide_where_weights_are_alike() -> None:
    """Two inputs, one a hundred times as large: magnitude cannot tell their weights apart."""
    model = UniversalModel(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3)))
    with torch.no_grad():
        model.module[0].weight[:] = torch.tensor([[1.0, 1.1], [1.1, 1.0], [-1.0, 1.0]])
    data = Data.of([torch.tensor([[0.01, 1.0], [0.02, -1.0]])])
    model.see(data[0])
    found = pruned(model, Wanda(0.5), data, [model.layers[0].name]).module[0].weight
    assert (found != 0).tolist() == [[False, True]] * 3


def test_it_is_refused_without_data_and_outside_its_range() -> None:
    with pytest.raises(UsageError, match="calibration"):
        apply_plan(CASES["residual"].model(), CompressionPlan((step_of(Wanda(), ["blocks.0"]),)))
    with pytest.raises(UsageError, match=r"0 … 1"):
        Wanda(-0.1)
