"""Which groups can really be cut, and which numbers of which modules change with them: found out by trying.

A forward reads sizes from its modules (``num_heads``, ``config.intermediate_size``). Which of them, no name tells for sure. One
unit is cut from a copy of the block; of the numbers that equal a size that changed, the fewest are adapted with which the copy
computes what the uncut block computes without the unit.
"""

from __future__ import annotations

import copy
import itertools
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from layerwise import trees
from layerwise.coupling.groups import Group
from layerwise.coupling.likeness import likeness
from layerwise.coupling.numbers import COUNTED, HEADS, Number, candidates, counts, kept, put_back_, rescale_
from layerwise.coupling.slicing import cut_, cuts_of, silenced
from layerwise.data import Batch
from layerwise.errors import LayerwiseError
from layerwise.tensors import unbounded_alike
from layerwise.trace import evaluating, run, unfused

BOUND = 1e-5
STEPS = (8, 4)  # units that some kernels want at a time: 16 bytes of 16 bits or of 32 each
FAILS = "the forward fails"
ANOTHER = "what it gives beside its output has another shape"
MOST, PATIENCE = 200, 30.0  # sets of numbers tried for one group, and seconds
FEW = 8  # sets for groups that were refused before


@dataclass(frozen=True)
class Tested:
    """A group that can be cut, with the numbers that then shrink by the same share.

    `step` units go at a time (some kernels want whole eights or fours), `least` stay (a router chooses so many), and of each of
    the equal `parts` that they lie in as many go (a router chooses among parts first).
    """

    group: Group
    numbers: tuple[Number, ...] = ()
    step: int = 1
    least: int = 1
    parts: int = 1

    @property
    def example(self) -> tuple[Group, list[int]]:
        """A quarter of the units, from the middle: code that halves what it is given takes one less without a word."""
        steps = min(max(self.group.units // 4 // self.step, 1), (self.group.units - max(self.least, self.step)) // self.step)
        return self.group, _middle(self.group, steps * self.step // self.parts, self.parts)


def tested(
    module: nn.Module, batch: Batch, groups: Sequence[Group], blocks: Mapping[str, nn.Module]
) -> tuple[list[Tested], dict[str, str]]:
    """The groups that can be cut, and the others' names with the reason."""
    if not groups:
        return [], {}
    whole = _Trial.of_model(module, batch)
    simple = [Tested(g) for g in groups if g.kind not in COUNTED]
    if len(simple) == len(groups) and not whole.failure([t.example for t in simple]):
        return simple, {}
    found: list[Tested] = []
    refused: dict[str, str] = {}
    inside = {g.name: _home(g, blocks) for g in groups}
    calls = _first_calls(module, batch, {name: blocks[name] for name in set(inside.values()) if name})
    known: dict[str, _Finding] = {}
    for group in groups:
        home = inside[group.name]
        if home not in calls:
            continue
        key = likeness(blocks[home], home, group)
        if key not in known:
            known[key] = _search(_Trial.of_call(blocks[home], home, calls[home]), group)
            if known[key].reason == ANOTHER:  # and nobody may mind
                known[key] = _search(whole, group).below(home)
        finding = known[key].inside(home)
        if finding.reason:
            refused[group.name] = finding.reason
        else:
            found.append(Tested(group, finding.numbers, finding.step, finding.least, finding.parts))
    found += _across(whole, [g for g in groups if inside[g.name] not in calls], refused)
    found += _joined(whole, groups, refused)
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


def _joined(whole: _Trial, groups: Sequence[Group], refused: dict[str, str]) -> list[Tested]:
    """Heads that cannot be cut in one block alone, and are alike in several: as one group, where the model runs so.

    What the first block makes for its heads may be handed to the next ones, such as zeros in the place of a table of positions.
    """
    alike: dict[str, list[Group]] = {}
    for group in groups:
        if group.name in refused and group.kind in HEADS:
            places = [(p.name, p.dim, p.size, p.indices.shape) for p in group.places]
            key = re.sub(r"\.\d+\.", ".#.", repr((group.kind, group.units, places)))
            alike.setdefault(key, []).append(group)
    found = []
    for parts in alike.values():
        blocks = tuple(dict.fromkeys(b for g in parts for b in g.blocks))
        group = replace(parts[0], blocks=blocks, places=tuple(p for g in parts for p in g.places))
        finding = _searched(whole, group, _middle(group), FEW) if len(parts) > 1 else _Finding(reason="alone")
        if not finding.reason:
            found.append(Tested(group, finding.numbers, finding.step))
            for g in parts:
                del refused[g.name]
    return found


def _middle(group: Group, step: int = 1, parts: int = 1) -> list[int]:
    """So many of each part; those that matter most, where that is known."""
    if group.order:
        width = group.units // parts
        return sorted(u for part in range(parts) for u in [u for u in group.order if u // width == part][:step])
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
            return f"{FAILS}: {words[0][:160]}"
        if len(found) != len(wanted) or not wanted or found[0].shape != wanted[0].shape:
            return "the output has another shape"
        pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if a.shape == b.shape]
        if not all(near(a, b) for a, b in pairs):
            return "the output differs"
        return "" if len(pairs) == len(wanted) else ANOTHER

    def failure(self, chosen: Sequence[tuple[Group, Sequence[int]]], found: Sequence[Tested] = ()) -> str:
        """Why cutting these units, and changing the numbers that were `found` for each of their groups, does not do."""
        try:
            changed = self.copy(chosen)
            for t, (group, units) in zip(found, chosen, strict=False):
                for number in t.numbers:
                    rescale_(changed, number, group.units - len(units), group.units)
            return self.differs(changed, self.wanted(chosen))
        except LayerwiseError as error:
            return error.what


def near(a: Tensor, b: Tensor) -> bool:
    """Whether the largest difference is within the bound of the largest value."""
    if not a.numel():
        return True
    a, b = unbounded_alike(a, b)
    largest = float(b.abs().max())
    return bool(float((a - b).abs().max()) <= BOUND * (largest or 1.0))


class _Finding(NamedTuple):
    """The numbers to adapt, how many units go at a time, how many must stay, and in how many parts they lie; or the reason why it
    cannot be done.
    """

    numbers: tuple[Number, ...] = ()
    step: int = 1
    least: int = 1
    parts: int = 1
    reason: str = ""

    def inside(self, home: str) -> _Finding:
        """With the names that the modules have in the whole model."""
        return self._replace(numbers=tuple(Number(f"{home}.{n.module}".strip("."), n.path) for n in self.numbers))

    def below(self, home: str) -> _Finding:
        """With the names that the modules have in the block."""
        return self._replace(numbers=tuple(Number(n.module.removeprefix(home).strip("."), n.path) for n in self.numbers))


def _search(trial: _Trial, group: Group) -> _Finding:
    """By single units, or else by as many as a kernel takes; experts also by one of each part."""
    finding = _searched(trial, group, _middle(group))
    if group.kind == "expert":
        return _bounded(trial, group, finding)
    steps = [s for s in STEPS if group.kind not in COUNTED and group.units >= 2 * s and group.units % s == 0]
    again = (_searched(trial, group, _middle(group, step)) for step in steps if finding.reason)
    return next((found for found in again if not found.reason), finding)


def _bounded(trial: _Trial, group: Group, finding: _Finding) -> _Finding:
    """With the number of parts that routing is limited to, and the fewest experts with which the module runs, by bisection."""
    parts = 1
    for parts in (p for p in range(1, group.units // 2 + 1) if group.units % p == 0):
        again = finding if parts == 1 else _searched(trial, group, _middle(group, 1, parts))
        if not again.reason:
            break
    else:
        return finding
    low, high = 1, group.units // parts - 1
    while low < high:
        left = (low + high) // 2
        gone = _middle(group, group.units // parts - left, parts)
        low, high = (left + 1, high) if _fails(trial, group, gone, again.numbers) else (low, left)
    return again._replace(step=parts, least=low * parts, parts=parts)


def _fails(trial: _Trial, group: Group, gone: Sequence[int], numbers: Sequence[Number]) -> bool:
    chosen = [(group, gone)]
    try:
        changed, wanted = trial.copy(chosen), trial.wanted(chosen)
    except Exception:  # the uncut module, too, may stumble where its routers may choose too few
        return True
    return bool(_differs_with(trial, changed, wanted, numbers, (group.units - len(gone), group.units)))


def _searched(trial: _Trial, group: Group, units: Sequence[int], most: int = MOST) -> _Finding:
    chosen = [(group, units)]
    try:
        changed, wanted = trial.copy(chosen), trial.wanted(chosen)
    except LayerwiseError as error:
        return _Finding(reason=error.what)
    step, share = len(units), (group.units - len(units), group.units)
    reason = trial.differs(changed, wanted)
    if not reason:
        return _Finding(_completed(trial, changed, wanted, (), (group, share)), step)
    started = time.monotonic()
    for subset in itertools.islice(_subsets(candidates(changed, trial.own(group))), most):
        if time.monotonic() - started > PATIENCE:
            break
        numbers = tuple(n for entry in subset for n in entry)
        said = _differs_with(trial, changed, wanted, numbers, share)
        if not said:
            return _Finding(_completed(trial, changed, wanted, numbers, (group, share)), step)
        reason = ANOTHER if said == ANOTHER else reason
    return _Finding(reason=reason)


def _completed(
    trial: _Trial,
    changed: nn.Module,
    wanted: Sequence[Tensor],
    numbers: tuple[Number, ...],
    cut: tuple[Group, tuple[int, int]],
) -> tuple[Number, ...]:
    """With the counts of heads or experts that this forward did not need, if it does not mind."""
    group, share = cut
    if group.kind not in COUNTED:
        return numbers
    for entry in candidates(changed, trial.own(group)):
        more = tuple(n for n in entry if n not in numbers and counts(n, group.kind))
        if more and not _differs_with(trial, changed, wanted, numbers + more, share):
            numbers += more
    return numbers


def _differs_with(
    trial: _Trial, changed: nn.Module, wanted: Sequence[Tensor], numbers: Sequence[Number], share: tuple[int, int]
) -> str:
    with ExitStack() as stack:
        for number in numbers:
            stack.callback(put_back_, changed, number, kept(changed, number))
            rescale_(changed, number, *share)
        return trial.differs(changed, wanted)


def _subsets(entries: Sequence[tuple[Number, ...]]) -> Iterator[tuple[tuple[Number, ...], ...]]:
    for size in range(1, len(entries) + 1):
        yield from itertools.combinations(entries, size)


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


__all__ = ["Tested", "near", "tested"]
