"""Finding and replacing tensors in what modules take and return: nested tuples, lists, dicts and Hugging Face outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

Path = tuple[Any, ...]


def tensors(tree: Any, path: Path = ()) -> Iterator[tuple[Path, torch.Tensor]]:
    """Every tensor in `tree` with the keys that lead to it, in order."""
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from tensors(value, (*path, key))
    elif isinstance(tree, tuple | list):
        for position, value in enumerate(tree):
            yield from tensors(value, (*path, position))


def get(tree: Any, path: Path) -> Any:
    """The part of `tree` that `path` leads to."""
    for key in path:
        tree = tree[key]
    return tree


def replaced(tree: Any, path: Path, value: Any) -> Any:
    """A copy of `tree` with the part at `path` exchanged; the containers on the way are copied, the rest is shared."""
    if not path:
        return value
    key, rest = path[0], path[1:]
    inner = replaced(tree[key], rest, value)
    if isinstance(tree, tuple):
        items = (*tree[:key], inner, *tree[key + 1 :])
        return type(tree)(*items) if hasattr(tree, "_fields") else items  # a named tuple takes its fields one by one
    new = copy.copy(tree)
    new[key] = inner
    return new


def mapped(tree: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A copy of `tree` with `function` applied to each tensor."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        new = copy.copy(tree)
        for key, value in tree.items():
            new[key] = mapped(value, function)  # type: ignore[index]  # every mapping that modules return is mutable
        return new
    if isinstance(tree, tuple | list):
        items = [mapped(value, function) for value in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree
