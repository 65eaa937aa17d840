"""Named tensors into a module, with every difference named before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn.parameter import is_lazy

from layerwise.errors import ModelFormatError, UsageError
from layerwise.weights.problems import SHOWN, bad, listed, short

_WRAPPERS = ("module.", "_orig_mod.")  # DataParallel, torch.compile
_COUNTER = "num_batches_tracked"  # of batch norm, absent from files before torch 0.4.1


def load_into(
    module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], *, strict: bool = True, source: str = ""
) -> list[str]:
    """Copy `tensors` into the parameters and buffers of `module`, in place; returns notes in words on what was adapted.

    A wrapper's prefix is stripped, and a tied tensor may be given under any of its names and stays tied. With `strict`,
    missing and unexpected names raise `ModelFormatError` (LW-M55, LW-M56); without, they become notes. Wrong shapes (LW-M57)
    and two different values for one tied tensor (LW-M59) always raise. The module is then as it was. `source` names the file.
    """
    own = {name: value for name, value in module.state_dict(keep_vars=True).items() if isinstance(value, torch.Tensor)}
    if any(value.device.type == "meta" for value in own.values()):
        raise UsageError(
            "The module has no memory for weights (device meta).", remedy="Call module.to_empty(device='cpu') first."
        )
    notes: list[str] = []
    given = _unwrapped(dict(tensors), own, notes)
    given = _filled(given, own, notes)
    _check(given, own, notes, strict, source)
    fitting = {name: _dense(given[name]) for name in own if name in given}
    _check_ties(fitting, own, source)
    casts = [name for name, value in fitting.items() if value.dtype != own[name].dtype and not is_lazy(own[name])]
    if casts:
        first = casts[0]
        notes.append(f"converted {len(casts):,} tensors, {first!r} from {fitting[first].dtype} to {own[first].dtype}")
    module.load_state_dict(fitting, strict=False)
    return notes


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.layout is torch.strided else tensor.to_dense()  # its shape is the module's: no bomb


def _unwrapped(given: dict[str, torch.Tensor], own: Mapping[str, torch.Tensor], notes: list[str]) -> dict[str, torch.Tensor]:
    prefix = next((p for p in _WRAPPERS if given and all(name.startswith(p) for name in given)), None)
    if prefix is None or any(name.startswith(prefix) for name in own):
        return given
    notes.append(f"stripped the prefix {prefix!r} from {len(given):,} names")
    return _unwrapped({name.removeprefix(prefix): value for name, value in given.items()}, own, notes)


def _ties(own: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """The names of each tensor of the module that has several."""
    groups: dict[int, list[str]] = {}
    for name, value in own.items():
        groups.setdefault(id(value), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _filled(given: dict[str, torch.Tensor], own: Mapping[str, torch.Tensor], notes: list[str]) -> dict[str, torch.Tensor]:
    """`given`, with every name of a tied tensor that the module has and the file leaves out."""
    filled = dict(given)
    for names in _ties(own):
        present = [name for name in names if name in given]
        absent = [name for name in names if name not in given]
        if present:
            filled |= dict.fromkeys(absent, given[present[0]])
            notes.append(f"kept {listed(names)} tied" + (f" (the file has only {listed(present)})" if absent else ""))
    return filled


def _check_ties(fitting: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], source: str) -> None:
    for first, *others in _ties(own):
        for name in others:
            one, other = fitting.get(first), fitting.get(name)
            if one is None or other is None or one is other:
                continue
            if not torch.equal(one.to(own[name].dtype), other.to(own[name].dtype)):
                what = f"The module ties {listed([first, name])}, but they are given different values."
                raise bad(59, source, what, "Load them into a module that does not tie them, or leave one of the two out.")


def _check(
    given: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], notes: list[str], strict: bool, source: str
) -> None:
    missing = [name for name in own if name not in given]
    counters = [name for name in missing if name.rpartition(".")[2] == _COUNTER]
    if counters:
        notes.append(f"left {len(counters):,} counters {_COUNTER!r} as they are: the file has none")
    missing = [name for name in missing if name not in counters]
    unexpected = [name for name in given if name not in own]
    wrong = [
        f"{short(name)!r} is {tuple(given[name].shape)}, the module has {tuple(own[name].shape)}"
        for name in own
        if name in given and not is_lazy(own[name]) and given[name].shape != own[name].shape
    ]
    problems = {
        55: f"missing {len(missing):,} tensors: {listed(missing)}" if missing else "",
        56: f"{len(unexpected):,} unexpected tensors: {listed(unexpected)}" if unexpected else "",
        57: _shapes(wrong),
    }
    if strict and any(problems.values()):
        raise _mismatch(problems, source)
    if wrong:
        raise _mismatch({57: problems[57]}, source)
    notes += [text for text in problems.values() if text]


def _shapes(wrong: list[str]) -> str:
    if not wrong:
        return ""
    more = f" and {len(wrong) - SHOWN:,} more" if len(wrong) > SHOWN else ""
    return f"{len(wrong):,} wrong shapes: {'; '.join(wrong[:SHOWN])}{more}"


def _mismatch(problems: Mapping[int, str], source: str) -> ModelFormatError:
    """One error for all differences; its code is that of the first kind."""
    case = next(case for case, text in problems.items() if text)
    what = f"The weights do not fit the module: {'. '.join(text for text in problems.values() if text)}."
    return bad(case, source, what, "Build the module with the settings these weights were trained with, or load others.")
