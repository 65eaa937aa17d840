"""What stands in for a dropped layer gives what the model expects of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwise.compress.drop_layers import DropLayers, PassThrough
from layerwise.data import Batch
from layerwise.errors import UsageError
from layerwise.method import apply_plan, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from tests.models import CASES


class Block(nn.Module):
    """A residual block that gives its output as a tensor, in a tuple, or in a tuple with None."""

    def __init__(self, form: str, number: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.form, self.number, self.kind = form, number, f"kind {number % 2}"

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Any:
        hidden = hidden + self.down(self.up(hidden).relu())
        return {"bare": hidden, "single": (hidden,), "pair": (hidden, None), "dict": {"hidden": hidden, "cache": None}}[self.form]


class Net(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.blocks = nn.ModuleList(Block(form, i) for i in range(4))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            assert block.kind in ("kind 0", "kind 1")  # as models ask their blocks for an attention type
            out = block(hidden=x)
            if self.form == "pair":
                x, cache = out
                assert cache is None
            else:
                x = out if self.form == "bare" else out["hidden"] if self.form == "dict" else out[0]
        return self.head(x)


def dropped(model: UniversalModel, *names: str) -> UniversalModel:
    return apply_plan(model, CompressionPlan((step_of(DropLayers(), names),))).model


@pytest.mark.parametrize("form", ["bare", "single", "pair", "dict"])
def test_the_output_keeps_its_form(form: str) -> None:
    torch.manual_seed(0)
    batch = Batch((torch.randn(3, 8),))
    model = UniversalModel(Net(form).eval(), example=batch)
    result = dropped(model, "blocks.1", "blocks.2")
    with model.skipping(["blocks.1", "blocks.2"]):
        expected = model.predict(batch)
    assert torch.equal(result.predict(batch), expected)
    stand_in = result.module.get_submodule("blocks.1")
    assert isinstance(stand_in, PassThrough)
    assert (stand_in.number, stand_in.kind) == (1, "kind 1")
    whole = dict(model.module.named_parameters())
    gone = sum(p.numel() for n, p in whole.items() if n.startswith(("blocks.1.", "blocks.2.")))
    assert sum(p.numel() for p in result.module.parameters()) == sum(p.numel() for p in whole.values()) - gone


def test_all_but_one_block_can_go_and_the_last_keeps_its_name() -> None:
    model = CASES["bert"].model()
    names = [layer.name for layer in model.layers]
    result = dropped(model, *names[:-1])
    assert [layer.name for layer in result.layers] == names[-1:]
    assert [layer.name for layer in result.clone().layers] == names[-1:]


def test_t5_blocks_that_make_the_position_bias_are_refused_and_the_others_hand_it_on() -> None:
    model = CASES["t5"].model()
    refused = {layer.name for layer in model.layers if "coupled" in DropLayers().treats(layer)}
    assert refused == {"encoder.block.0", "decoder.block.0"}
    result = dropped(model, "encoder.block.1", "decoder.block.1")
    batch = CASES["t5"].batch(3)
    with model.skipping(["encoder.block.1", "decoder.block.1"]):
        expected = model.predict(batch)
    assert torch.equal(result.predict(batch), expected)


def test_a_block_that_stands_in_several_places_goes_from_all() -> None:
    torch.manual_seed(0)
    shared = Block("bare", 0)
    module = nn.Sequential(nn.Linear(8, 8), shared, Block("bare", 1), shared, nn.Linear(8, 3)).eval()
    batch = Batch((torch.randn(3, 8),))
    model = UniversalModel(module, example=batch)
    result = dropped(model, "1")
    assert isinstance(result.module[1], PassThrough)
    assert isinstance(result.module[3], PassThrough)
    assert torch.equal(result.predict(batch), module[4](module[2](module[0](batch.args[0]))))
    assert DropLayers().check(model, result, ["1"]).passed


def test_a_layer_of_another_width_is_refused() -> None:
    model = CASES["resnet"].model()
    with pytest.raises(UsageError, match=r"layer2\.0: input .* differ in shape"):
        dropped(model, "layer2.0")
    with pytest.raises(UsageError, match=r"Did you mean 'layer2\.0'"):
        dropped(model, "layer2.00")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_key_value_cache_counts_on(family: str, gone: int) -> None:
    """Token by token with a cache gives what all tokens at once give, also without the first block, which counts them."""
    model = CASES[family].model()
    module = dropped(model, model.layers[gone].name).module
    ids = CASES[family].batch(2).kwargs["input_ids"]
    with torch.no_grad():
        whole = module(input_ids=ids, use_cache=False).logits
        step = module(input_ids=ids[:, :4], use_cache=True)
        found = [step.logits[:, -1]]
        for i in range(4, ids.shape[1]):
            step = module(input_ids=ids[:, i : i + 1], past_key_values=step.past_key_values, use_cache=True)
            found.append(step.logits[:, -1])
    torch.testing.assert_close(torch.stack(found, 1), whole[:, 3:], rtol=0, atol=1e-5)
