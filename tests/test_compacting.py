"""What was dropped is gone from the folder too: from_pretrained builds it, computes the same and generates the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from layerwise.compacting import compacted, original_names
from layerwise.compress.drop_layers import DropLayers
from layerwise.compress.half_precision import HalfPrecision
from layerwise.compress.low_rank import LowRank
from layerwise.compress.structured_pruning import StructuredPruning
from layerwise.method import CompressionMethod, apply_plan, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.proofs import equivalence, relative_error
from layerwise.saved import load_saved, save_model
from tests.models import CASES, images, tokens

SMALL: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_key_value_heads": 4,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def bart() -> nn.Module:
    sizes = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = tf.BartConfig(vocab_size=100, d_model=32, encoder_layers=3, decoder_layers=3, max_position_embeddings=64, **sizes)
    return tf.BartForConditionalGeneration(config)


def t5() -> nn.Module:
    config = tf.T5Config(
        vocab_size=100, d_model=32, d_ff=64, num_layers=3, num_decoder_layers=4, num_heads=4, d_kv=8, decoder_start_token_id=0
    )
    return tf.T5ForConditionalGeneration(config)


def gemma() -> nn.Module:
    """Every second layer sees a window of 4 tokens: one setting per layer."""
    kinds = ["sliding_attention", "full_attention"] * 2
    config = tf.Gemma3TextConfig(**SMALL, num_hidden_layers=4, head_dim=8, sliding_window=4, layer_types=kinds)
    return tf.Gemma3ForCausalLM(config)


def swin() -> nn.Module:
    config = tf.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[2, 3], num_heads=[2, 4], window_size=4)
    return tf.SwinForImageClassification(config)


def gpt2() -> nn.Module:
    """As many heads as layers: the number alone does not say which setting counts the layers."""
    config = tf.GPT2Config(vocab_size=100, n_embd=32, n_layer=4, n_head=4, bos_token_id=1, eos_token_id=2)
    return tf.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, num_hidden_layers=4))


Family = tuple[Callable[[], nn.Module], Any, tuple[str, ...], dict[str, Any]]
FAMILIES: dict[str, Family] = {
    # the class, its batches, what goes, and what the configuration says afterwards
    "gpt2": (gpt2, tokens(), ("transformer.h.0", "transformer.h.2"), {"n_layer": 2, "n_head": 4}),
    "llama": (llama, tokens(), ("model.layers.0", "model.layers.1"), {"num_hidden_layers": 2, "num_attention_heads": 4}),
    "gemma": (
        gemma, tokens(), ("model.layers.2",),
        {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    ),
    "t5": (
        t5, tokens(decoder=True), ("encoder.block.1", "decoder.block.2", "decoder.block.3"),
        {"num_layers": 2, "num_decoder_layers": 2},
    ),
    "bart": (
        bart, tokens(decoder=True), ("model.encoder.layers.0", "model.decoder.layers.0", "model.decoder.layers.1"),
        {"encoder_layers": 2, "decoder_layers": 1},
    ),
    "swin": (swin, images(), ("swin.encoder.layers.1.blocks.1",), {"depths": [2, 2], "num_heads": [2, 4]}),
}  # fmt: skip


def model_of(name: str) -> UniversalModel:
    build, batch, _, _ = FAMILIES[name]
    torch.manual_seed(0)
    module: Any = build().eval()
    module.config.use_cache = False
    return UniversalModel(module, example=batch(2))


def cut(model: UniversalModel, *steps: tuple[CompressionMethod, tuple[str, ...]]) -> UniversalModel:
    return apply_plan(model, CompressionPlan(tuple(step_of(m, names) for m, names in steps))).model


@pytest.mark.parametrize("name", FAMILIES)
def test_from_pretrained_loads_what_is_left(name: str, tmp_path: Path) -> None:
    _, batch, gone, told = FAMILIES[name]
    model = model_of(name)
    result = cut(model, (DropLayers(), gone))
    save_model(result, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert {key: config[key] for key in told} == told
    again: Any = type(model.module).from_pretrained(tmp_path / "model")  # type: ignore[attr-defined]
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in result.module.parameters())
    assert relative_error(UniversalModel(again).predict(batch(3)), result.predict(batch(3))) < 1e-6
    ours = load_saved(tmp_path / "model", module=model_of(name).module)
    assert ours.fingerprint == result.fingerprint
    assert torch.equal(ours.predict(batch(3)), result.predict(batch(3)))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma", "t5", "bart"])
def test_it_generates_with_a_cache_what_the_model_with_the_gaps_generates(name: str, tmp_path: Path) -> None:
    _, batch, gone, _ = FAMILIES[name]
    result = cut(model_of(name), (DropLayers(), gone))
    save_model(result, tmp_path / "model")
    again: Any = type(result.module).from_pretrained(tmp_path / "model")  # type: ignore[attr-defined]
    ids = batch(2).kwargs["input_ids"]
    options = {
        "max_new_tokens": 8,
        "min_new_tokens": 8,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    plain = {"pad_token_id": 0, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    made: list[Any] = []
    for module, cache in ((result.module, False), (again, False), (again, True)):
        with torch.no_grad():
            made.append(module.generate(**plain, **options, use_cache=cache))  # type: ignore[operator]
    for other in made[1:]:
        assert torch.equal(other.sequences, made[0].sequences)
        torch.testing.assert_close(torch.stack(other.logits), torch.stack(made[0].logits), rtol=0, atol=1e-5)
    assert torch.stack(made[0].logits).std() > 0.01


def test_with_other_changes_of_values_it_is_whole_and_with_other_cuts_the_reason_stands_in_the_folder(tmp_path: Path) -> None:
    model = CASES["llama"].model()
    half = cut(model, (DropLayers(), ("model.layers.1",)), (HalfPrecision("bfloat16"), ()))
    save_model(half, tmp_path / "half")
    again = tf.LlamaForCausalLM.from_pretrained(tmp_path / "half")
    assert (again.dtype, again.config.num_hidden_layers) == (torch.bfloat16, 2)
    both = cut(model, (DropLayers(), ("model.layers.1",)), (LowRank(), ("model.layers.0",)))
    save_model(both, tmp_path / "both")
    about = json.loads((tmp_path / "both" / "layerwise.json").read_text())
    assert about["unconfigured"].startswith("the tensors that are left are not those of the class")
    assert (tmp_path / "both" / "weights.safetensors").exists()
    assert not (tmp_path / "both" / "config.json").exists()
    assert load_saved(tmp_path / "both", module=CASES["llama"].model().module).fingerprint == both.fingerprint


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("first", [DropLayers, StructuredPruning])
def test_a_layer_dropped_and_the_others_cut_alike(family: str, first: type, tmp_path: Path) -> None:
    """In either order: each step proved, the folder one that `from_pretrained` reads, and the model that it was."""
    case = CASES[family]
    model = case.model()
    names = [layer.name for layer in model.layers]
    left = names if first is StructuredPruning else [names[0], names[2]]
    steps = [step_of(DropLayers(), names[1:2]), step_of(StructuredPruning(0.5, prune_type="neuron"), left)]
    plan = CompressionPlan(tuple(steps if first is DropLayers else steps[::-1]))
    result = apply_plan(model, plan)
    proofs = list(equivalence(model, result.model, result.plan, list(case.data(3, 2))))
    assert [p.passed for p in proofs] == [True, True]
    save_model(result.model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    half = {"llama": {"num_hidden_layers": 2, "intermediate_size": 32}, "gpt2": {"n_layer": 2, "n_inner": 64}}[family]
    assert {key: config[key] for key in half} == half
    wanted = result.model.predict(case.batch(3))
    again: Any = type(model.module).from_pretrained(tmp_path / "model")  # type: ignore[attr-defined]
    assert relative_error(UniversalModel(again).predict(case.batch(3)), wanted) < 1e-6
    ours = load_saved(tmp_path / "model", module=case.build())
    assert torch.equal(ours.predict(case.batch(3)), wanted)
    assert ours.fingerprint == result.model.fingerprint


def test_a_layer_dropped_and_the_others_cut_unlike(tmp_path: Path) -> None:
    case = CASES["llama"]
    result = cut(case.model(), (DropLayers(), ("model.layers.1",)), (StructuredPruning(0.5), ("model.layers.2",)))
    save_model(result, tmp_path / "model")
    about = json.loads((tmp_path / "model" / "layerwise.json").read_text())
    assert "whatever its configuration says" in about["unconfigured"]
    assert not (tmp_path / "model" / "config.json").exists()
    assert load_saved(tmp_path / "model", module=case.build()).fingerprint == result.fingerprint


def test_a_class_that_counts_its_layers_nowhere_keeps_the_gap_and_says_why() -> None:
    result = cut(CASES["residual"].model(), (DropLayers(), ("blocks.1",)))
    assert "none of transformers" in str(compacted(result.module))


def test_wrong_outputs_are_not_handed_over(tmp_path: Path) -> None:
    """A class that treats its layers by their number: without the first, the second would be taken for it."""

    class First(tf.LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for layer in self.model.layers[1:]:
                layer.post_attention_layernorm.variance_epsilon = 0.5

    torch.manual_seed(0)
    module = First(tf.LlamaConfig(**SMALL, num_hidden_layers=4, use_cache=False)).eval()
    result = cut(UniversalModel(module, example=tokens()(2)), (DropLayers(), ("model.layers.0",)))
    save_model(result, tmp_path / "model")
    assert "differs by" in json.loads((tmp_path / "model" / "layerwise.json").read_text())["unconfigured"]
    assert sorted(f.name for f in (tmp_path / "model").iterdir()) == ["layerwise.json", "manifest.json", "weights.safetensors"]


def test_names_go_back_to_where_they_were() -> None:
    one, two = torch.zeros(1), torch.zeros(1)
    found = original_names({"a.0.w": one, "a.1.w": two, "ab.0.w": one}, {"a": [0, 2]})
    assert list(found) == ["a.0.w", "a.2.w", "ab.0.w"]
    assert found["a.2.w"] is two
