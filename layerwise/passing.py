"""`PassThrough`: what stands where a dropped layer stood, until the model is written without the gap (`layerwise.compacting`)."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerwise import trees
from layerwise.structure import Stream

PLAIN = (bool, int, float, str, type(None), torch.dtype)


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
        return cls(stream, form, settings_of(layer), cache_index(layer)).train(layer.training)

    @property
    def cached_as(self) -> int | None:
        """Its number in a key-value cache."""
        return self._cached_as

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._cached_as is not None:
            _count_tokens(self._cached_as, trees.get((args, kwargs), self._stream.enters), (*args, *kwargs.values()))
        output = self._form
        for leaves, enters in ((self._stream.leaves, self._stream.enters), *self._stream.passed):
            output = trees.replaced(output, leaves, trees.get((args, kwargs), enters))
        return output


def settings_of(module: nn.Module) -> dict[str, Any]:
    """The public settings that are plain values."""
    return {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training" and isinstance(v, PLAIN)}


def cache_index(layer: nn.Module) -> int | None:
    """The one number that the modules of a layer go by in a key-value cache."""
    indices = {vars(m)["layer_idx"] for m in layer.modules() if isinstance(vars(m).get("layer_idx"), int)}
    return indices.pop() if len(indices) == 1 else None


def _count_tokens(index: int, stream: Tensor, given: Sequence[Any]) -> None:
    """Transformers ask the key-value cache of the first layer how many tokens came before: one zero per token keeps the count."""
    caches = sys.modules.get("transformers.cache_utils")  # whoever passes a cache has imported it
    for cache in given if caches else ():
        if isinstance(cache, caches.EncoderDecoderCache):  # type: ignore[union-attr]
            cache = cache.self_attention_cache
        if isinstance(cache, caches.Cache):  # type: ignore[union-attr]
            mark = stream.new_zeros(len(stream), 1, stream.shape[1], 1)
            cache.update(mark, mark, index)


__all__ = ["PLAIN", "PassThrough", "cache_index", "settings_of"]
