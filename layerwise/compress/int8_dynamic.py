"""Linear layers in 8-bit integers: weights rounded once per output row, activations per token while the model runs (torchao)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layerwise.errors import missing_dependency
from layerwise.method import METHODS, Check, CompressionMethod
from layerwise.model import UniversalModel
from layerwise.quiet import silence_import_noise
from layerwise.structure import Layer
from layerwise.supplies import NOTHING, Supplies
from layerwise.tensors import dense, differing, state, wraps


@METHODS.register("int8_dynamic")
@dataclass(frozen=True)
class Int8Dynamic(CompressionMethod):
    """Every `nn.Linear` in the layers, symmetric per output row. Convolutions and other classes of weights stay as they are."""

    name: ClassVar[str] = "int8_dynamic"
    shrinks: ClassVar[frozenset[str]] = frozenset({"size"})

    def treats(self, layer: Layer) -> str:
        if linears(layer.module):
            return ""
        if any(wraps(p) for p in layer.module.parameters()):
            return "its weights are quantized already"
        classes = sorted({type(m).__name__ for m in _weighty(layer.module)})
        return f"holds no nn.Linear; its weights are in {', '.join(classes) or 'no module of their own'}, which stay as they are"

    def remarks(self, layer: Layer) -> tuple[str, ...]:
        quantized = set(linears(layer.module).values())
        left = [
            f"{n} ({type(m).__name__})"
            for n, m in layer.module.named_modules()
            if m in _weighty(layer.module) and m not in quantized
        ]
        return (f"int8_dynamic leaves {', '.join(left)} in {layer.name} as they are",) if left else ()

    def apply_(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies = NOTHING) -> None:
        torchao = torchao_for(self.name)
        chosen = {m for name in layers for m in linears(model.layer(name).module).values()}
        config = torchao.Int8DynamicActivationInt8WeightConfig()
        torchao.quantize_(model.module, config, filter_fn=lambda module, name: module in chosen)

    def reshape_(self, model: UniversalModel, layers: Sequence[str]) -> None:
        self.apply_(model, layers)

    def check(self, before: UniversalModel, after: UniversalModel, layers: Sequence[str]) -> Check:
        """Quantized weights lie within half a step of the originals; all other tensors are the same."""
        old, new = state(before.module), state(after.module)
        if old.keys() != new.keys():
            return Check(1, 0, "the names of the tensors differ", min(old.keys() ^ new.keys()))
        chosen = {id(m.weight) for name in layers for m in linears(before.layer(name).module).values()}
        steps = {name: steps_off(t, new[name], quantized=id(t) in chosen) for name, t in old.items()}
        worst = max(steps, key=lambda name: steps[name])
        # half a step, and a little for the rounding of scale·integer back to a float
        return Check(steps[worst], 0.501, "steps of the 8-bit grid between a weight and its original", worst)


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    """The linear modules that can be quantized: not those quantized, nor ones whose weight another module shares."""
    found = {
        name: m
        for name, m in module.named_modules()
        # attention's NonDynamicallyQuantizableLinear hands its weight to a fused kernel that reads it as floats
        if type(m) is nn.Linear and not wraps(m.weight)
    }
    owners: dict[int, int] = {}
    for m in module.modules():
        for p in m.parameters(recurse=False):
            owners[id(p)] = owners.get(id(p), 0) + 1
    return {name: m for name, m in found.items() if owners[id(m.weight)] == 1}


def _weighty(module: nn.Module) -> set[nn.Module]:
    """The modules that own a weight matrix or kernel themselves."""
    return {m for m in module.modules() if any(p.dim() > 1 for p in m.parameters(recurse=False))}


def steps_off(old: Tensor, new: Tensor, *, quantized: bool) -> float:
    """The largest distance in steps of a row's grid; infinite when a tensor changed that should not have, or the reverse."""
    if old.shape != new.shape or quantized != (wraps(new) and not wraps(old)):
        return float("inf")
    if not quantized:
        return float("inf") if differing(old, new) else 0.0
    scale = new.scale.reshape(len(old), -1).clamp_min(torch.finfo(torch.float32).tiny)  # type: ignore[attr-defined]
    return float(((dense(new).float() - old.detach().float()).abs() / scale.float()).max())


def torchao_for(method: str) -> Any:
    """torchao.quantization, or the error that says how `method` gets it."""
    silence_import_noise()
    try:
        import torchao.quantization
    except ImportError as error:
        raise missing_dependency("torchao", "quant", method) from error
    return torchao.quantization
