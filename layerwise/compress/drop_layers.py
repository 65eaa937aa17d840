"""Take whole layers out: in a residual network the stream flows on without them (ShortGPT, Men et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from layerwise import trees
from layerwise.errors import UsageError
from layerwise.method import METHODS, Check, CompressionMethod, exactly
from layerwise.model import UniversalModel
from layerwise.passing import PLAIN, PassThrough, cache_index, settings_of
from layerwise.structure import Layer
from layerwise.supplies import NOTHING, Supplies
from layerwise.tensors import state
from layerwise.trace import evaluating, run


@METHODS.register("drop_layers")
@dataclass(frozen=True)
class DropLayers(CompressionMethod):
    """Each layer becomes a `PassThrough` under its name, so that the other layers keep theirs."""

    name: ClassVar[str] = "drop_layers"
    shrinks: ClassVar[frozenset[str]] = frozenset({"params", "size", "macs"})
    structural: ClassVar[bool] = True
    selective: ClassVar[bool] = True

    def treats(self, layer: Layer) -> str:
        """Skippable, and nothing else that later layers need is computed inside (T5's first block makes the position bias)."""
        if not layer.skippable:
            return layer.reason
        assert layer.stream is not None  # what makes it skippable
        if layer.stream.gives:
            where = ", ".join("output" + "".join(f"[{key!r}]" for key in path) for path in layer.stream.gives)
            return f"coupled: it also gives {where}, which it computes itself and later layers may need"
        return ""

    def apply_(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies = NOTHING) -> None:
        forms = _forms(model, layers)
        for name in layers:
            layer = model.layer(name)
            assert layer.stream is not None, name
            _exchange_(model.module, layer.module, PassThrough.for_(layer.module, layer.stream, forms[name]))

    def reshape_(self, model: UniversalModel, layers: Sequence[str]) -> None:
        self.apply_(model, layers)

    def masked(self, model: UniversalModel, layers: Sequence[str]) -> AbstractContextManager[None]:
        return model.skipping(layers)

    def check(self, before: UniversalModel, after: UniversalModel, layers: Sequence[str]) -> Check:
        """What is left is as it was, settings and numbers in the cache included; outputs alone would not show a wrong weight in a
        branch that gives nothing, nor what generation stumbles over.
        """
        gone = tuple(f"{name}." for layer in layers for name in _names(before.module, before.layer(layer).module))
        kept = {name: tensor for name, tensor in state(before.module).items() if not name.startswith(gone)}
        check = exactly(kept, state(after.module), "those of the uncut model")
        return check if not check.passed else _same_settings(before, after, layers, gone) or check


def _same_settings(before: UniversalModel, after: UniversalModel, layers: Sequence[str], gone: tuple[str, ...]) -> Check | None:
    """The failed check, if there is one."""
    new = dict(after.module.named_modules(remove_duplicate=False))
    kept = [(n, m) for n, m in before.module.named_modules(remove_duplicate=False) if not f"{n}.".startswith(gone)]
    other = [n for n, m in kept if repr(sorted(settings_of(m).items())) != repr(sorted(settings_of(new[n]).items()))]
    for name in layers:
        stand_in = new[name]
        if not isinstance(stand_in, PassThrough) or stand_in.cached_as != cache_index(before.layer(name).module):
            other.append(name)
    return Check(len(other), 0, "modules whose settings are not those of the uncut model", other[0]) if other else None


def _forms(model: UniversalModel, layers: Sequence[str]) -> dict[str, Any]:
    """Layer → its output on the example, with None in the place of each tensor."""
    forms: dict[str, Any] = {}
    handles = [model.layer(n).module.register_forward_hook(_form_recorder(n, forms)) for n in layers]
    try:
        with evaluating(model.module), torch.no_grad():
            run(model.module, model.example)
    finally:
        for handle in handles:
            handle.remove()
    return forms


def _form_recorder(name: str, forms: dict[str, Any]) -> Any:
    def record(module: nn.Module, args: Any, output: Any) -> None:
        form = output
        for path, _ in list(trees.tensors(output)):
            form = trees.replaced(form, path, None)
        _only_plain(form, name)
        forms[name] = form

    return record


def _only_plain(form: Any, name: str) -> None:
    """Raises `UsageError` if the output holds objects (a cache), which another forward would have to make anew."""
    parts = form.values() if isinstance(form, Mapping) else form if isinstance(form, tuple | list) else None
    if parts is None and not isinstance(form, PLAIN):
        raise UsageError(f"drop_layers cannot treat {name}: its output holds a {type(form).__name__}.")
    for part in parts or ():
        _only_plain(part, name)


def _exchange_(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for name in _names(root, old):
        root.set_submodule(name, new)


def _names(root: nn.Module, wanted: nn.Module) -> list[str]:
    """Every dotted path of `wanted`: a shared layer stands in several places."""
    return [name for name, m in root.named_modules(remove_duplicate=False) if m is wanted]
