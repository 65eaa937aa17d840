"""The configuration of a transformers model that was cut alike in all its layers.

Decision: no names of models. The numbers of the configuration that equal a size that changed are tried, each kept if it brings
more tensors to the shape they have now. Where layers differ, or a class works a size out from another one that stays, nothing
fits; ``layerwise.json`` says what was cut.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Set
from typing import Any

from torch import nn

from layerwise.compacting import Shapes, places, set_, shapes_of

Sizes = Set[tuple[int, int]]  # before and after
Setting = tuple[tuple[tuple[Any, ...], ...], int]  # places in the configuration and what they become
MOST = 64  # settings; more would be chance


def narrowed(module: nn.Module, config: Mapping[str, Any], wanted: Shapes, sizes: Sizes) -> dict[str, Any] | None:
    """The changed `config` with which the class of `module` has the `wanted` shapes, or None; settings are taken as long as one
    more helps.
    """
    if shapes_of(module, config).keys() != wanted.keys():  # no size takes a tensor away
        return None
    missing, left = _missing(module, config, wanted), list(_settings(config, sizes))[:MOST]
    while missing and left:
        tried = [(_missing(module, changed := _with(config, setting), wanted), setting, changed) for setting in left]
        fewest, setting, changed = min(tried, key=lambda t: t[0])
        if fewest >= missing:
            return None
        missing, config = fewest, changed
        left.remove(setting)
    return None if missing else dict(config)


def _settings(config: Mapping[str, Any], sizes: Sizes) -> Iterator[Setting]:
    """Numbers under one key that equal a size from before; numbers of heads also where they are a multiple of it."""
    known = {before: {after for b, after in sizes if b == before} for before, _ in sizes}
    found: dict[tuple[str, int, int], list[tuple[Any, ...]]] = {}
    for value in _values(config):
        for place in places(config, value, ()):
            key = str(place[-1])
            news = set(known.get(value, ()))
            if "head" in key and "dim" not in key:
                news |= {
                    value * after // before for before, after in sizes if value % before == 0 and value * after % before == 0
                }
            for new in news:
                found.setdefault((key, value, new), []).append(place)
    for (_, _, new), spots in found.items():
        yield tuple(spots), new
        if len(spots) > 1:  # towers of one model may be cut differently
            yield from (((spot,), new) for spot in spots)
    for key, value in config.items():
        if value is None:  # a size that the class would work out
            yield from ((((key,),), after) for after in sorted({after for _, after in sizes}, reverse=True)[:3])


def _values(tree: Any) -> set[int]:
    items = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list) else ()
    own = {v for v in items if type(v) is int and v > 1}
    return own.union(*(_values(v) for v in items)) if items else own


def _with(config: Mapping[str, Any], setting: Setting) -> dict[str, Any]:
    changed = copy.deepcopy(dict(config))
    for place in setting[0]:
        set_(changed, place, setting[1])
    return changed


def _missing(module: nn.Module, config: Mapping[str, Any], wanted: Shapes) -> int:
    """How many tensors the class would have of another shape."""
    shapes = shapes_of(module, config)
    return sum(shapes.get(name) != shape for name, shape in wanted.items()) if shapes else len(wanted) + 1


__all__ = ["narrowed"]
