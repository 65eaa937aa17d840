"""What a pickle would do, without doing it: which names it imports, which strings it holds, which storages it claims.

Only the opcodes are walked, with inert values on the stack; nothing is imported, called or allocated on the pickle's word.
"""

from __future__ import annotations

import io
import pickletools
import warnings
from dataclasses import dataclass, field
from typing import Any

MAX_LEAVES, MAX_DEPTH = 1_000_000, 100
_MARK, _UNKNOWN = object(), object()


@dataclass(frozen=True)
class Imported:
    """A name that the pickle imports, such as ``torch.FloatStorage``."""

    name: str


@dataclass(frozen=True)
class _Nested:
    """A tuple that holds tuples, by its size alone: written out or hashed, a shared one may have 2**60 leaves."""

    leaves: int
    depth: int


@dataclass
class Scan:
    """`imports` and `strings` in the order met; `persistent` the persistent ids, as tuples where they are plain."""

    imports: dict[str, None] = field(default_factory=dict)
    strings: set[str] = field(default_factory=set)
    persistent: list[Any] = field(default_factory=list)


def scan_pickles(data: bytes, most: int = 1) -> Scan:
    """Walk up to `most` pickles that follow each other in `data`. Raises `ValueError` where they are damaged or cut off."""
    scan, file = Scan(), io.BytesIO(data)
    for number in range(most):
        if number and file.tell() >= len(data):
            break
        _Walk(scan).run(file)
    return scan


class _Walk:
    def __init__(self, scan: Scan) -> None:
        self.scan = scan
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: io.BytesIO) -> None:
        try:
            # pickletools warns of odd escapes in the strings of a damaged file
            with warnings.catch_warnings(action="ignore"):
                self.walk(file)
        except (IndexError, KeyError, UnicodeError, OverflowError) as error:
            raise ValueError(f"broken pickle: {error!r}") from error

    def walk(self, file: io.BytesIO) -> None:
        for opcode, argument, _ in pickletools.genops(file):
            self.step(opcode, argument)

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        name = opcode.name
        if name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name == "MARK":
            self.stack.append(_MARK)
        elif name == "DUP":
            self.stack.append(self.stack[-1])
        else:
            popped = self.pop(opcode)
            self.stack += self.result(name, argument, popped, len(opcode.stack_after))

    def pop(self, opcode: pickletools.OpcodeInfo) -> list[Any]:
        """What the opcode takes, in the order it was pushed, without the mark."""
        before = opcode.stack_before
        taken: list[Any] = []
        if pickletools.stackslice in before:
            while (top := self.stack.pop()) is not _MARK:
                taken.insert(0, top)
        under = [kind for kind in before if kind not in (pickletools.markobject, pickletools.stackslice)]
        for _ in under:
            top = self.stack.pop()
            if top is _MARK:
                raise ValueError("broken pickle: a mark where a value should be")
            taken.insert(0, top)
        return taken

    def result(self, name: str, argument: Any, popped: list[Any], pushes: int) -> list[Any]:
        if name in ("GLOBAL", "INST"):
            return [self.imported(argument.replace(" ", "."))]
        if name == "STACK_GLOBAL":
            return [self.imported(".".join(part if isinstance(part, str) else "?" for part in popped))]
        if name in ("PERSID", "BINPERSID"):
            self.scan.persistent.append(popped[0] if popped else argument)
            return [_UNKNOWN]
        if name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE"):
            return [_tuple(popped)]
        if not popped and pushes == 1 and isinstance(argument, (str, int, float, bytes)):
            if isinstance(argument, str) and len(argument) <= 100:
                self.scan.strings.add(argument)
            return [argument]
        return [_UNKNOWN] * pushes

    def imported(self, name: str) -> Imported:
        self.scan.imports[name] = None
        return Imported(name)


def _tuple(values: list[Any]) -> tuple[Any, ...] | _Nested:
    nested = [value if isinstance(value, _Nested) else _Nested(len(value), 1) for value in values if _is_tuple(value)]
    if not nested:
        return tuple(values)
    leaves, depth = len(values) + sum(each.leaves for each in nested), 1 + max(each.depth for each in nested)
    if leaves > MAX_LEAVES or depth > MAX_DEPTH:
        raise ValueError("tuples within tuples without end")
    return _Nested(leaves, depth)


def _is_tuple(value: Any) -> bool:
    return isinstance(value, (tuple, _Nested))
