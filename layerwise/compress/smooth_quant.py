"""8-bit weights and activations after outliers were moved from the activations into the weights (SmoothQuant, Xiao 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import ClassVar

import torch
from torch import nn

from layerwise.compress.int8_dynamic import Int8Dynamic, linears
from layerwise.errors import UsageError
from layerwise.lowbit.migration import EXACT, Link, apart, exponents, links, move_, weight_of
from layerwise.method import METHODS, Check, CompressionMethod
from layerwise.model import UniversalModel
from layerwise.structure import Layer
from layerwise.supplies import NOTHING, Supplies

INT8 = Int8Dynamic()


@METHODS.register("smooth_quant")
@dataclass(frozen=True)
class SmoothQuant(CompressionMethod):
    """`int8_dynamic` on a model whose wide channels were narrowed first, as seen on the first `samples` calibration samples.

    `strength` (α of the paper): 1 moves all of the range into the weights, 0 none of what the weights can bear. `fitted` sets
    `links`: the norm or linear layer that is divided → the linear layers that are multiplied. Where nothing can be moved
    it is `int8_dynamic`, and the remarks say so.
    """

    strength: float = 0.5
    samples: int = 128
    links: Mapping[str, Sequence[str]] | None = field(default=None, hash=False)
    name: ClassVar[str] = "smooth_quant"
    shrinks: ClassVar[frozenset[str]] = frozenset({"size"})
    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1 or self.samples < 1:
            raise UsageError("smooth_quant: strength must lie in 0 … 1, and samples be at least 1.")

    def treats(self, layer: Layer) -> str:
        return INT8.treats(layer)

    def remarks(self, layer: Layer) -> tuple[str, ...]:
        left = tuple(remark.replace(INT8.name, self.name, 1) for remark in INT8.remarks(layer))
        if self.links is None or any(f"{giver}.".startswith(f"{layer.name}.") for giver in self.links):
            return left
        why = "no norm or linear layer gives to linear layers alone"
        return (*left, f"smooth_quant moves no range in {layer.name}, where {why}: it is int8_dynamic there")

    def fitted(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies) -> SmoothQuant:
        if self.links is not None:
            return self
        found = [link for layer in layers for link in links(model, layer, _linear(model, layer))]
        return replace(self, links={link.giver: list(link.readers) for link in found})

    def apply_(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies = NOTHING) -> None:
        supplies.check(self.name, self.needs)
        for link, power in self.fitted(model, layers, supplies)._powers(model, supplies).items():
            move_(model, link, power)
        INT8.apply_(model, layers)

    def reshape_(self, model: UniversalModel, layers: Sequence[str]) -> None:
        INT8.reshape_(model, layers)

    def check(self, before: UniversalModel, after: UniversalModel, layers: Sequence[str]) -> Check:
        """With the scales read off the result: moved by them, `before` computes the same, and `after` is that in 8 bits."""
        moved, _ = self._moved_like(before, after)
        off = apart(moved.predict(before.example), before.predict(before.example))
        return INT8.check(moved, after, layers) if off <= EXACT else self._inexact(off)

    def check_on(self, before: UniversalModel, after: UniversalModel, layers: Sequence[str], supplies: Supplies) -> Check:
        """Also on calibration data, and that the scales are those of the formula there."""
        first = self.check(before, after, layers)
        if not first.passed or supplies.calibration is None:
            return first
        moved, seen = self._moved_like(before, after)
        for link, power in self._powers(before, supplies).items():
            if wrong := int((seen[link] != power).sum()):
                return Check(wrong, 0, "channels whose range was moved by another power of two than it should", link.giver)
        off = max(apart(moved.predict(b), before.predict(b)) for b in islice(supplies.calibration, 2))
        count = sum(len(p) for p in seen.values())
        detail = f"{first.detail}; {count:,} channels of {len(seen)} modules moved, which alone moves outputs by {off:.1g}"
        return replace(first, detail=detail) if off <= EXACT else self._inexact(off)

    def _inexact(self, off: float) -> Check:
        place = next(iter(self.links or {}), "")
        return Check(off, EXACT, "of the largest output, moved by the ranges before any rounding", place)

    def _moved_like(self, before: UniversalModel, after: UniversalModel) -> tuple[UniversalModel, dict[Link, torch.Tensor]]:
        """`before` moved as `after` shows, and by which powers; link by link, as one may read what another moved."""
        moved, seen = before.clone(), {}
        for link in self._links():
            seen[link] = _seen_exponents(moved, after, link)
            move_(moved, link, seen[link])
        return moved, seen

    def _links(self) -> list[Link]:
        return [Link(giver, tuple(readers)) for giver, readers in (self.links or {}).items()]

    def _powers(self, model: UniversalModel, supplies: Supplies) -> dict[Link, torch.Tensor]:
        assert supplies.calibration is not None  # apply_ and check_on have asked
        found = self._links()
        return dict(zip(found, exponents(model, found, self.strength, supplies.calibration.head(self.samples)), strict=True))


def _linear(model: UniversalModel, layer: str) -> dict[str, nn.Linear]:
    """Dotted path from the root → the linear modules of `layer` that become 8-bit."""
    inside = set(linears(model.layer(layer).module).values())
    return {name: m for name, m in model.module.named_modules() if m in inside}


def _seen_exponents(before: UniversalModel, after: UniversalModel, link: Link) -> torch.Tensor:
    """By which power of two each channel of the giver was divided, from its own tensors before and after."""
    old, new = (weight_of(model, link.giver) for model in (before, after))
    if old.dim() == 2:  # its rows were rounded afterwards, and their scales tell
        wanted, found = old.detach().abs().amax(1).double() / 127.5, new.scale.reshape(-1).double()  # type: ignore[attr-defined]
    else:
        wanted, found = (_sizes(model.module.get_submodule(link.giver)) for model in (before, after))
    ratio = torch.where((found > 0) & (wanted > 0), wanted / found, 1.0)
    return ratio.log2().round().int()


def _sizes(norm: nn.Module) -> torch.Tensor:
    """|weight| of each channel, and where that is zero |bias|."""
    weight, bias = norm._parameters["weight"], norm._parameters.get("bias")
    assert weight is not None  # what makes it a giver
    size = weight.detach().abs().double()
    return size if bias is None else torch.where(size > 0, size, bias.detach().abs().double())
