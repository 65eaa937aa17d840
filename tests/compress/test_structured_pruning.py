"""Structured pruning: what belongs together is found, a wrong cut is found out, and what cannot be cut is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.compress.structured_pruning import StructuredPruning
from layerwise.coupling import coupled
from layerwise.data import Batch
from layerwise.errors import UsageError
from layerwise.method import Applied, apply_plan, method_of, step_of, untreated
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.proofs import judged
from layerwise.result import Proof
from layerwise.saved import load_saved, save_model
from tests.models import CASES, ResidualNet, tokens


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
    assert fault == "old number" or found.layer == "blocks.0"


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


class Fused(nn.Module):
    """Attention whose heads lie one after the other in one matrix, query, key and value of each together (`mixed`), or whose
    queries share the last two heads as key and value."""

    def __init__(self, mixed: bool) -> None:
        super().__init__()
        self.heads, self.mixed = 4, mixed
        self.qkv = nn.Linear(16, (12 if mixed else 6) * 8)
        self.out = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, 8))
        if self.mixed:
            q, k, v = heads.unflatten(2, (self.heads, 3)).transpose(1, 2).unbind(3)
        else:
            q, k, v = (t.transpose(1, 2) for t in (heads[:, :, : self.heads], heads[:, :, [-2]], heads[:, :, [-1]]))
        scores = q @ k.transpose(-1, -2) / 8**0.5
        return x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("mixed", "rows"), [(True, [*range(48, 72)]), (False, [*range(16, 24)])])
def test_a_head_of_one_fused_matrix(mixed: bool, rows: list[int]) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(Fused(mixed), Fused(mixed), nn.Linear(16, 3)).eval()
    model = UniversalModel(module, example=Batch((torch.randn(2, 5, 16),)))
    found = {t.group.name: t.group for t in coupled(model).groups}["0.qkv"]
    assert (found.kind, found.units) == ("head", 4)
    assert next(p for p in found.places if p.name == "0.qkv.weight").indices[2].tolist() == rows
    result = pruned(model, ratio=0.25)
    assert result.model.module[0].heads == 3
    assert proof(model, result).passed


def test_numbers_follow_however_many_units_a_trial_takes() -> None:
    """Eight groups of heads whose number the forward reads: a quarter of them is cut in the trial of the whole model."""
    torch.manual_seed(0)
    blocks = [Grouped(heads=16, shared=8, size=8) for _ in range(2)]
    model = UniversalModel(nn.Sequential(*blocks, nn.Linear(16, 3)).eval(), example=Batch((torch.randn(2, 5, 16),)))
    coupling = coupled(model)
    assert not coupling.refused
    assert {t.group.units for t in coupling.groups} == {8, 24}
    assert proof(model, pruned(model, ratio=0.5)).passed


def test_heads_that_share_a_table_of_biases_go_in_all_blocks() -> None:
    model = CASES["t5"].model()
    found = next(t.group for t in coupled(model).groups if t.group.kind == "head")
    assert found.blocks == ("encoder.block.0", "encoder.block.1", "encoder.block.2")
    assert any("relative_attention_bias" in p.name and p.indices.shape == (4, 1) for p in found.places)


def test_heads_that_get_zeros_from_the_first_block_go_in_all_and_the_class_loads_them(tmp_path: Path) -> None:
    """T5 looks at its encoder without positions: the first block makes zeros for its heads, and hands them on."""
    case = CASES["t5"]
    model = case.model()
    (found,) = [t for t in coupled(model).groups if t.group.name == "decoder.block.0.layer.1.EncDecAttention.q"]
    assert found.group.blocks == ("decoder.block.0", "decoder.block.1", "decoder.block.2")
    assert [n.path for n in found.numbers] == ["n_heads"] * 3
    result = pruned(model, ratio=0.5, prune_type="head")
    assert len(result.plan.steps[0].settings["groups"]) == 3  # of the encoder, of the decoder, and between them
    assert proof(model, result).passed
    save_model(result.model, tmp_path / "model")
    again = type(model.module).from_pretrained(tmp_path / "model").eval()  # type: ignore[attr-defined]
    assert again.config.num_heads == 2
    assert torch.allclose(UniversalModel(again).predict(case.batch(3)), result.model.predict(case.batch(3)), atol=1e-5)


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_heads_whose_slopes_are_made_from_their_number_stay_and_hidden_units_go(family: str) -> None:
    """ALiBi: slopes are worked out from how many heads there are, so that those of the heads that stay would be others."""
    import transformers as tf

    build = {
        "bloom": lambda: tf.BloomForCausalLM(
            tf.BloomConfig(vocab_size=100, hidden_size=32, n_layer=2, n_head=4, use_cache=False)
        ),
        "mpt": lambda: tf.MptForCausalLM(tf.MptConfig(vocab_size=100, d_model=32, n_layers=2, n_heads=4, use_cache=False)),
    }
    torch.manual_seed(0)
    model = UniversalModel(build[family]().eval(), example=tokens()(2))
    reasons = untreated(StructuredPruning(prune_type="head"), model, [layer.name for layer in model.layers])
    assert all(("query_key_value" in r and "fixed size" in r) or ("Wqkv" in r and "forward fails" in r) for r in reasons.values())
    assert len(reasons) == len(model.layers) == 2
    result = pruned(model, ratio=0.5)
    assert [entry[0] for entry in result.plan.steps[0].settings["groups"].values()] == [128, 128]
    assert proof(model, result).passed


class Padded(nn.Module):
    """ResNet-20's shortcut by zeros where channels double; squeeze and excitation, and a grouped convolution."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.pad = out - width
        self.first = nn.Conv2d(width, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.groups = nn.Conv2d(16, 32, 3, padding=1, groups=4)
        self.squeeze, self.excite = nn.Conv2d(32, 6, 1), nn.Conv2d(6, 32, 1)
        self.last = nn.Conv2d(32, out, 1)
        nn.init.normal_(self.norm.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        y = self.groups(self.norm(self.first(x)).relu())
        y = y * self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return F.pad(x, (0, 0, 0, 0, self.pad // 2, self.pad - self.pad // 2)) + self.last(y)


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Padded(8, 8), Padded(8, 16), Padded(16, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def test_convolutions_lose_inner_channels_and_whole_groups() -> None:
    torch.manual_seed(0)
    model = UniversalModel(Images().eval(), example=Batch((torch.randn(2, 3, 8, 8),)))
    found = {t.group.name: t.group for t in coupled(model).groups}
    assert {"blocks.1.first", "blocks.1.squeeze"} <= found.keys()
    group = next(p for p in found["blocks.1.first"].places if p.name == "blocks.1.last.weight")
    assert group.indices[1].tolist() == [*range(8, 16)]  # the outputs of group 1, beside its inputs 4 … 7
    assert not any(p.name.startswith(("stem", "head")) for g in found.values() for p in g.places)
    result = pruned(model, ratio=0.25)
    block = result.model.module.blocks[1]
    assert (block.first.out_channels, block.norm.num_features, block.groups.groups) == (12, 12, 3)
    assert (block.excite.out_channels, block.last.in_channels, block.last.out_channels) == (24, 24, 16)
    assert proof(model, result).passed


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generation_with_a_cache_goes_on_as_before(family: str) -> None:
    model = CASES[family].model()
    layers = [layer.name for layer in model.layers]
    method = StructuredPruning(0.5)
    result = apply_plan(model, CompressionPlan((step_of(method, layers),)))
    fitted = method_of(result.plan.steps[0])
    prompt = torch.tensor([[5, 17, 3]])
    settings = {"max_new_tokens": 12, "do_sample": True, "pad_token_id": 0, "eos_token_id": None}
    torch.manual_seed(0)
    found = result.model.module.generate(prompt, use_cache=True, **settings)
    masked = fitted.masked(model, layers)
    assert masked is not None
    torch.manual_seed(0)
    with masked:
        assert torch.equal(found, model.module.generate(prompt, use_cache=False, **settings))
    assert found.unique().numel() > 4


def test_the_class_loads_what_was_cut_alike_in_all_layers(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    model = CASES["llama"].model()
    result = apply_plan(model, CompressionPlan((step_of(StructuredPruning(0.5), [x.name for x in model.layers]),)))
    save_model(result.model, tmp_path / "model")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "model").eval()
    config = again.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.intermediate_size) == (2, 1, 8, 32)
    batch = CASES["llama"].batch(3)
    assert torch.allclose(again(**batch.kwargs).logits, result.model.predict(batch), atol=1e-6)


def test_layers_that_differ_are_loaded_by_us_alone(tmp_path: Path) -> None:
    case = CASES["llama"]
    model = case.model()
    result = apply_plan(model, CompressionPlan((step_of(StructuredPruning(0.5), [model.layers[1].name]),)))
    save_model(result.model, tmp_path / "model")
    assert not (tmp_path / "model" / "config.json").exists()
    again = load_saved(tmp_path / "model", module=case.build())
    assert torch.equal(again.predict(case.batch(3)), result.model.predict(case.batch(3)))


class Halved(nn.Module):
    """A convolution in two halves, of which the first is added to the stream: the second stays too, or halves would be others."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.inner, self.out = nn.Conv2d(8, 16, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.into(x).chunk(2, 1)
        return x + first + self.out(self.inner(second).relu())


class Refusing:
    """A configuration that keeps a number and does not give it."""

    def __init__(self) -> None:
        self.size = 20

    def __getattribute__(self, name: str) -> object:
        if name == "size":
            raise RuntimeError("it may vary from layer to layer")
        return super().__getattribute__(name)


class Summed(nn.Module):
    """Rows added up by numbers into zeros of the model's making; as many hidden units as a kernel takes, which wants fours."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.config = nn.Linear(8, 20), nn.Linear(20, 8), Refusing()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).relu()
        if hidden.shape[-1] % 4:
            raise RuntimeError("strides should be multiple of 16 bytes")
        total = hidden.new_zeros(hidden.shape).index_add_(0, torch.tensor([0, 1, 1, 0]), hidden)
        return x + self.down(total)


def stacked(block: type[nn.Module], example: Tensor) -> UniversalModel:
    torch.manual_seed(0)
    return UniversalModel(nn.Sequential(*(block() for _ in range(3))).eval(), example=Batch((example,)))


def test_halves_of_which_one_stays_are_left_alone() -> None:
    """One channel less would pass: 15 are halved into 8 and 7."""
    model = stacked(Halved, torch.randn(2, 8, 4, 4))
    result = pruned(model)
    assert [tuple(b.inner.weight.shape) for b in result.model.module] == [(6, 8, 3, 3)] * 3  # type: ignore[attr-defined]
    assert proof(model, result).passed


def test_units_go_by_fours_and_are_followed_into_what_the_model_makes() -> None:
    model = stacked(Summed, torch.randn(4, 8))
    assert [t.step for t in coupled(model).groups] == [4, 4, 4]
    result = pruned(model)
    assert result.model.module[0].up.out_features == 16  # type: ignore[union-attr,index]  # a Sequential
    assert proof(model, result).passed


def test_it_can_be_pruned_again() -> None:
    model = text()
    once = pruned(model, ratio=0.5, prune_type="neuron")
    twice = pruned(once.model, ratio=0.5)
    assert twice.model.module.blocks[0].up.weight.shape == (12, 16)
    assert proof(once.model, twice).passed


def test_settings_are_checked() -> None:
    with pytest.raises(UsageError, match="ratio is 1"):
        StructuredPruning(ratio=1)
    with pytest.raises(UsageError, match="magnitude"):
        StructuredPruning(criterion="magnitud")
    with pytest.raises(UsageError, match="calibration"):
        pruned(text(), criterion="taylor")
    assert replace(StructuredPruning(), scope="global").whole
