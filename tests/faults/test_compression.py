"""Faults in compressed models: each is injected into a right result, must have fired, and must make the named proof fail.

The list in docs/compression.md is this table. Faults of exported ONNX files are in tests/export.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwise.compress.distill import Distill
from layerwise.compress.drop_layers import DropLayers
from layerwise.compress.fine_tune import FineTune
from layerwise.compress.half_precision import HalfPrecision
from layerwise.compress.int8_dynamic import Int8Dynamic
from layerwise.compress.low_rank import LowRank
from layerwise.compress.magnitude_pruning import MagnitudePruning
from layerwise.compress.nm_pruning import NMPruning
from layerwise.compress.structured_pruning import StructuredPruning
from layerwise.compress.tva_conversion import TVAConversion
from layerwise.compress.weight_only import WeightOnly
from layerwise.configuring import difference
from layerwise.data import Data
from layerwise.errors import LayerwiseError, UsageError
from layerwise.files import write_manifest
from layerwise.method import Applied, CompressionMethod, apply_plan, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.proofs import judged
from layerwise.saved import load_saved, save_model
from layerwise.supplies import Supplies
from layerwise.weights import read_weights, save_weights
from tests.conftest import ROOT
from tests.models import CASES, Residual, ResidualNet, tokens, vectors

WHERE = {"residual": "blocks.1", "bert": "bert.encoder.layer.1", "llama": "model.layers.1", "normed": "1", "pruned": "blocks.1"}


class Normed(Residual):
    """A residual block that normalizes by statistics it has seen, with a table that no file holds."""

    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.norm = nn.BatchNorm1d(width)
        self.register_buffer("scale", torch.ones(width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x) * self.scale)))


def model_of(family: str) -> UniversalModel:
    torch.manual_seed(0)
    if family == "normed":
        return UniversalModel(nn.Sequential(*[Normed(8) for _ in range(3)]).eval(), example=vectors()(2))
    if family == "residual":  # wide enough for a 4-bit grid to be worth it
        return UniversalModel(ResidualNet(width=32).eval(), example=vectors(32)(2))
    if family == "pruned":
        return carried_out(model_of("residual"), ZEROS, "residual").model
    model = CASES[family].model()
    if family == "llama":
        model.module.lm_head.weight = model.module.model.embed_tokens.weight  # type: ignore[union-attr]
    return model


def data_of(family: str) -> Data:
    batch = {"normed": vectors(), "residual": vectors(32), "pruned": vectors(32)}.get(family) or tokens(labels=family == "bert")
    return Data.of([batch(4), batch(3)])


def supplies(family: str) -> Supplies:
    return Supplies(calibration=data_of(family), training=data_of(family), validation=data_of(family))


def carried_out(model: UniversalModel, method: CompressionMethod, family: str, *layers: str) -> Applied:
    return apply_plan(model, CompressionPlan((step_of(method, layers or (WHERE[family],)),)), supplies(family))


@dataclass(frozen=True)
class Fault:
    """What `inject` does to the module of a right result of `method` on the model of this family, and which proof then fails."""

    method: CompressionMethod
    family: str
    inject: Callable[[Any], None]
    proof: str


def roll(tensor: Tensor) -> None:
    tensor.copy_(tensor.roll(1, -1))


def swap(one: Any, other: Any) -> None:
    kept = one.clone()
    one.copy_(other)
    other.copy_(kept)


def other_layer(module: Any) -> None:
    """The one before went instead."""
    whole = model_of("residual").module
    module.blocks[0], module.blocks[1] = module.blocks[1], whole.blocks[1]  # type: ignore[index]


def stand_in_moved(module: Any) -> None:
    module.blocks[1], module.blocks[2] = module.blocks[2], module.blocks[1]


def not_packed(module: Any) -> None:
    weight = module.blocks[1].up.weight
    module.blocks[1].up.weight = nn.Parameter(weight.dequantize())


def untied(module: Any) -> None:
    module.lm_head.weight = nn.Parameter(module.lm_head.weight.clone())


def one_direction_less(module: Any) -> None:
    factors = module.blocks[1].up
    for part, columns in ((factors.first, False), (factors.second, True)):
        part.weight = nn.Parameter(part.weight[:, :-1] if columns else part.weight[:-1])


def factors_swapped(module: Any) -> None:
    up, down = module.blocks[1].up, module.blocks[1].down
    swap(up.first.weight, down.second.weight.T)
    swap(up.second.weight, down.first.weight.T)


def other_directions(module: Any) -> None:
    """Those of the plain SVD: a right projection, only not the best on the data."""
    model = model_of("residual")
    plain = carried_out(model, LowRank(aware=False), "residual").model.module.get_submodule("blocks.1.up")
    module.blocks[1].up.load_state_dict(plain.state_dict())


def one_more_kept(module: Any) -> None:
    weight = module.blocks[1].up.weight
    row, column = (weight == 0).nonzero()[0].tolist()
    weight[row, column] = 0.01


def heads_rolled(module: Any) -> None:
    query = module.bert.encoder.layer[1].attention.self.query
    query.weight.copy_(query.weight.roll(4, 0))


def other_keys(module: Any) -> None:
    """Those of the head that went, in the place of the last that stayed."""
    dense: Any = model_of("bert").module.get_submodule("bert.encoder.layer.1.attention.self.key")
    key = module.bert.encoder.layer[1].attention.self.key
    heads = dense.weight.unflatten(0, (4, 8))
    gone = next(h for h in heads if not any(torch.equal(h, left) for left in key.weight.unflatten(0, (3, 8))))
    key.weight[-8:] = gone


def louder(module: Any) -> None:
    attention = module.bert.encoder.layer[1].attention.self
    for part in (attention.query, attention.key):
        part.weight.mul_(1.1)
        part.bias.mul_(1.1)


def door_gone(module: Any) -> None:
    module._forward_pre_hooks.clear()
    module._forward_hooks.clear()


DROP, ZEROS, PACKED = DropLayers(), MagnitudePruning(0.5), WeightOnly(4, group=16)
CUT, SAID, KEPT = "masked_equivalence", "expected_values", "kept_structure"
FAULTS: dict[str, Fault] = {
    "another layer was dropped": Fault(DROP, "residual", other_layer, CUT),
    "the pass-through stands one layer too late": Fault(DROP, "residual", stand_in_moved, CUT),
    "a stale bias in a layer that was left": Fault(DROP, "residual", lambda m: m.blocks[3].down.bias.add_(0.01), CUT),
    "two layers' tensors swapped": Fault(DROP, "residual", lambda m: swap(m.blocks[0].up.weight, m.blocks[2].up.weight), CUT),
    "a stale number in the key-value cache": Fault(
        DROP, "llama", lambda m: setattr(m.model.layers[2].self_attn, "layer_idx", 1), CUT
    ),
    "the pass-through counts for another layer in the cache": Fault(
        DROP, "llama", lambda m: setattr(m.model.layers[1], "_cached_as", 2), CUT
    ),
    "a tied weight untied": Fault(DROP, "llama", untied, CUT),
    "stale statistics of a normalization": Fault(DROP, "normed", lambda m: m[2].norm.running_mean.add_(0.1), CUT),
    "two layers' factors swapped": Fault(LowRank(), "residual", factors_swapped, CUT),
    "one rank too few": Fault(LowRank(), "residual", one_direction_less, CUT),
    "directions that are not the best on the data": Fault(LowRank(), "residual", other_directions, CUT),
    "a factored matrix without its bias": Fault(LowRank(), "residual", lambda m: m.blocks[1].up.second.bias.zero_(), CUT),
    "the wrong head's queries": Fault(TVAConversion(rank=4, feed_forward=False), "bert", heads_rolled, CUT),
    "queries and keys scaled": Fault(TVAConversion(rank=4, feed_forward=False), "bert", louder, CUT),
    "the wrong head cut out of the keys": Fault(StructuredPruning(0.25, "head"), "bert", other_keys, CUT),
    "a neuron's bias of another neuron": Fault(
        StructuredPruning(0.25, "neuron"), "residual", lambda m: roll(m.blocks[1].up.bias), CUT
    ),
    "a mask shifted by one": Fault(ZEROS, "residual", lambda m: roll(m.blocks[1].up.weight), SAID),
    "one weight too many kept": Fault(ZEROS, "residual", one_more_kept, SAID),
    "a group of four with three weights (2:4)": Fault(NMPruning(), "residual", one_more_kept, SAID),
    "a group's scale off": Fault(PACKED, "residual", lambda m: m.blocks[1].up.weight.scale[1].mul_(1.1), SAID),
    "a group's zero point off": Fault(PACKED, "residual", lambda m: m.blocks[1].up.weight.zeros[1].add_(1), SAID),
    "a row's codes shifted": Fault(PACKED, "residual", lambda m: roll(m.blocks[1].up.weight.codes), SAID),
    "a matrix that was not quantized": Fault(PACKED, "residual", not_packed, SAID),
    "an 8-bit row with its neighbour's scale": Fault(
        Int8Dynamic(), "residual", lambda m: roll(m.blocks[1].up.weight.scale.T), SAID
    ),
    "a tensor that kept its type": Fault(
        HalfPrecision(), "residual", lambda m: setattr(m.head.weight, "data", m.head.weight.data.float()), SAID
    ),
    "inputs no longer cast at the door": Fault(HalfPrecision(), "residual", door_gone, SAID),
    "a pruned weight that training filled": Fault(FineTune(epochs=1), "pruned", one_more_kept, KEPT),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_the_proof_finds_it(name: str) -> None:
    fault = FAULTS[name]
    model = model_of(fault.family)
    result = carried_out(model, fault.method, fault.family)
    step, batches, given = result.plan.steps[0], list(data_of(fault.family)), supplies(fault.family)
    right = judged(model, result.model, step, batches, given)
    assert (right.name, right.passed) == (fault.proof, True), right
    with torch.no_grad():
        fault.inject(result.model.module)
    wrong = judged(model, result.model.changed(result.model.module, source=result.model.source), step, batches, given)
    assert wrong.passed is False, wrong


def edited(folder: Path, change: Callable[[dict[str, Any]], None], *, file: str = "layerwise.json") -> None:
    about = json.loads((folder / file).read_text(encoding="utf-8"))
    change(about)
    (folder / file).write_text(json.dumps(about), encoding="utf-8")


def other_plan(about: dict[str, Any]) -> None:
    about["source"]["settings"]["steps"][0]["layers"] = ["blocks.2"]


def one_bit(folder: Path) -> None:
    content = bytearray((folder / "weights.safetensors").read_bytes())
    content[-7] ^= 16
    (folder / "weights.safetensors").write_bytes(content)


def tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    found = dict(read_weights(folder / "weights.safetensors"))
    change(found)
    save_weights(folder / "weights.safetensors", {name: t.clone() for name, t in found.items()})


def exchanged(found: dict[str, Tensor]) -> None:
    found["blocks.0.up.weight"], found["blocks.2.up.weight"] = found["blocks.2.up.weight"], found["blocks.0.up.weight"]


def halved(found: dict[str, Tensor]) -> None:
    found["head.weight"] = found["head.weight"].half()


# what is done to the folder, whether its sums are made anew as if nothing were wrong, and what loading says ('': other outputs)
FILES: dict[str, tuple[Callable[[Path], None], bool, str]] = {
    "one bit of the saved weights": (one_bit, False, "LW-R11"),
    "a plan edited after saving": (lambda f: edited(f, other_plan), False, "LW-R11"),
    "a plan edited with its sums": (lambda f: edited(f, other_plan), True, "LW-M55"),
    "two saved tensors swapped, with their sums": (lambda f: tensors(f, exchanged), True, ""),
    "a saved tensor of another type, with its sum": (lambda f: tensors(f, halved), True, "LW-U"),
}


@pytest.mark.parametrize("name", FILES)
def test_loading_finds_it(name: str, tmp_path: Path) -> None:
    damage, anew, code = FILES[name]
    result = carried_out(model_of("residual"), DROP, "residual").model
    save_model(result, tmp_path / "model")
    batch, fresh = data_of("residual")[0], model_of("residual").module
    assert torch.equal(load_saved(tmp_path / "model", module=fresh).predict(batch), result.predict(batch))
    damage(tmp_path / "model")
    if anew:
        (tmp_path / "model" / "manifest.json").unlink()
        write_manifest(tmp_path / "model")
    if code:
        with pytest.raises(LayerwiseError, match=code):
            load_saved(tmp_path / "model", module=fresh).predict(batch)
    else:
        assert not torch.equal(load_saved(tmp_path / "model", module=fresh).predict(batch), result.predict(batch))


def test_a_table_that_no_file_holds(tmp_path: Path) -> None:
    result = carried_out(model_of("normed"), DROP, "normed").model
    result.module[2].scale.mul_(1.1)  # type: ignore[index]
    save_model(result, tmp_path / "model")
    again = load_saved(tmp_path / "model", module=model_of("normed").module)
    batch = data_of("normed")[0]
    assert not torch.equal(again.predict(batch), result.predict(batch))


def test_a_configuration_that_still_counts_the_dropped_layer(tmp_path: Path) -> None:
    result = carried_out(CASES["llama"].model(), DROP, "llama").model
    save_model(result, tmp_path / "model")
    assert difference(result, tmp_path / "model") == ""
    edited(tmp_path / "model", lambda config: config.update(num_hidden_layers=3), file="config.json")
    assert "differs by" in difference(result, tmp_path / "model")


def test_a_student_of_another_vocabulary() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    teacher = UniversalModel(LlamaForCausalLM(LlamaConfig(vocab_size=120, **sizes)).eval(), example=tokens()(2))
    student = CASES["llama"].model()
    with pytest.raises(UsageError, match="vocabulary has 100 tokens and the teacher's 120"):
        apply_plan(
            student,
            CompressionPlan((step_of(Distill(), ()),)),
            Supplies(training=data_of("llama"), validation=data_of("llama"), teacher=teacher),
        )


APART = {
    "a table that no file holds": test_a_table_that_no_file_holds,
    "a configuration that still counts the dropped layer": test_a_configuration_that_still_counts_the_dropped_layer,
    "a student of another vocabulary": test_a_student_of_another_vocabulary,
}


def test_the_page_lists_every_fault() -> None:
    text = (ROOT / "docs" / "compression.md").read_text(encoding="utf-8").split("## Faults we inject")[1].split("\n## ")[0]
    listed = re.findall(r"^\d+\. (.+) \([^()]*\)$", text, flags=re.M)
    assert listed == [*FAULTS, *FILES, *APART]
    assert len(listed) >= 20
