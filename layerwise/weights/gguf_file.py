"""GGUF: the header is walked by hand, every count checked against what is left of the file before it is believed.

Public readers take a claimed array of 2**63 elements at its word and never return.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import BinaryIO

from layerwise.weights.problems import AGAIN, bad, listed

MAX_STEPS = 2_000_000  # strings and nested values in one header; the largest vocabularies hold 300,000 words
MAX_DIMENSIONS = 4
_STRING, _ARRAY, _MAX_DEPTH = 8, 9, 4
_VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
# Type number: (elements in a block, bytes of a block), from ggml's table.
_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136),
    24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66),
    39: (32, 17), 40: (64, 36),
}  # fmt: skip
_TENSOR_BYTES = 8 + 4 + 4 + 8  # the least a tensor's entry takes: empty name, no dimension, type, offset
_PAIR_BYTES = 8 + 4 + 1


def refuse_gguf(path: Path) -> None:
    """Raise `ModelFormatError`: LW-M69 or LW-M70 where the header lies, LW-M40 where it is sane, since it is no model to load."""
    with path.open("rb") as handle:
        _Header(path, handle, path.stat().st_size).check()
    remedy = "Load the weights it was made from (.safetensors, or the Hugging Face folder)."
    raise bad(40, path, "is a GGUF model: an exported artifact, not a model to load.", remedy)


class _Header:
    """Reads forward through the file; never past its end, never more than a string at a time."""

    def __init__(self, path: Path, handle: BinaryIO, size: int) -> None:
        self.path, self.handle, self.size = path, handle, size
        self.steps = 0
        self.alignment = 32

    def check(self) -> None:
        magic, version = self.take(4, "the magic"), self.number(4, "the version")
        if magic != b"GGUF" or version not in (2, 3):
            raise bad(69, self.path, f"is GGUF of version {version}; versions 2 and 3 are known, little-endian.", AGAIN)
        tensors, pairs = self.number(8, "the count of tensors"), self.number(8, "the count of keys")
        self.need(tensors * _TENSOR_BYTES + pairs * _PAIR_BYTES, f"{tensors:,} tensors and {pairs:,} keys")
        keys: set[str] = set()
        for _ in range(pairs):
            self.pair(keys)
        ends: dict[str, int] = {}
        for _ in range(tensors):
            self.tensor(ends)
        start = -(-self.handle.tell() // self.alignment) * self.alignment
        past = [name for name, end in ends.items() if start + end > self.size]
        if past:
            raise bad(70, self.path, f"is cut off: its {self.size:,} bytes end before the data of {listed(past)}.", AGAIN)

    def pair(self, keys: set[str]) -> None:
        key = self.string("a key")
        if key in keys:
            raise bad(69, self.path, f"names the key {listed([key])} twice.", AGAIN)
        keys.add(key)
        kind = self.number(4, f"the type of {listed([key])}")
        if key == "general.alignment" and kind == 4:
            self.alignment = self.number(4, key)
            if not 1 <= self.alignment <= 1 << 20:
                raise bad(69, self.path, f"asks for an alignment of {self.alignment:,} bytes.", AGAIN)
        else:
            self.value(kind, key, 0)

    def value(self, kind: int, key: str, depth: int) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS or depth > _MAX_DEPTH:
            what = f"has more than {MAX_STEPS:,} values or {_MAX_DEPTH} nested arrays, at key {listed([key])}."
            raise bad(69, self.path, what, AGAIN)
        if kind in _VALUE_BYTES:
            self.skip(_VALUE_BYTES[kind], f"the value of {listed([key])}")
        elif kind == _STRING:
            length = self.number(8, f"a string of {listed([key])}")
            self.skip(length, f"a string of {length:,} bytes at key {listed([key])}")
        elif kind == _ARRAY:
            self.array(key, depth)
        else:
            raise bad(69, self.path, f"has a value of the unknown type {kind} at key {listed([key])}.", AGAIN)

    def array(self, key: str, depth: int) -> None:
        kind, count = self.number(4, f"an array of {listed([key])}"), self.number(8, f"an array of {listed([key])}")
        what = f"an array of {count:,} values at key {listed([key])}"
        if kind in _VALUE_BYTES:
            self.skip(count * _VALUE_BYTES[kind], what)
            return
        self.need(count * 8, what)
        for _ in range(count):
            self.value(kind, key, depth + 1)

    def tensor(self, ends: dict[str, int]) -> None:
        name = self.string("the name of a tensor")
        count = self.number(4, f"the dimensions of {listed([name])}")
        if count > MAX_DIMENSIONS:
            what = f"gives {listed([name])} {count:,} dimensions; GGUF allows {MAX_DIMENSIONS}."
            raise bad(70, self.path, what, AGAIN)
        shape = [self.number(8, f"the shape of {listed([name])}") for _ in range(count)]
        kind, offset = self.number(4, f"the type of {listed([name])}"), self.number(8, f"the offset of {listed([name])}")
        if name in ends or kind not in _BLOCKS or offset % self.alignment:
            what = f"describes {listed([name])} twice, in an unknown type ({kind}) or at a crooked offset ({offset:,})."
            raise bad(70, self.path, what, AGAIN)
        elements, (block, size) = math.prod(shape), _BLOCKS[kind]
        ends[name] = offset + -(-elements // block) * size
        if ends[name] > self.size:
            what = f"gives {listed([name])} the shape {tuple(shape)} at {offset:,}: more than its {self.size:,} bytes."
            raise bad(70, self.path, what, AGAIN)

    def string(self, what: str) -> str:
        length = self.number(8, what)
        if length > 65_535:
            raise bad(69, self.path, f"has {what} of {length:,} bytes.", AGAIN)
        return self.take(length, what).decode("utf-8", "replace")

    def number(self, size: int, what: str) -> int:
        return int.from_bytes(self.take(size, what), "little")

    def take(self, size: int, what: str) -> bytes:
        self.need(size, what)
        return self.handle.read(size)

    def skip(self, size: int, what: str) -> None:
        self.need(size, what)
        self.handle.seek(size, 1)

    def need(self, size: int, what: str) -> None:
        left = self.size - self.handle.tell()
        if size > left:
            raise bad(69, self.path, f"claims {what}, which takes {size:,} bytes; {left:,} are left of the file.", AGAIN)
