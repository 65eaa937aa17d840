"""The configuration of a transformers model without its dropped layers.

Decision: no names of models. A chain is a module list that holds `PassThrough`; its count in the configuration is found by value
and trial: a whole number equal to the chain's length, the list of the per-layer settings cut likewise, such that the class built
on the meta device has exactly the tensors of the layers that are left, renumbered. `layerwise.configuring` goes on from there.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.adapter import library_of
from layerwise.passing import PassThrough
from layerwise.tensors import state, wraps

Kept = Mapping[str, Sequence[int]]  # module list → the old numbers of the layers that are left
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Compact:
    """The whole configuration without the dropped layers, and the old number of each that is left."""

    config: Mapping[str, Any]
    kept: Kept


def chains(module: nn.Module) -> dict[str, list[int]]:
    """Each module list with a gap → the numbers of the layers that are left."""
    lists = {n: m for n, m in module.named_modules(remove_duplicate=False) if isinstance(m, nn.ModuleList)}
    kept = {n: [i for i, layer in enumerate(m) if not isinstance(layer, PassThrough)] for n, m in lists.items()}
    return {n: numbers for n, numbers in kept.items() if len(numbers) < len(lists[n])}


def compacted(module: nn.Module) -> Compact | str:
    """How the class builds the model without its gaps, or in words why it cannot."""
    found = chains(module)
    gaps = sum(isinstance(m, PassThrough) for m in module.modules())
    if "transformers" not in library_of(module):
        return "the class is none of transformers and has no configuration that says its sizes"
    if sum(_length(module, n) - len(numbers) for n, numbers in found.items()) < gaps:
        return "a dropped layer stands in no module list"
    if any(wraps(p) for p in module.parameters()):
        return "its weights are quantized"
    config = json.loads(module.config.to_json_string(use_diff=False))  # type: ignore[operator,union-attr]
    shapes = shapes_of(module, config)
    for name, numbers in found.items():
        shapes = {new: shapes[old] for old, new in renumbered(shapes, {name: numbers}).items()}
        changed = _fitting(module, config, _length(module, name), numbers, shapes)
        if changed is None:
            return f"no setting of the configuration was found that takes layers out of {name}"
        config = changed
    return Compact(config, found)


def _length(module: nn.Module, chain: str) -> int:
    found: Any = module.get_submodule(chain)
    return len(found)


def _fitting(
    module: nn.Module, config: Mapping[str, Any], length: int, kept: Sequence[int], wanted: Shapes
) -> dict[str, Any] | None:
    """The first changed configuration whose class has the `wanted` tensors."""
    for place in _counts(config, length):
        for cut in (_by_layer, _any_list, _nothing):
            changed = copy.deepcopy(dict(config))
            set_(changed, place, len(kept))
            _cut_lists_(changed, length, kept, cut)
            if shapes_of(module, changed) == wanted:
                return changed
    return None


def _counts(tree: Any, value: int, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in the configuration this whole number stands; settings that speak of layers first."""
    found = list(places(tree, value, path))
    yield from sorted(found, key=lambda p: "layer" not in "".join(map(str, p)))


def places(tree: Any, value: int, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    for key, inner in items:
        if type(inner) is int and inner == value:
            yield (*path, key)
        yield from places(inner, value, (*path, key))


def set_(tree: Any, place: tuple[Any, ...], value: int) -> None:
    for key in place[:-1]:
        tree = tree[key]
    tree[place[-1]] = value


def _by_layer(key: str) -> bool:
    return "layer" in key


def _any_list(key: str) -> bool:
    return True


def _nothing(key: str) -> bool:
    return False


def _cut_lists_(tree: Any, length: int, kept: Sequence[int], chosen: Any) -> None:
    """One setting per layer: those of the layers that are left. Numbers of layers: their new ones."""
    for key, value in list(tree.items()):
        if isinstance(value, Mapping):
            _cut_lists_(value, length, kept, chosen)
        elif isinstance(value, list) and chosen(key):
            if len(value) == length:
                tree[key] = [value[i] for i in kept]
            elif value and all(type(v) is int and 0 <= v < length for v in value) and len(set(value)) == len(value):
                tree[key] = [kept.index(v) for v in value if v in kept]


def shapes_of(module: nn.Module, config: Mapping[str, Any]) -> Shapes:
    """Name → shape of every tensor of the class under `config`; none where it builds no model."""
    try:
        with quiet(), torch.device("meta"):
            built = type(module)(type(module.config).from_dict(copy.deepcopy(dict(config))))  # type: ignore[union-attr]
    except Exception:  # a configuration that contradicts itself can fail anywhere in the library
        return {}
    return {name: tuple(t.shape) for name, t in state(built).items()}


def renumbered(names: Mapping[str, Any], kept: Kept) -> dict[str, str]:
    """Name → name without the gaps, for the tensors that are left."""
    return {name: new for name in names if (new := _moved(name, {n: {i: j for j, i in enumerate(k)} for n, k in kept.items()}))}


def _moved(name: str, numbers: Mapping[str, Mapping[int, int]]) -> str:
    """The name with each number in a chain exchanged; '' for one whose layer is gone."""
    for chain, new in numbers.items():
        if name.startswith(f"{chain}."):
            number, dot, rest = name.removeprefix(f"{chain}.").partition(".")
            if int(number) not in new:
                return ""
            name = f"{chain}.{new[int(number)]}{dot}{rest}"
    return name


def original_names(tensors: Mapping[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    """The tensors of a compacted file under the names that they have in the model with the gaps."""
    numbers = {n: dict(enumerate(k)) for n, k in kept.items()}
    return {_moved(name, numbers): tensor for name, tensor in tensors.items()}


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers neither logs nor draws bars: what matters is compared."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


__all__ = ["Compact", "chains", "compacted", "original_names", "places", "quiet", "renumbered", "set_", "shapes_of"]
