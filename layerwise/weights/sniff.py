"""What a file is, by its first bytes. The name is not believed: a pickle may call itself model.safetensors."""

from __future__ import annotations

import re
import stat
from pathlib import Path

from layerwise.errors import UsageError
from layerwise.weights.problems import AGAIN, RESAVE, bad, short

HEAD = 512
_MAGIC: tuple[tuple[bytes, int, str], ...] = (
    (b"GGUF", 0, "gguf"),
    (b"FUGG", 0, "gguf"),  # written on a big-endian machine
    (b"PK\x03\x04", 0, "zip"),
    (b"PK\x05\x06", 0, "zip"),
    (b"version https://git-lfs.github.com", 0, "lfs"),
    (b"\x89HDF", 0, "an HDF5 file (Keras)"),
    (b"\x93NUMPY", 0, "a NumPy array"),
    (b"TFL3", 4, "a TensorFlow Lite model"),
    (b"\x1f\x8b", 0, "a gzip archive"),
    (b"\xfd7zXZ", 0, "an xz archive"),
    (b"\x28\xb5\x2f\xfd", 0, "a zstd archive"),
    (b"ustar", 257, "a tar archive"),
    (b"PAR1", 0, "a parquet table"),
)
_MARKUP = re.compile(rb"^(<!doctype|<html|<head|<body|<\?xml|<script|<!--|<error)", re.IGNORECASE)
_TEXT_PICKLE = re.compile(rb"^[(\]}]?c[A-Za-z_][\w.]*\n[A-Za-z_][\w.]*\n")
# ir_version, a small number, is the first field of an ONNX ModelProto; then comes any of its other fields.
_ONNX = re.compile(rb"^\x08[\x01-\x7f][\x12\x1a\x22\x28\x32\x3a\x42\x72\xa2\xaa\xca]")


def kind_of(path: Path) -> str:
    """One of safetensors, zip, pickle, gguf, onnx, json, html, text, lfs, empty, or in words what it is.

    Raises `UsageError` for what is not a readable regular file: a missing path, a folder, a pipe, no permission.
    """
    size = regular_size(path)
    with path.open("rb") as handle:
        head = handle.read(HEAD)
    return "empty" if size == 0 else _kind(head, size, path.name)


def regular_size(path: Path) -> int:
    """The size in bytes of the regular file at `path`, which this process may read."""
    place = str(path.absolute())
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe or a device would hang the reader
            raise UsageError("is not a regular file.", place=place, code="LW-C05")
        path.open("rb").close()
    except FileNotFoundError:
        raise UsageError("does not exist.", place=place, remedy="Check the path.", code="LW-C04") from None
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}.", place=place, code="LW-C06") from error
    return status.st_size


def _kind(head: bytes, size: int, name: str) -> str:
    for magic, offset, kind in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return kind
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length <= size - 8:
        return "safetensors"
    if (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05" and head[2:8] != bytes(6)) or _TEXT_PICKLE.match(head):
        return "pickle"
    if head[8:9] == b"{" and not _MARKUP.match(head.lstrip()):
        return "safetensors"  # with a wrong header length: its own check says which
    if text := _kind_of_text(head):
        return text
    # Only now the name counts, so that the checks of the format can say what is damaged.
    if name.endswith(".safetensors"):
        return "safetensors"
    return "onnx" if name.endswith(".onnx") or _ONNX.match(head) else "a file of an unknown format"


def _kind_of_text(head: bytes) -> str:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if _MARKUP.match(text):
        return "html"
    if any(byte < 9 or 13 < byte < 32 for byte in head):
        return ""
    return "json" if text[:1] in (b"{", b"[") else "text"


def refuse(path: Path, kind: str) -> Exception:
    """The error for a file of a `kind` that holds no weights we read."""
    if kind == "empty":
        return bad(43, path, "is empty (0 bytes).", AGAIN)
    if kind == "lfs":
        return bad(45, path, "is a git-lfs pointer, not the weights.", "Run: git lfs pull")
    if kind in ("html", "text", "json"):
        with path.open("rb") as handle:
            start = short(handle.read(HEAD).decode("utf-8", "replace").strip(), 60)
        what = "a web page" if kind == "html" else "text"
        remedy = "Download again: the server answered with a web page or a message. A login or another address may be needed."
        return bad(44, path, f"is {what}, not weights; it begins with {start!r}.", remedy)
    return bad(41, path, f"is {kind}, and no weights that layerwise reads.", f"Give .safetensors. {RESAVE}")
