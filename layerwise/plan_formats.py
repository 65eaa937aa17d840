"""Plans in the words of other tools: which of them quantize what to how many bits. What a format cannot say is refused or listed.

A plan's quantization can be said elsewhere; a cut that changes the model cannot, since the other tool starts from the original.
Compress first, export the result, and let the tool quantize that. What the other tool would do a little differently (its own
grid, another rounding) is listed in notes beside the configuration.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from layerwise.errors import UsageError, missing_dependency, nearest
from layerwise.model import UniversalModel
from layerwise.onnx_nodes import onnx_nodes
from layerwise.plan import CompressionPlan, Step

About = UniversalModel | str | Path | None  # what some formats need to know of the model: itself, or its ONNX file


@dataclass(frozen=True)
class Storage:
    """How a layer's linear weights are stored; `activations`: inputs are rounded to 8 bits as well, token by token."""

    bits: int
    group: int = 0
    symmetric: bool = True
    activations: bool = False
    corrected: bool = False  # by GPTQ


def to_format(plan: CompressionPlan, name: str, about: About = None) -> str:
    """The text that the tool `name` reads: ``llama.cpp``, ``torchao``, ``llm-compressor`` or ``onnx``.

    `about` is the model, where the format names each matrix (torchao, llm-compressor), or the path of its ONNX file (onnx).
    Raises `UsageError` with the nearest name, and (LW-C18) for steps that the format cannot say.
    """
    if name not in FORMATS:
        raise UsageError(f"Unknown plan format {name!r}.", remedy=nearest(name, FORMATS))
    return FORMATS[name](plan, about)


def storages(plan: CompressionPlan) -> dict[str, Storage]:
    """Layer → how its weights are stored at last."""
    found: dict[str, Storage] = {}
    for step in plan.steps:
        if step.method in STORED:
            found |= dict.fromkeys(step.layers, STORED[step.method](step.settings))
    return found


STORED: Mapping[str, Callable[[Mapping[str, Any]], Storage]] = {
    "weight_only": lambda s: Storage(s.get("bits", 4), s.get("group", 32), s.get("symmetric", False)),
    "gptq": lambda s: Storage(s.get("bits", 4), s.get("group", 32), s.get("symmetric", False), corrected=True),
    "int8_dynamic": lambda s: Storage(8, activations=True),
}


def _only(plan: CompressionPlan, name: str, *more: str) -> list[Step]:
    """The steps that are not quantization, of the methods `more`. Raises `UsageError` (LW-C18) for any other."""
    rest = [step for step in plan.steps if step.method not in STORED]
    if wrong := sorted({step.method for step in rest if step.method not in more}):
        raise UsageError(
            f"{name} cannot say {', '.join(wrong)}: it starts from the original model.",
            remedy="Compress by a plan of these steps first, export the result, and give the tool a plan of the others.",
            code="LW-C18",
        )
    return rest


def _linears(plan: CompressionPlan, name: str, about: About) -> dict[str, Storage]:
    """Dotted path of each `nn.Linear` in the plan's layers → its storage."""
    if not isinstance(about, UniversalModel):
        raise UsageError(f"{name} names each linear layer.", remedy="Give the model: plan.to_format(name, model).", code="LW-C19")
    found = {}
    for layer, storage in storages(plan).items():
        for path, module in about.module.get_submodule(layer).named_modules():
            if isinstance(module, nn.Linear):
                found[f"{layer}.{path}" if path else layer] = _divided(storage, module)
    return found


def _divided(storage: Storage, module: nn.Linear) -> Storage:
    """The storage with one scale for a whole row where groups do not divide it: neither tool takes a shorter last group."""
    return replace(storage, group=0) if storage.group and module.in_features % storage.group else storage


# ---- llama.cpp

EITHER = {2: "q2_k", 3: "q3_k", 6: "q6_k", 7: "q8_0", 8: "q8_0"}  # bits → type, symmetric or not
TYPES = {(4, False): "q4_1", (4, True): "q4_0", (5, False): "q5_1", (5, True): "q5_0"}
TYPES |= {(bits, symmetric): kind for bits, kind in EITHER.items() for symmetric in (False, True)}
FILE_TYPES = {"float16": "F16", "bfloat16": "BF16"}
HALVES = {"half_weights": r"--tensor-type blk\.{block}\.={kind}", "half_embeddings": "--token-embedding-type {kind}"}


def llama_cpp(plan: CompressionPlan, about: About = None) -> str:
    """Arguments of ``llama-quantize``, one a line: ``--tensor-type`` overrides by block, and what goes with them, as comments."""
    rest = _only(plan, "llama.cpp", "drop_layers", "half_precision", "packed_embeddings", *HALVES)
    gone = sorted(_block(layer) for step in rest if step.method == "drop_layers" for layer in step.layers)
    kept = {layer: storage for layer, storage in storages(plan).items() if _block(layer) not in gone}
    if (
        len({layer.rpartition(".")[0] for layer in (*kept, *(x for s in rest if s.method == "drop_layers" for x in s.layers))})
        > 1
    ):
        raise UsageError("llama.cpp numbers one chain of blocks, and the plan treats several.", code="LW-C18")
    lines = ["# arguments of llama-quantize; blocks as llama.cpp numbers them"]
    if gone:
        lines += [f"# first, alone: llama-quantize --prune-layers {','.join(map(str, gone))} IN.gguf CUT.gguf COPY"]
        lines += ["# then on CUT.gguf, whose blocks are numbered anew:"]
    for layer, storage in kept.items():
        number = _block(layer) - sum(block < _block(layer) for block in gone)
        lines.append(rf"--tensor-type blk\.{number}\.={TYPES[storage.bits, storage.symmetric]}")
    for step in rest:
        if step.method in HALVES:
            kind = FILE_TYPES[step.settings.get("dtype", "float16")].lower()
            lines += [HALVES[step.method].format(block=b, kind=kind) for b in _numbers(step, gone)]
        if step.method == "packed_embeddings":
            kind = TYPES[step.settings.get("bits", 8), step.settings.get("symmetric", False)]
            lines.append(f"--token-embedding-type {kind}")
        if step.method == "half_precision":
            lines.append(f"# as the file's type, for what is not named: {FILE_TYPES[step.settings.get('dtype', 'float16')]}")
    return "\n".join([*lines, *(f"# {note}" for note in _llama_notes(kept))]) + "\n"


def _llama_notes(kept: Mapping[str, Storage]) -> list[str]:
    notes = []
    if any(s.group != 32 for s in kept.values()):
        notes.append("groups are llama.cpp's own: 32 weights, or 256 of a k-quant, whose rows must be a multiple of 256 long")
    if any(s.corrected for s in kept.values()):
        notes.append("GPTQ's correction is not made: give llama-quantize an importance matrix instead")
    if any(s.activations for s in kept.values()):
        notes.append("activations: llama.cpp rounds them by blocks where its kernels want it, whatever the plan says")
    return notes


def _numbers(step: Step, gone: Sequence[int]) -> list[int]:
    """The blocks of a step as they are numbered once those `gone` are; one 0 for what lies in no block."""
    if step.method == "half_embeddings":
        return [0]
    return [n - sum(g < n for g in gone) for n in map(_block, step.layers) if n not in gone]


def _block(layer: str) -> int:
    """The last number of a dotted path. Raises `UsageError` (LW-C18) where there is none."""
    number = layer.rpartition(".")[2]
    if not number.isdigit():
        raise UsageError(f"llama.cpp numbers its blocks, and {layer} ends in no number.", code="LW-C18")
    return int(number)


# ---- torchao


def torchao(plan: CompressionPlan, about: About = None) -> str:
    """JSON with ``notes`` and ``config``, for ``config_from_dict`` of torchao.core.config; then
    ``quantize_(model, config, filter_fn=None)``.
    """
    _only(plan, "torchao")
    found = _linears(plan, "torchao", about)
    try:
        from torchao.core.config import config_to_dict
        from torchao.quantization import FqnToConfig
    except ImportError as error:
        raise missing_dependency("torchao", "quant", "the torchao format") from error
    config = FqnToConfig({path: _torchao_config(storage) for path, storage in found.items()})
    notes = ["weights are rounded to torchao's own grids, of which the zero point may differ from the plan's by one level"]
    if any(s.corrected for s in found.values()):
        notes.append("GPTQ's correction is not made: weights are rounded to nearest")
    return json.dumps({"config": config_to_dict(config), "notes": notes}, indent=2) + "\n"


def _torchao_config(storage: Storage) -> Any:
    import torch
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerAxis, PerGroup
    from torchao.quantization.quant_primitives import MappingType

    if storage.activations:
        return Int8DynamicActivationInt8WeightConfig()
    return IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{storage.bits}"),
        granularity=PerGroup(storage.group) if storage.group else PerAxis(0),
        mapping_type=MappingType.SYMMETRIC if storage.symmetric else MappingType.ASYMMETRIC,
    )


# ---- llm-compressor


def llm_compressor(plan: CompressionPlan, about: About = None) -> str:
    """A recipe (YAML): one group per storage with the paths of its linear layers, by `GPTQModifier` where the plan says GPTQ."""
    _only(plan, "llm-compressor")
    groups: dict[Storage, list[str]] = {}
    for path, storage in _linears(plan, "llm-compressor", about).items():
        groups.setdefault(storage, []).append(path)
    modifiers: dict[str, dict[str, Any]] = {}
    for storage, paths in groups.items():
        modifier = "GPTQModifier" if storage.corrected else "QuantizationModifier"
        made = modifiers.setdefault(modifier, {"ignore": ["lm_head"], "config_groups": {}})
        made["config_groups"][f"group_{len(made['config_groups'])}"] = {"targets": paths} | _scheme(storage)
    return yaml.safe_dump({"layerwise_stage": {"quantization_modifiers": modifiers}}, sort_keys=False)


def _scheme(storage: Storage) -> dict[str, Any]:
    grouped = {"strategy": "group", "group_size": storage.group} if storage.group else {"strategy": "channel"}
    scheme: dict[str, Any] = {"weights": {"num_bits": storage.bits, "type": "int", "symmetric": storage.symmetric} | grouped}
    if storage.activations:
        scheme["input_activations"] = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return scheme


# ---- ONNX


def onnx(plan: CompressionPlan, about: About = None) -> str:
    """JSON: the nodes of a file exported by layerwise to quantize and to leave, as onnxruntime's quantizers take them."""
    _only(plan, "onnx")
    if not isinstance(about, str | Path):
        raise UsageError(
            "onnx names nodes.", remedy='Give the exported file: plan.to_format("onnx", "model.onnx").', code="LW-C19"
        )
    found = onnx_nodes(plan, about)
    lists = {"nodes_to_quantize": found.quantize, "nodes_to_exclude": found.exclude, "bits": found.bits}
    notes = ["onnxruntime computes with 8 and 4 bits; other widths are stored in the next wider one"]
    return json.dumps(lists | {"notes": notes}, indent=2) + "\n"


FORMATS: Mapping[str, Callable[[CompressionPlan, About], str]] = {
    "llama.cpp": llama_cpp,
    "torchao": torchao,
    "llm-compressor": llm_compressor,
    "onnx": onnx,
}

__all__ = ["FORMATS", "Storage", "llama_cpp", "llm_compressor", "onnx", "storages", "to_format", "torchao"]
