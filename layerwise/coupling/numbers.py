"""Whole numbers that modules keep, such as ``num_heads`` and ``config.num_heads``: which may change, and how."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from layerwise.coupling.groups import MODULES, Group

HEADS = ("head", "kv_group")
COUNTED = (*HEADS, "expert")  # kinds whose number the modules keep
STANDARD = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


class Number(NamedTuple):
    """A whole number that a module, or an object it holds, keeps: ``path`` is ``num_heads`` or ``config.num_heads``."""

    module: str
    path: str


def candidates(module: nn.Module, group: Group) -> list[tuple[Number, ...]]:
    """Numbers that equal a size which changed, likely ones first. Those of one name and value change together, but for those of
    modules that hold a cut weight themselves.
    """
    owners = {p.name if p.dim == MODULES else p.name.rpartition(".")[0] for p in group.places}
    around = _around(module, owners, [b for b in group.blocks if f"{b}." in "".join(f"{o}." for o in owners)])
    sizes = {p.size for p in group.places}
    parts = {p.size // n for p in group.places for n in (2, 3) if p.size % n == 0 and p.indices.shape[1] > 1}
    heads = {group.units * n for n in range(1, 65) if group.kind in COUNTED and any(s % (group.units * n) == 0 for s in sizes)}
    found: dict[tuple[Any, ...], list[Number]] = {}
    for name, part in module.named_modules():
        if isinstance(part, STANDARD) or name not in around:
            continue
        for path, value in numbers_of(part):
            known = value == group.units or value in sizes | parts or ("head" in path and value in heads)
            if value > 1 and known and value * (group.units - 1) % group.units == 0:
                key = (path, value, name if name in owners else "")
                found.setdefault(key, []).append(Number(name, path))
    likely = sorted(found, key=lambda k: (not k[2], "head" not in k[0] and "expert" not in k[0], "." in k[0], k[1] not in sizes))
    return [tuple(found[key]) for key in likely]


def _around(module: nn.Module, owners: Iterable[str], blocks: Sequence[str]) -> set[str]:
    """The modules in `blocks` that hold the owners of the cut weights, and helpers without weights in them."""
    found = {""}
    for owner in owners:
        parts = owner.split(".")
        found |= {".".join(parts[:i]) for i in range(1, len(parts) + 1)}
    near = {owner.rpartition(".")[0] for owner in owners}
    for name, part in module.named_modules():
        if name.rpartition(".")[0] in near and not any(True for _ in part.parameters()):
            found.add(name)
    if blocks:
        found = {name for name in found if any(f"{name}.".startswith(f"{b}.") for b in blocks)}
    return found


def numbers_of(part: nn.Module) -> Iterator[tuple[str, int]]:
    """Every whole number that the module keeps, itself or in a plain object."""
    for key, value in vars(part).items():
        if _whole(value):
            yield key, value
        elif (
            not key.startswith("_")
            and hasattr(value, "__dict__")
            and not isinstance(value, nn.Module | Tensor | type)
            and not callable(value)
        ):
            yield from ((f"{key}.{k}", v) for k, v in vars(value).items() if _whole(v) and _given(value, k))


def _given(value: Any, key: str) -> bool:
    """Whether code can read it: a configuration whose layers differ in a number refuses to give one for all."""
    try:
        getattr(value, key)
    except Exception:  # whatever a class of somebody else raises
        return False
    return True


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def get(module: nn.Module, number: Number) -> int:
    """Its value now."""
    holder: Any = module.get_submodule(number.module)
    for key in number.path.split("."):
        holder = getattr(holder, key)
    return holder


def rescale_(module: nn.Module, number: Number, kept: int, total: int) -> None:
    """The number times kept/total. An object that others may share is copied for this module first."""
    set_(module, number, get(module, number) * kept // total)


def set_(module: nn.Module, number: Number, value: int) -> None:
    """An object that other modules may share is copied for this module."""
    part = module.get_submodule(number.module)
    first, _, rest = number.path.partition(".")
    if rest:
        own = copy.copy(getattr(part, first))
        setattr(own, rest, value)
        setattr(part, first, own)
    else:
        setattr(part, first, value)


def kept(module: nn.Module, number: Number) -> Any:
    """The attribute of the module that holds the number, to be put back by `put_back_`."""
    return getattr(module.get_submodule(number.module), number.path.partition(".")[0])


def put_back_(module: nn.Module, number: Number, value: Any) -> None:
    """The inverse of `rescale_`, with what `kept` gave before."""
    setattr(module.get_submodule(number.module), number.path.partition(".")[0], value)


def counts(number: Number, kind: str) -> bool:
    """By its name: one that says how many heads or experts there are, and not how large they are or how many are used."""
    if kind == "expert":
        return "expert" in number.path and "_per_" not in number.path
    return "." not in number.path and "head" in number.path and not re.search("dim|size|head$", number.path)


__all__ = ["COUNTED", "HEADS", "Number", "candidates", "counts", "get", "kept", "numbers_of", "put_back_", "rescale_", "set_"]
