"""safetensors: the whole header is checked before the library maps the file.

The library accepts duplicate keys (the last one wins) and leaves NaN, complex numbers and the number of tensors to the caller.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from layerwise.weights.problems import AGAIN, RESAVE, DuplicateKey, bad, listed, no_duplicates, short

MAX_HEADER = 100_000_000  # bytes; the library's own limit
MAX_TENSORS = 100_000  # in one file; the largest open models hold less over all their shards
ITEM_BYTES = {
    **dict.fromkeys(["BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"], 1),
    **dict.fromkeys(["U16", "I16", "F16", "BF16"], 2),
    **dict.fromkeys(["U32", "I32", "F32"], 4),
    **dict.fromkeys(["U64", "I64", "F64"], 8),
}


_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "U16": torch.uint16, "I16": torch.int16,
    "F16": torch.float16, "BF16": torch.bfloat16, "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32,
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64,
}  # fmt: skip


def stream_safetensors(path: Path, *, mapped: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor of a checked file, one at a time, in the order of the data; a tied name follows the name it is tied to.

    `mapped`: tensors share the pages of the file; else each is a copy that nothing else holds.
    """
    header, aliases = _named(path)
    for name, tensor in _mapped(path, header) if mapped else _copied(path, header):
        for each in (name, *aliases.get(name, ())):
            yield each, tensor
        del tensor  # else it would be held while the next one is read


def describe_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Name → a tensor without data (``meta``) of its shape and type, tied names included; only the header is read."""
    header, aliases = _named(path)
    return {
        each: torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]], device="meta")
        for name, entry in header.items()
        for each in (name, *aliases.get(name, ()))
    }


def _named(path: Path) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The checked entries of the tensors, and for each name those that are tied to it."""
    header = read_header(path)
    metadata = header.pop("__metadata__", {})
    aliases: dict[str, list[str]] = {}
    for alias, name in metadata.items():
        # safetensors.torch.save_model's convention: {dropped name: kept name}.
        if name in header and alias not in header:
            aliases.setdefault(name, []).append(alias)
    return header, aliases


def _mapped(path: Path, header: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in sorted(header, key=lambda n: header[n]["data_offsets"]):
            yield name, file.get_tensor(name)


def _copied(path: Path, header: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        for name in sorted(header, key=lambda n: header[n]["data_offsets"]):
            entry = header[name]
            first, last = entry["data_offsets"]
            tensor = torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]])
            file.seek(start + first)
            if last > first and file.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data) != last - first:
                raise bad(46, path, f"ended while {listed([name])} was read.", AGAIN)
            yield name, tensor
            del tensor


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, every claim checked against the size of the file. Raises `ModelFormatError`."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        length = _header_length(path, handle.read(8), size)
        raw = handle.read(length)
    count = raw.count(b'"dtype"')  # before parsing: a million small objects cost a gigabyte
    if count > MAX_TENSORS:
        what = f"holds {count:,} tensors; at most {MAX_TENSORS:,} in one file are read."
        raise bad(68, path, what, "Save it in shards with an index.")
    header = _parsed(path, raw)
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    for name, entry in tensors.items():
        _check_entry(path, name, entry)
    _check_layout(path, tensors, size - 8 - length)
    return header


def _header_length(path: Path, first: bytes, size: int) -> int:
    length = int.from_bytes(first, "little")
    if len(first) == 8 and length >= 1 << 63:
        raise bad(64, path, f"claims a header of {length:,} bytes, more than any file has.", AGAIN)
    if len(first) < 8 or length > size - 8:
        claims = f"claims a header of {length:,} bytes but has {size:,} bytes in all."
        raise bad(63, path, claims, AGAIN)
    if length > MAX_HEADER:
        what = f"has a header of {length:,} bytes; at most {MAX_HEADER:,} are read."
        raise bad(68, path, what, "Save it in shards with an index.")
    return length


def _parsed(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
    except DuplicateKey as error:
        raise bad(67, path, f"names {listed(error.args)} twice in its header.", RESAVE) from error
    except (ValueError, RecursionError) as error:
        raise bad(63, path, f"has a header that is not JSON: {short(str(error))}.", AGAIN) from error
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise bad(63, path, "has a header that is not a table of tensors.", AGAIN)
    return header


def _check_entry(path: Path, name: str, entry: Any) -> None:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise bad(63, path, f"describes {listed([name])} by something else than dtype, shape and data_offsets.", AGAIN)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        remedy = f"Convert it to one of {', '.join(ITEM_BYTES)} where it was made, and save it again."
        raise bad(54, path, f"holds {listed([name])} as {short(repr(dtype))}, which is not read.", remedy)
    if not _sizes(shape):
        raise bad(66, path, f"gives {listed([name])} the shape {short(repr(shape))}.", AGAIN)
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise bad(65, path, f"gives {listed([name])} the data offsets {short(repr(offsets))}.", AGAIN)
    need, have = math.prod(shape) * ITEM_BYTES[dtype], offsets[1] - offsets[0]
    if need != have:
        needs = f"{need:,} bytes" if need < 1 << 63 else "more bytes than can be addressed"
        what = f"gives {listed([name])} {have:,} bytes, but its shape {short(repr(shape))} in {dtype} needs {needs}."
        raise bad(66, path, what, AGAIN)


def _sizes(numbers: Any) -> bool:
    # Rank 64 and 2**63 bound the product too: no Python integer grows without end.
    return isinstance(numbers, list) and len(numbers) <= 64 and all(type(n) is int and 0 <= n < 1 << 63 for n in numbers)


def _check_layout(path: Path, tensors: dict[str, Any], available: int) -> None:
    """The data of the tensors, one after the other, is exactly what follows the header."""
    end, before = 0, ""
    for name in sorted(tensors, key=lambda n: tensors[n]["data_offsets"]):
        first, last = tensors[name]["data_offsets"]
        if first != end:
            kind = "overlap" if first < end else "leave a hole"
            at = f"{listed([before])} ends at {end:,}" if before else "the data begins at 0"
            raise bad(65, path, f"has data that {kind}: {at}, {listed([name])} begins at {first:,}.", RESAVE)
        end, before = last, name
    if end > available:
        what = f"is cut off: its tensors need {end:,} bytes of data, {available:,} are there (last tensor: {listed([before])})."
        raise bad(46, path, what, AGAIN)
    if end < available:
        raise bad(65, path, f"has {available - end:,} bytes after its last tensor {listed([before])}.", RESAVE)
