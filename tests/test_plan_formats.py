"""Plans in other tools' words: exact lines, a configuration that torchao takes, and refusals of what cannot be said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

import layerwise as lw
from layerwise.compress.drop_layers import DropLayers
from layerwise.compress.gptq import Gptq
from layerwise.compress.half_embeddings import HalfEmbeddings
from layerwise.compress.half_precision import HalfPrecision
from layerwise.compress.half_weights import HalfWeights
from layerwise.compress.int8_dynamic import Int8Dynamic
from layerwise.compress.low_rank import LowRank
from layerwise.compress.packed_embeddings import PackedEmbeddings
from layerwise.compress.weight_only import WeightOnly
from layerwise.errors import UsageError
from layerwise.method import CompressionMethod, apply_plan, step_of
from layerwise.plan import CompressionPlan
from layerwise.tensors import dense, state
from tests.models import CASES


def plan(*steps: tuple[CompressionMethod, list[str]]) -> CompressionPlan:
    return CompressionPlan(tuple(step_of(method, layers) for method, layers in steps))


def test_llama_cpp_names_blocks_as_they_are_numbered_after_the_cut() -> None:
    mixed = plan(
        (DropLayers(), ["model.layers.1"]),
        (HalfPrecision(), ["model.layers.0", "model.layers.2"]),
        (PackedEmbeddings(8), []),
        (WeightOnly(8), ["model.layers.0"]),
        (Gptq(4, symmetric=True), ["model.layers.2"]),
    )
    lines = mixed.to_format("llama.cpp").splitlines()
    assert "# first, alone: llama-quantize --prune-layers 1 IN.gguf CUT.gguf COPY" in lines
    assert [x for x in lines if x.startswith("--")] == [
        r"--tensor-type blk\.0\.=q8_0", r"--tensor-type blk\.1\.=q4_0", "--token-embedding-type q8_0"
    ]  # fmt: skip
    assert any("F16" in x for x in lines)
    halves = plan((DropLayers(), ["model.layers.0"]), (HalfWeights(), ["model.layers.2"]), (HalfEmbeddings("bfloat16"), []))
    assert [x for x in halves.to_format("llama.cpp").splitlines() if x.startswith("--")] == [
        r"--tensor-type blk\.1\.=f16", "--token-embedding-type bf16"
    ]  # fmt: skip
    assert any("importance matrix" in x for x in lines)


def test_torchao_takes_the_configuration_and_stores_the_same_layers() -> None:
    from torchao.core.config import config_from_dict
    from torchao.quantization import quantize_

    case = CASES["llama"]
    model = case.model()
    asked = plan((WeightOnly(8, 32), ["model.layers.0"]), (WeightOnly(4, 32), ["model.layers.2"]))
    said = json.loads(asked.to_format("torchao", model))
    assert said["notes"]
    theirs = case.model()
    quantize_(theirs.module, config_from_dict(said["config"]), filter_fn=None)
    ours = apply_plan(model, asked).model
    for name, weight in state(ours.module).items():
        other = dense(state(theirs.module)[name])
        assert torch.equal(dense(weight), dense(state(model.module)[name])) == torch.equal(other, state(model.module)[name]), name
        assert float((dense(weight) - other).abs().max()) <= 0.02, name


def test_llm_compressor_gets_one_group_per_storage_with_every_linear_layer() -> None:
    model = CASES["llama"].model()
    asked = plan(
        (Int8Dynamic(), ["model.layers.0"]), (Gptq(4, 32), ["model.layers.1"]), (WeightOnly(8, 0, True), ["model.layers.2"])
    )
    stages = yaml.safe_load(asked.to_format("llm-compressor", model))["layerwise_stage"]["quantization_modifiers"]
    (gptq,) = stages["GPTQModifier"]["config_groups"].values()
    assert gptq["weights"] == {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
    assert len(gptq["targets"]) == 7
    assert all(t.startswith("model.layers.1.") for t in gptq["targets"])
    dynamic, channel = stages["QuantizationModifier"]["config_groups"].values()
    assert dynamic["input_activations"]["dynamic"] is True
    assert channel["weights"]["strategy"] == "channel"


def test_a_width_that_groups_do_not_divide_gets_one_scale_per_row_in_both_tools() -> None:
    model = CASES["llama"].model()
    group = next(g for g in (24, 40, 48) if model.module.model.layers[0].mlp.down_proj.in_features % g)
    asked = plan((WeightOnly(4, group), ["model.layers.0"]))
    stages = yaml.safe_load(asked.to_format("llm-compressor", model))["layerwise_stage"]["quantization_modifiers"]
    found = {path: g["weights"] for g in stages["QuantizationModifier"]["config_groups"].values() for path in g["targets"]}
    said = json.loads(asked.to_format("torchao", model))["config"]["_data"]["fqn_to_config"]
    for path, weights in found.items():
        divides = model.module.get_submodule(path).in_features % group == 0
        assert (weights["strategy"] == "group") == divides, path
        assert ("PerGroup" in json.dumps(said[path])) == divides, path


def test_onnx_lists_the_nodes_of_the_layers(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    case = CASES["residual"]
    lw.export(case.model(), tmp_path / "m.onnx", case.data(2))
    said = json.loads(plan((WeightOnly(4), ["blocks.1"])).to_format("onnx", tmp_path / "m.onnx"))
    assert said["bits"] == {"blocks.1.up/Gemm": 4, "blocks.1.down/Gemm": 4}
    assert "blocks.2.up/Gemm" in said["nodes_to_exclude"]
    with pytest.raises(UsageError, match=r"belongs to blocks\.7"):
        plan((WeightOnly(4), ["blocks.7"])).to_format("onnx", tmp_path / "m.onnx")


def test_what_a_format_cannot_say_is_refused() -> None:
    model = CASES["llama"].model()
    for name in ("llama.cpp", "torchao", "llm-compressor", "onnx"):
        with pytest.raises(UsageError, match=r"LW-C18 .*cannot say low_rank"):
            plan((LowRank(), ["model.layers.0"])).to_format(name, model)
    with pytest.raises(UsageError, match=r"Unknown plan format 'gguf'"):
        plan().to_format("gguf")
    for name in ("torchao", "llm-compressor"):
        with pytest.raises(UsageError, match="LW-C19"):
            plan((WeightOnly(), ["model.layers.0"])).to_format(name)
    with pytest.raises(UsageError, match="one chain of blocks"):
        plan((WeightOnly(), ["encoder.0", "decoder.0"])).to_format("llama.cpp")
    with pytest.raises(UsageError, match="ends in no number"):
        plan((WeightOnly(), ["head"])).to_format("llama.cpp")
