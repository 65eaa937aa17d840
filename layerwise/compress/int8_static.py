"""Linear layers in 8-bit integers, activations in steps that were fixed beforehand by calibration data (torchao)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layerwise.compress.int8_dynamic import Int8Dynamic, linears, steps_off, torchao_for
from layerwise.data import Data
from layerwise.errors import UsageError, nearest
from layerwise.hessians import rows_read
from layerwise.method import METHODS, Check, CompressionMethod
from layerwise.model import UniversalModel
from layerwise.structure import Layer
from layerwise.supplies import NOTHING, Supplies
from layerwise.tensors import flattened, state
from layerwise.trace import evaluating, run, unfused

DYNAMIC = Int8Dynamic()
TOP = 127  # the largest activation has this code; torchao's rows of weights end at 127.5
SLACK = 1e-3  # relative, between two runs on the same data


@METHODS.register("int8_static")
@dataclass(frozen=True)
class Int8Static(CompressionMethod):
    """Every `nn.Linear` in the layers, weights symmetric per output row, activations with one scale per linear layer: the largest
    |x| that it reads on the first `samples` calibration samples, padding left out. What is larger later is cut off there.

    `fitted` sets `reads`: linear layer → [that largest |x|, the number of dimensions of what it reads], which torchao fixes too.
    """

    samples: int = 128
    reads: Mapping[str, Sequence[float]] | None = field(default=None, hash=False)
    name: ClassVar[str] = "int8_static"
    shrinks: ClassVar[frozenset[str]] = frozenset({"size"})
    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UsageError("int8_static: samples must be at least 1.")

    def treats(self, layer: Layer) -> str:
        return DYNAMIC.treats(layer)

    def remarks(self, layer: Layer) -> tuple[str, ...]:
        remarks = tuple(remark.replace(DYNAMIC.name, self.name, 1) for remark in DYNAMIC.remarks(layer))
        if self.reads is None:
            return remarks
        unread = [name for name in linears(layer.module) if _path(layer.name, name) not in self.reads]
        why = "on the calibration data they read nothing, zeros, or tensors of several ranks"
        return (*remarks, *((f"int8_static leaves {', '.join(unread)} in {layer.name} as they are: {why}",) if unread else ()))

    def fitted(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies) -> Int8Static:
        found = _linear(model, layers)
        if self.reads is None:
            supplies.check(self.name, self.needs)
            assert supplies.calibration is not None  # just checked
            return replace(self, reads=ranges(model, found, supplies.calibration.head(self.samples)))
        if unknown := self.reads.keys() - found.keys():
            raise UsageError(f"int8_static: there is no linear layer {min(unknown)!r}.", remedy=nearest(min(unknown), found))
        return self

    def apply_(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies = NOTHING) -> None:
        self.fitted(model, layers, supplies).reshape_(model, layers)

    def reshape_(self, model: UniversalModel, layers: Sequence[str]) -> None:
        torchao = torchao_for(self.name)
        for path in self.reads or {}:
            config = torchao.Int8StaticActivationInt8WeightConfig(
                act_quant_scale=self._scale(path),
                granularity=[torchao.PerTensor(), torchao.PerRow()],
                set_inductor_config=False,
            )
            torchao.quantize_(model.module.get_submodule(path), config, filter_fn=lambda module, name: not name)

    def check(self, before: UniversalModel, after: UniversalModel, layers: Sequence[str]) -> Check:
        """Quantized weights lie within half a step of the originals and carry the scales of the plan; all else is the same."""
        old, new, reads = state(before.module), state(after.module), self.reads or {}
        if old.keys() != new.keys():
            return Check(1, 0, "the names of the tensors differ", min(old.keys() ^ new.keys()))
        off = {n: steps_off(t, new[n], quantized=n.removesuffix(".weight") in reads) for n, t in old.items()}
        for path in reads:
            given = flattened("", new[f"{path}.weight"]).get(".act_quant_scale")
            if given is None or not torch.equal(given.cpu(), self._scale(path)):
                off[f"{path}.weight"] = float("inf")
        worst = max(off, key=lambda name: off[name])
        detail = f"steps of the 8-bit grid of a weight off its original; {len(reads)} linear layers have the planned scales"
        return Check(off[worst], 0.501, detail, worst)

    def check_on(self, before: UniversalModel, after: UniversalModel, layers: Sequence[str], supplies: Supplies) -> Check:
        """Also that the scales just cover what the linear layers read on the calibration data."""
        first = self.check(before, after, layers)
        if not first.passed or supplies.calibration is None:
            return first
        seen, reads = ranges(before, _linear(before, layers), supplies.calibration.head(self.samples)), self.reads or {}
        if missing := seen.keys() ^ reads.keys():
            return Check(len(missing), 0, "linear layers whose range was forgotten or made up", min(missing))
        off = {path: abs(reads[path][0] / largest - 1) for path, (largest, _) in seen.items()}
        worst = max(off, key=lambda path: off[path], default="")
        if off and not off[worst] <= SLACK:
            return Check(off[worst], SLACK, "relative, between a range and the largest activation on calibration data", worst)
        return first

    def _scale(self, path: str) -> Tensor:
        largest, dimensions = (self.reads or {})[path]
        return torch.full((1,) * int(dimensions), largest / TOP)


def _path(layer: str, name: str) -> str:
    return f"{layer}.{name}" if name else layer


def _linear(model: UniversalModel, layers: Sequence[str]) -> dict[str, nn.Linear]:
    """Dotted path from the root → the linear modules of `layers` that can be quantized, each once."""
    found = {_path(layer, name): m for layer in layers for name, m in linears(model.layer(layer).module).items()}
    once = {id(m): path for path, m in reversed(found.items())}
    return {path: m for path, m in found.items() if once[id(m)] == path}


def ranges(model: UniversalModel, found: Mapping[str, nn.Linear], data: Data) -> dict[str, list[float]]:
    """Path → [largest |x| that the module reads on `data`, dimensions of x]; without those that have none or no fixed ones."""
    largest: dict[str, float] = {}
    dimensions: dict[str, set[int]] = {path: set() for path in found}
    now = list(data)[:1]

    def watch(path: str, owner: nn.Module) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...]) -> None:
            rows = rows_read(owner, args[0].detach(), now[0])
            dimensions[path].add(args[0].dim())
            if len(rows):
                largest[path] = max(largest.get(path, 0.0), float(rows.abs().max()))

        return see

    with ExitStack() as stack:
        stack.enter_context(evaluating(model.module))
        stack.enter_context(torch.no_grad())
        stack.enter_context(unfused())
        for path, module in found.items():
            stack.callback(module.register_forward_pre_hook(watch(path, module)).remove)
        for batch in data:
            now[0] = batch.to(model.device)
            run(model.module, now[0])
    return {path: [largest[path], *dimensions[path]] for path in found if largest.get(path) and len(dimensions[path]) == 1}
