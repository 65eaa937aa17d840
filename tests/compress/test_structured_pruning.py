"""Structured pruning: what belongs together is found, a wrong cut is found out, and what cannot be cut is refused."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.compress.structured_pruning import StructuredPruning
from layerwise.coupling import coupled
from layerwise.data import Batch
from layerwise.errors import UsageError
from layerwise.method import Applied, apply_plan, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.proofs import judged
from layerwise.result import Proof
from tests.models import ResidualNet


class Grouped(nn.Module):
    """Attention of 4 queries and 2 keys in one matrix, a norm of each head, a rotary turn, and a gated feed-forward net."""

    def __init__(self, width: int = 16, heads: int = 4, shared: int = 2, size: int = 8) -> None:
        super().__init__()
        self.heads, self.shared, self.size = heads, shared, size
        self.qkv = nn.Linear(width, (heads + 2 * shared) * size, bias=True)
        self.norm = nn.LayerNorm(size)
        self.out = nn.Linear(heads * size, width)
        self.up = nn.Linear(width, 2 * 24)
        self.down = nn.Linear(24, width)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        widths = [self.heads * self.size, self.shared * self.size, self.shared * self.size]
        q, k, v = (t.view(batch, length, -1, self.size).transpose(1, 2) for t in self.qkv(x).split(widths, -1))
        angle = torch.arange(length)[:, None] * torch.linspace(0.1, 1, self.size)
        q, k = (self.norm(t) * angle.cos() + torch.cat([-t[..., 4:], t[..., :4]], -1) * angle.sin() for t in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, -1))
        gate, value = self.up(x).chunk(2, -1)
        return x + self.down(F.silu(gate) * value)


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Grouped() for _ in range(2))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def text() -> UniversalModel:
    torch.manual_seed(0)
    return UniversalModel(Text().eval(), example=Batch((torch.randn(2, 5, 16),)))


def pruned(model: UniversalModel, **settings: object) -> Applied:
    layers = [layer.name for layer in model.layers]
    return apply_plan(model, CompressionPlan((step_of(StructuredPruning(**settings), layers),)))  # type: ignore[arg-type]


def proof(model: UniversalModel, result: Applied) -> Proof:
    return judged(model, result.model, result.plan.steps[0], [model.example])


def test_groups_of_queries_go_with_their_key_and_value() -> None:
    model = text()
    found = {t.group.name: t for t in coupled(model).groups}
    heads = found["blocks.0.qkv"]
    assert (heads.group.kind, heads.group.units) == ("kv_group", 2)
    rows = next(p for p in heads.group.places if p.name == "blocks.0.qkv.weight")
    # queries 2 and 3, key 1, value 1 of the fused matrix: by hand
    assert rows.indices[1].tolist() == [*range(16, 32), *range(40, 48), *range(56, 64)]
    assert {n.path for n in heads.numbers} == {"heads", "shared"}
    gated = next(p for p in found["blocks.0.up"].group.places if p.name == "blocks.0.up.weight")
    assert gated.indices[3].tolist() == [3, 27]


def test_the_cut_computes_what_a_replica_with_zeros_computes() -> None:
    model = text()
    model.module.double()
    model = UniversalModel(model.module, example=Batch((model.example.args[0].double(),)))
    result = pruned(model, ratio=0.5)
    replica = copy.deepcopy(model.module)
    for name, (units, gone) in result.plan.steps[0].settings["groups"].items():
        block = replica.get_submodule(name.rpartition(".")[0])
        removed = [int(i) for run in gone.split(",") for i in range(int(run.split("-")[0]), int(run.split("-")[-1]) + 1)]
        with torch.no_grad():
            for unit in removed:
                if units == 2:
                    block.out.weight[:, 16 * unit : 16 * unit + 16] = 0
                else:
                    block.down.weight[:, unit] = 0
    x = model.example.args[0]
    assert torch.allclose(result.model.module(x), replica(x), rtol=0, atol=1e-12)
    assert result.model.module.blocks[0].qkv.weight.shape == (32, 16)
    assert result.model.module.blocks[0].up.out_features == 24
    assert proof(model, result).passed


@pytest.mark.parametrize("fault", ["wrong head", "stale bias", "old number", "swapped rows"])
def test_a_wrong_cut_is_found(fault: str) -> None:
    model = text()
    result = pruned(model, ratio=0.5, prune_type="head")
    assert proof(model, result).passed
    block = result.model.module.blocks[0]
    original = model.module.blocks[0].qkv
    gone = int(result.plan.steps[0].settings["groups"]["blocks.0.qkv"][1])
    with torch.no_grad():
        if fault == "wrong head":
            block.qkv.weight[:16] = original.weight[16 * gone : 16 * gone + 16]
        elif fault == "stale bias":
            block.qkv.bias[-8:] = original.bias[48 + 8 * gone : 56 + 8 * gone]
        elif fault == "old number":
            block.heads = 4
        else:
            block.qkv.weight[:16] = block.qkv.weight[:16].roll(1, 0)
    found = proof(model, result)
    assert found.passed is False
    assert fault == "old number" or found.layer.startswith("blocks.0.qkv")


def test_a_stream_through_several_blocks_stays() -> None:
    torch.manual_seed(0)
    model = UniversalModel(ResidualNet(), example=Batch((torch.randn(4, 8),)))
    coupling = coupled(model)
    assert coupling.refused["stem"] == "it runs through several blocks"
    assert [t.group.units for t in coupling.groups] == [16] * 4


def test_what_the_user_chooses_is_what_goes() -> None:
    model = text()
    result = pruned(model, groups={"blocks.1.up": ["0-2,23"]})
    assert result.plan.steps[0].settings["groups"] == {"blocks.1.up": [24, "0-2,23"]}
    keep = [*range(3, 23), *range(27, 47)]
    assert torch.equal(result.model.module.blocks[1].up.weight, model.module.blocks[1].up.weight[keep])
    with pytest.raises(UsageError, match=r"no group 'blocks.1.upp'"):
        pruned(model, groups={"blocks.1.upp": ["0"]})


def test_the_smallest_go_first() -> None:
    model = text()
    with torch.no_grad():
        for weight in (model.module.blocks[0].up.weight, model.module.blocks[0].up.bias[:, None]):
            weight[[5, 29]] = 0
        model.module.blocks[0].down.weight[:, 5] = 0
    result = pruned(model, ratio=1 / 24, prune_type="neuron")
    assert result.plan.steps[0].settings["groups"]["blocks.0.up"] == [24, "5"]


def test_settings_are_checked() -> None:
    with pytest.raises(UsageError, match="ratio is 1"):
        StructuredPruning(ratio=1)
    with pytest.raises(UsageError, match="magnitude"):
        StructuredPruning(criterion="magnitud")
    with pytest.raises(UsageError, match="calibration"):
        pruned(text(), criterion="taylor")
    assert replace(StructuredPruning(), scope="global").whole
