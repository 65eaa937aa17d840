"""Blocks that a compression method has changed, standing in for those of the model, which itself is never touched.

Decision: a method is applied to a *shell*, a copy of the module tree that shares every tensor with the model except those of the
blocks to be changed. So methods see a whole model, may exchange modules as they like, and cost the memory of these blocks only.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from layerwise.errors import LayerwiseError, UsageError
from layerwise.method import CompressionMethod
from layerwise.model import UniversalModel
from layerwise.patching import Replacement, replacing
from layerwise.planning.outside import REST, Outside, outer_shell, outside
from layerwise.supplies import NOTHING, Supplies
from layerwise.tensors import byte_size, distinct

Blocks = Mapping[str, nn.Module]  # layer → what computes in its place; `REST` → an `Outside`


def shell(model: UniversalModel, layers: Iterable[str]) -> UniversalModel:
    """A copy of `model` in which only the tensors of `layers` are copies; all others are the model's own."""
    own = {id(t) for name in layers for _, t in distinct(model.layer(name).module)}
    memo: dict[int, Any] = {id(t): t for _, t in distinct(model.module) if id(t) not in own}
    return model.changed(copy.deepcopy(model.module, memo), source=model.source)


def build(
    model: UniversalModel, methods: Sequence[CompressionMethod], layers: Sequence[str], supplies: Supplies = NOTHING
) -> dict[str, nn.Module]:
    """`layers` after `methods`, one after the other; layers that one of them cannot treat are missing. `REST` stands alone.

    Raises what the method raises, and `UsageError` (LW-C16) where it writes into tensors outside of its layers.
    """
    rest = list(layers) == [REST]
    stage, left = (outer_shell(model), [x.name for x in model.layers]) if rest else (shell(model, layers), list(layers))
    shared = [(name, t, t.data_ptr(), t._version) for name, t in distinct(model.module)]
    for method in methods:
        there = {layer.name: layer for layer in stage.layers}
        left = [name for name in left if name in there and not method.treats(there[name])]
        if left:
            supplies.check(method.name, method.needs)
            method.fitted(stage, left, supplies).apply_(stage, left, supplies)
            stage = stage.changed(stage.module, source=stage.source)
    for name, tensor, pointer, version in shared:
        if (tensor.data_ptr(), tensor._version) != (pointer, version):
            named = ", ".join(method.name for method in methods)
            raise UsageError(f"{named} wrote into {name}, outside of the layers that it was given.", code="LW-C16")
    if rest:
        changed = outside(model, stage)
        return {} if changed is None else {REST: changed}
    return {name: stage.module.get_submodule(name) for name in left}


def build_each(
    model: UniversalModel, methods: Sequence[CompressionMethod], layers: Sequence[str], supplies: Supplies = NOTHING
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """As `build`; where it fails for all of them together each is tried alone, and those that fail come with the reason."""
    try:
        return build(model, methods, layers, supplies), {}
    except LayerwiseError as error:
        if len(layers) < 2:
            return {}, dict.fromkeys(layers, error.what)
    built, failed = dict[str, nn.Module](), dict[str, str]()
    for name in layers:
        more, reasons = build_each(model, methods, [name], supplies)
        built, failed = built | more, failed | reasons
    return built, failed


@contextmanager
def installed(model: UniversalModel, blocks: Blocks) -> Iterator[None]:
    """Inside, `model` computes with `blocks` in the place of its own."""
    with ExitStack() as stack:
        for name, block in blocks.items():
            changed = block.instead(model.module) if isinstance(block, Outside) else None
            stack.enter_context(changed or replacing(model.layer(name).module, standing_in(block)))
        yield


def standing_in(block: nn.Module) -> Replacement:
    """The module `block` instead of the layer's own."""

    def swapped(forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return block(*args, **kwargs)

    return swapped


def bytes_of(blocks: Blocks) -> int:
    """The bytes that `blocks` hold, each memory once."""
    return byte_size(nn.ModuleList(blocks.values()))


def tensors_of(blocks: Blocks) -> list[Tensor]:
    """Every parameter of `blocks`."""
    return [p for block in blocks.values() for p in block.parameters()]


__all__ = ["Blocks", "build", "build_each", "bytes_of", "installed", "shell", "standing_in", "tensors_of"]
