"""Take whole layers out: in a residual network the stream flows on without them (ShortGPT, Men et al. 2024)."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layerwise import trees
from layerwise.errors import UsageError
from layerwise.method import METHODS, Check, CompressionMethod, exactly
from layerwise.model import UniversalModel
from layerwise.structure import Layer, Stream
from layerwise.supplies import NOTHING, Supplies
from layerwise.tensors import state
from layerwise.trace import evaluating, run

PLAIN = (bool, int, float, str, type(None), torch.dtype)


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
        """What is left is as it was; outputs alone would not show a wrong weight in a branch that gives nothing."""
        gone = tuple(f"{name}." for layer in layers for name in _names(before.module, before.layer(layer).module))
        kept = {name: tensor for name, tensor in state(before.module).items() if not name.startswith(gone)}
        return exactly(kept, state(after.module), "those of the uncut model")


class PassThrough(nn.Module):
    """Stands where a layer stood: hands the main tensor on, in the form of output that the layer had."""

    def __init__(self, stream: Stream, form: Any, settings: Mapping[str, Any], cached_as: int | None) -> None:
        super().__init__()
        # private, since the layer's own public settings come to stand beside them
        self._stream = stream
        self._form = form  # the layer's output with every tensor taken out
        self._cached_as = cached_as
        for name, value in settings.items():  # the model may ask its blocks what kind they are
            setattr(self, name, value)

    @classmethod
    def for_(cls, layer: nn.Module, stream: Stream, form: Any) -> PassThrough:
        own = vars(layer).items()
        indices = {vars(m)["layer_idx"] for m in layer.modules() if isinstance(vars(m).get("layer_idx"), int)}
        cached_as = indices.pop() if len(indices) == 1 else None
        stand_in = cls(stream, form, {k: v for k, v in own if not k.startswith("_") and isinstance(v, PLAIN)}, cached_as)
        return stand_in.train(layer.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._cached_as is not None:
            _count_tokens(self._cached_as, trees.get((args, kwargs), self._stream.enters), (*args, *kwargs.values()))
        output = self._form
        for leaves, enters in ((self._stream.leaves, self._stream.enters), *self._stream.passed):
            output = trees.replaced(output, leaves, trees.get((args, kwargs), enters))
        return output


def _count_tokens(index: int, stream: Tensor, given: Sequence[Any]) -> None:
    """Transformers ask the key-value cache of the first layer how many tokens came before: one zero per token keeps the count."""
    caches = sys.modules.get("transformers.cache_utils")  # whoever passes a cache has imported it
    for cache in given if caches else ():
        if isinstance(cache, caches.EncoderDecoderCache):  # type: ignore[union-attr]
            cache = cache.self_attention_cache
        if isinstance(cache, caches.Cache):  # type: ignore[union-attr]
            mark = stream.new_zeros(len(stream), 1, stream.shape[1], 1)
            cache.update(mark, mark, index)


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
