"""Dense transformers in TVA form: exact at full rank, still rotating by distance below it, smaller caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers as tf
from torch import nn

from layerwise.data import Batch
from layerwise.errors import UsageError
from layerwise.factors import in_two
from layerwise.native import AttentionOptions, Conversion, TVAAttention, convert_to_tva
from layerwise.native.gram import fewest

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 60,
}  # fmt: skip


def gpt2() -> nn.Module:
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60, n_positions=64, **ends))


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=3)


BUILD: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: tf.BertModel(tf.BertConfig(**SIZES)),
    "gpt2": gpt2,
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, num_key_value_heads=2, attention_bias=True)),
    "vit": vit,
}
each = pytest.mark.parametrize("name", BUILD)


def built(name: str) -> nn.Module:
    """In float64, the attention's matrices as large as trained ones and every bias in use."""
    torch.manual_seed(0)
    module = BUILD[name]().double().eval()
    with torch.no_grad():
        for path, parameter in module.named_parameters():
            if parameter.dim() == 2 and ("att" in path or "self_attn" in path):
                parameter.mul_(6)
            elif parameter.dim() == 1 and "norm" not in path.lower() and "ln" not in path:
                parameter.normal_(std=0.3)
    return module


def batch(name: str, length: int = 9) -> Batch:
    drawn = torch.Generator().manual_seed(1)
    if name == "vit":
        return Batch((torch.randn(4, 3, 16, 16, generator=drawn).double(),))
    ids = torch.randint(5, 60, (4, length), generator=drawn)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return Batch((), {"input_ids": ids, "attention_mask": mask})


def main(module: nn.Module, given: Batch, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        out = module(*given.args, **given.kwargs, **more)
    found = out if isinstance(out, torch.Tensor) else out[0]
    return found[given.kwargs["attention_mask"].bool()] if "attention_mask" in given.kwargs else found


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def converted(name: str, rank: int | None, **how: Any) -> tuple[nn.Module, Conversion]:
    module = built(name)
    return module, convert_to_tva(module, [batch(name)], rank, **how)


@each
def test_at_full_rank_nothing_changes(name: str) -> None:
    module, found = converted(name, 8)
    assert difference(main(found.module, batch(name)), main(module, batch(name))) < 1e-12
    assert set(found.heads.values()) == {8}
    assert not found.matrices
    assert all("would not make it smaller" in note for note in found.notes)


@each
def test_at_half_the_rank_it_is_smaller_close_and_the_original_is_left_alone(name: str) -> None:
    module, found = converted(name, 4)
    before = main(built(name), batch(name))
    assert torch.equal(main(module, batch(name)), before)
    count = [sum(p.numel() for p in m.parameters()) for m in (found.module, module)]
    assert count[0] < count[1]
    assert 1e-6 < difference(main(found.module, batch(name)), before) < 1
    assert set(found.heads.values()) == {4}
    assert set(found.matrices.values()) == {16}


@each
def test_more_energy_comes_closer(name: str) -> None:
    module = built(name)
    errors, sizes = [], []
    for energy in (0.7, 0.95, 0.9999):
        found = convert_to_tva(module, [batch(name)], energy=energy, feed_forward=False)
        errors.append(difference(main(found.module, batch(name)), main(module, batch(name))))
        sizes.append(sum(found.heads.values()))
    assert errors[0] > errors[2]
    assert sizes[0] < sizes[2] <= 16


def test_activations_of_low_rank_are_kept_whole() -> None:
    module = built("bert")
    for layer in module.encoder.layer:
        attention = layer.attention.self
        with torch.no_grad():
            for part in (attention.query, attention.key, attention.value):  # each head writes 3 of its 8 directions
                basis = torch.linalg.qr(torch.randn(4, 8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))).Q
                P = basis @ basis.mT
                part.weight.copy_(torch.einsum("hij,hjd->hid", P, part.weight.unflatten(0, (4, 8))).flatten(0, 1))
                part.bias.copy_(torch.einsum("hij,hj->hi", P, part.bias.unflatten(0, (4, 8))).flatten())
    found = convert_to_tva(module, [batch("bert")], energy=1 - 1e-9, feed_forward=False)
    assert set(found.heads.values()) == {3}
    assert difference(main(found.module, batch("bert")), main(module, batch("bert"))) < 1e-9


@pytest.mark.parametrize("rank", [2, 4, 6])
def test_below_full_rank_only_distances_count_under_rotary_positions(rank: int) -> None:
    _, found = converted("llama", rank)
    given = batch("llama")
    at = torch.arange(9).expand(4, -1)
    near, far = (main(found.module, given, position_ids=at + shift) for shift in (0, 40))
    assert difference(near, far) < 1e-6
    assert difference(near, main(found.module, given, position_ids=2 * at)) > 1e-3


@pytest.mark.parametrize(("name", "heads"), [("gpt2", 4), ("llama", 2)])
def test_the_cache_holds_r_numbers_per_key_and_value_and_goes_on_exactly(name: str, heads: int) -> None:
    _, found = converted(name, 4)
    ids = batch(name).kwargs["input_ids"]
    with torch.no_grad():
        first = found.module(input_ids=ids[:, :6], use_cache=True)
        rest = found.module(input_ids=ids[:, 6:], past_key_values=first.past_key_values)
        whole = found.module(input_ids=ids)
    assert first.past_key_values.layers[0].keys.shape == (4, heads, 9, 4)  # the same object went on
    torch.testing.assert_close(torch.cat((first.logits, rest.logits), 1), whole.logits)


@pytest.mark.parametrize("rank", [8, 5])
def test_what_is_left_is_the_head_scope_with_its_projectors_multiplied_in(rank: int) -> None:
    """The same subspaces in a `TVAAttention`, whose projectors stand beside the dense matrices, give the same."""
    module, found = converted("bert", rank, feed_forward=False)
    old, new = module.encoder.layer[0].attention, found.module.encoder.layer[0].attention
    a = TVAAttention(32, 4, rank, "head", AttentionOptions(bias=True, scale=8**-0.5)).double()
    core = a.core
    for mine, theirs in ((core.query, old.self.query), (core.key, old.self.key), (core.value, old.self.value)):
        mine.load_state_dict(theirs.state_dict())
    core.out.load_state_dict(old.output.dense.state_dict())
    with torch.no_grad():  # V from VW = W'
        for vein, part in ((core.vein, "key"), (core.value_vein, "value")):
            dense, thin = (getattr(x.self, part).weight.unflatten(0, (4, -1)) for x in (old, new))
            vein.copy_(torch.linalg.lstsq(dense.mT, thin.mT).solution.mT)
        h = torch.randn(2, 6, 32, dtype=torch.float64)
        expected = new.output.dense(new.self(h)[0])
        torch.testing.assert_close(a(h), expected)


def test_important_layers_get_more() -> None:
    scores = {"encoder.layer.0": 3.0, "encoder.layer.1": 1.0}
    _, found = converted("bert", 4, scores=scores)
    assert list(found.heads.values()) == [6, 2]
    with pytest.raises(UsageError, match=r"no score for the block encoder\.layer\.1"):
        converted("bert", 4, scores={"encoder.layer.0": 1.0})


def test_a_matrix_in_two_is_exact_where_the_directions_hold_all() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 9).double(), torch.randn(5, 6).double()
    V = torch.linalg.qr(torch.randn(6, 6).double()).Q
    torch.testing.assert_close(in_two(layer, V, reading=True)(x), layer(x))
    torch.testing.assert_close(in_two(layer, torch.eye(9).double(), reading=False)(x), layer(x))
    inside = x @ V[:2].T @ V[:2]
    torch.testing.assert_close(in_two(layer, V[:2], reading=True)(inside), layer(inside))


def test_the_fewest_directions_with_the_energy() -> None:
    values = torch.tensor([5.0, 3.0, 1.0, 1.0, 0.0])
    assert [fewest(values, e) for e in (0.4, 0.5, 0.51, 0.8, 0.95, 1.0)] == [1, 1, 2, 2, 4, 5]


def test_what_stands_between_projection_and_attention_forbids_it_and_a_note_says_so() -> None:
    torch.manual_seed(0)
    mixed = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=3, qk_norm=True
    ).eval()
    images = torch.randn(2, 3, 16, 16)
    with pytest.raises(UsageError, match="q_norm, k_norm stands between"):
        convert_to_tva(mixed, [images], 4)
    mixed.blocks[0].attn.q_norm = mixed.blocks[0].attn.k_norm = nn.Identity()
    found = convert_to_tva(mixed, [images], 4)
    assert list(found.heads) == ["blocks.0.attn"]
    assert any(note.startswith("blocks.1.attn stays as it is") for note in found.notes)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"rank": None, "energy": 0.0}, {"rank": None, "energy": 1.5}])
def test_settings_outside_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        convert_to_tva(built("bert"), [batch("bert")], **wrong)


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(UsageError, match="No attention"):
        convert_to_tva(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), [torch.randn(2, 4)])
