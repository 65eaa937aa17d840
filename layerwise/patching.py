"""Exchanging what a module computes for the length of a ``with`` block; its hooks keep running, and `finally` restores it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layerwise import trees
from layerwise.structure import Layer, Site

# gets the module's own forward, the positional and the keyword arguments, and gives the output
Replacement = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@contextmanager
def replacing(module: nn.Module, replacement: Replacement) -> Iterator[None]:
    """Inside, `module` computes ``replacement(its forward, args, kwargs)``."""
    had = "forward" in vars(module)  # someone else may have patched it before us
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, args, kwargs)

    module.forward = forward
    try:
        yield
    finally:
        if had:
            module.forward = original
        else:
            del module.forward


def place(layer: Layer) -> nn.Module:
    """The module whose forward `skip` replaces: a unit's is that of its site."""
    return layer.module if layer.site is None else layer.site.module


def skip(layer: Layer) -> Replacement:
    """The layer passes its main input on. What else it gives (position biases, caches) is still computed.

    A unit inside a block adds nothing: its share of the site's tensor becomes 0.
    """
    if layer.site is not None:
        return _at_site(layer.site, torch.zeros_like)
    stream = layer.stream
    assert stream is not None, layer.name

    def passed_on(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        entering = trees.get((args, kwargs), stream.enters)
        if stream.alone and not stream.leaves:
            return entering
        entering = entering.clone()  # the block may write into its input
        return trees.replaced(forward(*args, **kwargs), stream.leaves, entering)

    return passed_on


def altering(layer: Layer, change: Callable[[Tensor], Tensor]) -> Replacement:
    """What the layer adds to its stream becomes `change` of it; where it changes the stream's shape, what leaves does.

    Of a unit inside a block its share of the site's tensor does.
    """
    if layer.site is not None:
        return _at_site(layer.site, change)
    stream = layer.stream
    assert stream is not None, layer.name

    def altered(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        entering = trees.get((args, kwargs), stream.enters).clone()  # the block may write into its input
        output = forward(*args, **kwargs)
        leaving = trees.get(output, stream.leaves)
        new = entering + change(leaving - entering) if layer.skippable else change(leaving)
        return trees.replaced(output, stream.leaves, new)

    return altered


def _at_site(site: Site, change: Callable[[Tensor], Tensor]) -> Replacement:
    def altered(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if site.entering:
            args, kwargs = _with(site, change, (args, kwargs))
            return forward(*args, **kwargs)
        return _with(site, change, forward(*args, **kwargs))

    return altered


def _with(site: Site, change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    new = trees.get(tree, site.path).clone()
    site.of(new).copy_(change(site.of(new)))
    return trees.replaced(tree, site.path, new)


def adding(layer: Layer, branch: Tensor) -> Replacement:
    """The layer adds `branch` to its stream, whatever it computes; a shared one does from its first input to its last output.

    Of a unit inside a block its share of the site's tensor becomes `branch`.
    """
    if layer.site is not None:
        return _at_site(layer.site, lambda _: branch)
    stream = layer.stream
    assert stream is not None, layer.name
    entered: list[Tensor] = []

    def patched(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        entered.append(trees.get((args, kwargs), stream.enters).clone())  # cloned, because the block may write into it
        if layer.calls == 1 and stream.alone and not stream.leaves:
            return entered[0] + branch
        output = forward(*args, **kwargs)
        return output if len(entered) < layer.calls else trees.replaced(output, stream.leaves, entered[0] + branch)

    return patched


def leaving_as(layer: Layer, leaving: Tensor) -> Replacement:
    """The layer's main output becomes `leaving` (at the last call of a shared one)."""
    stream = layer.stream
    assert stream is not None, layer.name
    calls = itertools.count(1)

    def patched(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = forward(*args, **kwargs)
        return output if next(calls) < layer.calls else trees.replaced(output, stream.leaves, leaving.clone())

    return patched
