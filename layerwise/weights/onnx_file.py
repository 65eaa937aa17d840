"""ONNX: what its external data claims is checked here; ``onnx.checker`` is no validation of an untrusted file."""

from __future__ import annotations

import importlib.util
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

from layerwise.errors import missing_dependency
from layerwise.weights import onnx_child
from layerwise.weights.index import is_inside
from layerwise.weights.problems import AGAIN, bad, listed, short

TIME_LIMIT = 60.0  # seconds
BASE_MEMORY = 2 << 30  # bytes for the interpreter and its libraries; the parsed model takes a few times its size on top
_ESCAPE = "Do not use it: a model that reaches outside its folder is an attack or broken."


def refuse_onnx(path: Path) -> None:
    """Raise `ModelFormatError`: LW-M71 or LW-M72 where its data lies, LW-M40 where it is sane, since it is no model to load."""
    for tensor in _described(path):
        if tensor["external"] is None:
            what = f"gives {listed([tensor['name']])} {tensor['inside']:,} bytes of data, its shape needs {tensor['need']}."
            raise bad(72, path, what, AGAIN)
        _check_external(path, tensor)
    remedy = "Load the PyTorch weights it was exported from (.safetensors, or the Hugging Face folder)."
    raise bad(40, path, "is an ONNX model: an exported artifact, not a model to load.", remedy)


def _described(path: Path) -> list[dict[str, Any]]:
    if importlib.util.find_spec("onnx") is None:
        raise missing_dependency("onnx", "onnx", "Reading an ONNX file")
    memory = BASE_MEMORY + 4 * path.stat().st_size
    command = [sys.executable, "-I", onnx_child.__file__, str(path.absolute()), str(memory)]
    # One thread: each thread of a numeric library reserves address space, which the limit counts.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    try:
        child = subprocess.run(command, capture_output=True, timeout=TIME_LIMIT, env=environment, check=False)
        if child.returncode == 0 and (answer := json.loads(child.stdout))["graph"]:
            return answer["tensors"]
    except subprocess.TimeoutExpired as error:
        raise bad(72, path, f"could not be read as ONNX within {TIME_LIMIT:g} s.", AGAIN) from error
    if child.returncode == 0:
        raise bad(41, path, "is a file of an unknown format.", AGAIN)
    reason = (child.stderr.decode("utf-8", "replace").strip().splitlines() or [f"signal {-child.returncode}"])[-1]
    raise bad(72, path, f"is damaged, cut off or too large to be read as ONNX: {short(reason)}.", AGAIN)


def _check_external(path: Path, tensor: dict[str, Any]) -> None:
    entries = dict(tensor["external"])
    name = listed([tensor["name"]])
    if len(entries) != len(tensor["external"]):
        raise bad(72, path, f"describes the data of {name} twice.", AGAIN)
    location = entries.get("location", "")
    size = _external_size(path, location, name)
    offset, length = _number(path, name, entries.get("offset", "0")), entries.get("length")
    have = size - offset if length is None else _number(path, name, length)
    where = f"in {short(location)!r} ({size:,} bytes)"
    if offset + max(have, 0) > size or offset > size:
        raise bad(72, path, f"puts {name} past the end: {have:,} bytes at {offset:,} {where}.", AGAIN)
    need = tensor["need"]
    if need is None or need < 0 or have < need or (length is not None and have != need):
        raise bad(72, path, f"gives {name} {have:,} bytes {where}, its shape and type need {need}.", AGAIN)


def _external_size(path: Path, location: str, name: str) -> int:
    """The size in bytes of an external data file that is a plain file of the model's own folder."""
    shown = repr(short(location))
    if not is_inside(location):
        raise bad(71, path, f"looks for the data of {name} outside its folder: {shown}.", _ESCAPE)
    place = path.parent
    for part in Path(location).parts:
        place = place / part
        if place.is_symlink():
            raise bad(71, path, f"looks for the data of {name} behind a symbolic link: {shown}.", _ESCAPE)
    try:
        status = place.stat()
    except OSError as error:
        raise bad(72, path, f"misses the data file {shown} of {name}: {error.strerror}.", AGAIN) from error
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        what = f"looks for the data of {name} in {shown}, which is not a plain file with a single name (hard link)."
        raise bad(71, path, what, _ESCAPE)
    return status.st_size


def _number(path: Path, name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 19):
        raise bad(72, path, f"gives {name} the offset or length {short(text)!r}.", AGAIN)
    return int(text)
