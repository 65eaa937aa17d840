"""Which groups can really be cut, and which numbers of which modules change with them: found out by trying.

A forward reads sizes from its modules (``num_heads``, ``config.intermediate_size``). Which of them, no name tells for sure. One
unit is cut from a copy of the block; of the numbers that equal a size that changed, the fewest are adapted with which the copy
computes what the uncut block computes without the unit.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from layerwise import trees
from layerwise.coupling.groups import Group, live
from layerwise.coupling.slicing import Cut, cut_, cuts_of, silenced
from layerwise.data import Batch
from layerwise.errors import LayerwiseError
from layerwise.trace import evaluating, run, unfused

BOUND = 1e-5
EIGHT = 8  # rows of 16 bits each that some kernels read at once
ANOTHER = "what it gives beside its output has another shape"
MOST, PATIENCE = 200, 30.0  # sets of numbers tried for one group, and seconds
COUNTED = ("head", "kv_group")  # kinds whose number the modules keep
STANDARD = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


class Number(NamedTuple):
    """A whole number that a module, or an object it holds, keeps: ``path`` is ``num_heads`` or ``config.num_heads``."""

    module: str
    path: str


@dataclass(frozen=True)
class Tested:
    """A group that can be cut, with the numbers that then shrink by the same share, and how many units go at a time: some kernels
    want whole eights.
    """

    group: Group
    numbers: tuple[Number, ...] = ()
    step: int = 1

    @property
    def example(self) -> tuple[Group, list[int]]:
        """As few units as can be cut, from the middle."""
        return self.group, _middle(self.group, self.step)


def tested(
    module: nn.Module, batch: Batch, groups: Sequence[Group], blocks: Mapping[str, nn.Module]
) -> tuple[list[Tested], dict[str, str]]:
    """The groups that can be cut, and the others' names with the reason."""
    if not groups:
        return [], {}
    whole = _Trial.of_model(module, batch)
    if not any(g.kind in COUNTED for g in groups) and not whole.failure([(g, _middle(g)) for g in groups]):
        return [Tested(g) for g in groups], {}
    found: list[Tested] = []
    refused: dict[str, str] = {}
    inside = {g.name: _home(g, blocks) for g in groups}
    calls = _first_calls(module, batch, {name: blocks[name] for name in set(inside.values()) if name})
    known: dict[str, _Finding] = {}
    for group in groups:
        home = inside[group.name]
        if home not in calls:
            continue
        key = _likeness(blocks[home], home, group)
        if key not in known:
            known[key] = _search(_Trial.of_call(blocks[home], home, calls[home]), group)
            if known[key].reason == ANOTHER:  # and nobody may mind
                known[key] = _search(whole, group).below(home)
        finding = known[key].inside(home)
        if finding.reason:
            refused[group.name] = finding.reason
        else:
            found.append(Tested(group, finding.numbers, finding.step))
    found += _across(whole, [g for g in groups if inside[g.name] not in calls], refused)
    order = {g.name: i for i, g in enumerate(groups)}
    return _agreeing(whole, sorted(found, key=lambda t: order[t.group.name]), refused), refused


def _agreeing(whole: _Trial, found: Sequence[Tested], refused: dict[str, str]) -> list[Tested]:
    """Those with which the whole model runs, cut all at once; halves are tried where it does not."""
    reason: str = whole.failure([t.example for t in found], found) if found else ""
    if not reason:
        return list(found)
    if len(found) == 1:
        refused[found[0].group.name] = reason
        return []
    half = len(found) // 2
    first, second = (_agreeing(whole, part, refused) for part in (found[:half], found[half:]))
    reason = whole.failure([t.example for t in (*first, *second)], [*first, *second])
    if not reason:
        return [*first, *second]
    refused |= {t.group.name: f"not together with the others: {reason}" for t in second}
    return first


def _across(whole: _Trial, groups: Sequence[Group], refused: dict[str, str]) -> list[Tested]:
    """Groups that reach beyond one block: all at once, or else the halves of those that fail together."""
    if not groups:
        return []
    reason = whole.failure([(g, _middle(g)) for g in groups])
    if not reason:
        return [Tested(g) for g in groups]
    if len(groups) == 1:
        finding = _search(whole, groups[0])
        if finding.reason:
            refused[groups[0].name] = finding.reason
            return []
        return [Tested(groups[0], finding.numbers, finding.step)]
    half = len(groups) // 2
    return _across(whole, groups[:half], refused) + _across(whole, groups[half:], refused)


def _middle(group: Group, step: int = 1) -> list[int]:
    return list(range(group.units // 2, group.units // 2 + step))


def _home(group: Group, blocks: Mapping[str, nn.Module]) -> str:
    """The block that holds all of the group; '' where there is none."""
    inside = [b for b in blocks if all(p.name.startswith(f"{b}.") for p in group.places)]
    return max(inside, key=len, default="")


@dataclass
class _Trial:
    """A module that can be run again: the whole model, or a block with what it was given first."""

    module: nn.Module
    prefix: str
    call: Callable[[nn.Module], Any]

    @classmethod
    def of_model(cls, module: nn.Module, batch: Batch) -> _Trial:
        return cls(module, "", lambda m: run(m, batch))

    @classmethod
    def of_call(cls, module: nn.Module, name: str, given: tuple[Any, Any]) -> _Trial:
        def call(m: nn.Module) -> Any:
            args, kwargs = copy.deepcopy(given)  # a cache would grow
            return m(*args, **kwargs)

        return cls(module, f"{name}.", call)

    def run(self, module: nn.Module) -> list[Tensor]:
        with evaluating(module), torch.no_grad(), unfused():
            return [t for _, t in trees.tensors(self.call(module)) if t.is_floating_point()]

    def own(self, group: Group) -> Group:
        return replace(group, places=tuple(replace(p, name=p.name.removeprefix(self.prefix)) for p in group.places))

    def wanted(self, chosen: Sequence[tuple[Group, Sequence[int]]]) -> list[Tensor]:
        with silenced(self.module, [(self.own(g), units) for g, units in chosen]):
            return [t.clone() for t in self.run(self.module)]

    def copy(self, chosen: Sequence[tuple[Group, Sequence[int]]]) -> nn.Module:
        cuts = [replace(c, name=c.name.removeprefix(self.prefix)) for c in cuts_of(chosen)]
        changed = copy.deepcopy(self.module)
        cut_(changed, cuts)
        return changed

    def differs(self, module: nn.Module, wanted: Sequence[Tensor]) -> str:
        """'' or what is wrong with what `module` gives."""
        try:
            found = self.run(module)
        except Exception as error:  # whatever code raises on sizes that it does not expect
            words = str(error).strip().splitlines() or [""]
            return f"the forward fails: {words[0][:160]}"
        if len(found) != len(wanted) or not wanted or found[0].shape != wanted[0].shape:
            return "the output has another shape"
        pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if a.shape == b.shape]
        if not all(near(a, b) for a, b in pairs):
            return "the output differs"
        return "" if len(pairs) == len(wanted) else ANOTHER

    def failure(self, chosen: Sequence[tuple[Group, Sequence[int]]], found: Sequence[Tested] = ()) -> str:
        """Why cutting these units, and changing the numbers that were `found`, does not do."""
        try:
            changed = self.copy(chosen)
            for t in found:
                for number in t.numbers:
                    rescale_(changed, number, t.group.units - t.step, t.group.units)
            return self.differs(changed, self.wanted(chosen))
        except LayerwiseError as error:
            return error.what


def near(a: Tensor, b: Tensor) -> bool:
    """Whether the largest difference is within the bound of the largest value."""
    if not a.numel():
        return True
    largest = float(b.abs().max())
    return bool(float((a - b).abs().max()) <= BOUND * (largest or 1.0))


class _Finding(NamedTuple):
    """The numbers to adapt and how many units go at a time, or the reason why it cannot be done."""

    numbers: tuple[Number, ...] = ()
    step: int = 1
    reason: str = ""

    def inside(self, home: str) -> _Finding:
        """With the names that the modules have in the whole model."""
        return self._replace(numbers=tuple(Number(f"{home}.{n.module}".strip("."), n.path) for n in self.numbers))

    def below(self, home: str) -> _Finding:
        """With the names that the modules have in the block."""
        return self._replace(numbers=tuple(Number(n.module.removeprefix(home).strip("."), n.path) for n in self.numbers))


def _search(trial: _Trial, group: Group) -> _Finding:
    """By single units, or else by eights."""
    finding = _searched(trial, group, 1)
    if finding.reason and group.kind not in COUNTED and group.units >= 2 * EIGHT and group.units % EIGHT == 0:
        again = _searched(trial, group, EIGHT)
        return finding if again.reason else again
    return finding


def _searched(trial: _Trial, group: Group, step: int) -> _Finding:
    chosen = [(group, _middle(group, step))]
    try:
        changed, wanted = trial.copy(chosen), trial.wanted(chosen)
    except LayerwiseError as error:
        return _Finding(reason=error.what)
    share = (group.units - step, group.units)
    reason = trial.differs(changed, wanted)
    if not reason:
        return _Finding(_completed(trial, changed, wanted, (), group), step)
    started = time.monotonic()
    for subset in itertools.islice(_subsets(_candidates(changed, trial.own(group))), MOST):
        if time.monotonic() - started > PATIENCE:
            break
        numbers = tuple(n for entry in subset for n in entry)
        said = _differs_with(trial, changed, wanted, numbers, share)
        if not said:
            return _Finding(_completed(trial, changed, wanted, numbers, group), step)
        reason = ANOTHER if said == ANOTHER else reason
    return _Finding(reason=reason)


def _completed(
    trial: _Trial, changed: nn.Module, wanted: Sequence[Tensor], numbers: tuple[Number, ...], group: Group
) -> tuple[Number, ...]:
    """With the counts of heads that this forward did not need, if it does not mind."""
    if group.kind not in COUNTED:
        return numbers
    share = (group.units - 1, group.units)
    for entry in _candidates(changed, trial.own(group)):
        more = tuple(n for n in entry if n not in numbers and _counts_heads(n))
        if more and not _differs_with(trial, changed, wanted, numbers + more, share):
            numbers += more
    return numbers


def _counts_heads(number: Number) -> bool:
    """By its name: one that says how many, and not how large."""
    return "." not in number.path and "head" in number.path and not re.search("dim|size|head$", number.path)


def _differs_with(
    trial: _Trial, changed: nn.Module, wanted: Sequence[Tensor], numbers: Sequence[Number], share: tuple[int, int]
) -> str:
    with ExitStack() as stack:
        for number in numbers:
            stack.callback(_put, changed, number, _holder(changed, number), get(changed, number))
            rescale_(changed, number, *share)
        return trial.differs(changed, wanted)


def _subsets(entries: Sequence[tuple[Number, ...]]) -> Iterator[tuple[tuple[Number, ...], ...]]:
    for size in range(1, len(entries) + 1):
        yield from itertools.combinations(entries, size)


def _candidates(module: nn.Module, group: Group) -> list[tuple[Number, ...]]:
    """Numbers that equal a size which changed, likely ones first. Those of one name and value change together, but for those of
    modules that hold a cut weight themselves.
    """
    owners = {p.name.rpartition(".")[0] for p in group.places}
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
    likely = sorted(found, key=lambda k: (not k[2], "head" not in k[0], "." in k[0], k[1] not in sizes))
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
            yield from ((f"{key}.{k}", v) for k, v in vars(value).items() if _whole(v))


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


def _holder(module: nn.Module, number: Number) -> Any:
    return getattr(module.get_submodule(number.module), number.path.partition(".")[0])


def _put(module: nn.Module, number: Number, holder: Any, value: int) -> None:
    setattr(module.get_submodule(number.module), number.path.partition(".")[0], holder)


def _first_calls(module: nn.Module, batch: Batch, blocks: Mapping[str, nn.Module]) -> dict[str, tuple[Any, Any]]:
    """What each block is given in its first call."""
    calls: dict[str, tuple[Any, Any]] = {}

    def hook(name: str) -> Any:
        def keep(part: nn.Module, args: Any, kwargs: Any) -> None:
            if name not in calls:
                calls[name] = copy.deepcopy((args, kwargs))

        return keep

    with ExitStack() as stack:
        stack.enter_context(evaluating(module))
        stack.enter_context(torch.no_grad())
        stack.enter_context(unfused())
        for name, part in blocks.items():
            stack.callback(part.register_forward_pre_hook(hook(name), with_kwargs=True).remove)
        run(module, batch)
    return calls


def _likeness(block: nn.Module, name: str, group: Group) -> str:
    """Equal for groups that are alike in blocks that are alike: what was found for one holds for all."""
    places = [
        (p.name.removeprefix(f"{name}."), p.dim, p.size, p.indices.tolist() if group.units < 64 else p.indices.shape)
        for p in group.places
    ]
    return structure(block) + hashlib.sha256(repr(places).encode()).hexdigest()


def structure(module: nn.Module, *, skip: Iterable[str] = ("layer_idx", "layer_id", "layer_index", "idx")) -> str:
    """A digest of classes, shapes, plain settings and what the forwards do, without the weights."""
    left = frozenset(skip)
    digest = hashlib.sha256()
    for name, tensor in live(module).items():
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
    seen: dict[int, str] = {}
    for name, part in module.named_modules():
        plain = {
            k: v for k, v in vars(part).items() if k not in left and isinstance(v, int | float | str | tuple) and k != "training"
        }
        digest.update(f"{name}{type(part).__module__}{type(part).__qualname__}{sorted(plain.items(), key=str)}".encode())
        code = getattr(type(part).forward, "__code__", None)  # a class may be written anew under its name
        digest.update(f"{code.co_code!r}{code.co_names}".encode() if code else b"")
        for key, value in vars(part).items():
            if (
                not key.startswith("_")
                and hasattr(value, "__dict__")
                and not isinstance(value, nn.Module | Tensor | type)
                and not callable(value)
            ):
                if id(value) not in seen:
                    seen[id(value)] = str(
                        sorted(((k, v) for k, v in vars(value).items() if isinstance(v, int | float | str)), key=str)
                    )
                digest.update(seen[id(value)].encode())
    return digest.hexdigest()


__all__ = ["Cut", "Number", "Tested", "get", "near", "set_", "structure", "tested"]
