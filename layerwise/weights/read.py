"""Named tensors from a file, a folder or an index of shards."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from layerwise.weights.finite import check_finite
from layerwise.weights.gguf_file import refuse_gguf
from layerwise.weights.index import find_files
from layerwise.weights.onnx_file import refuse_onnx
from layerwise.weights.problems import RESAVE, bad, listed
from layerwise.weights.safetensors_file import stream_safetensors
from layerwise.weights.sniff import kind_of, refuse
from layerwise.weights.torch_file import read_torch_pickle, read_torch_zip

NON_FINITE = "LW-M53"
_READERS: dict[str, Callable[[Path], dict[str, torch.Tensor]]] = {"zip": read_torch_zip, "pickle": read_torch_pickle}
_ARTIFACTS: dict[str, Callable[[Path], None]] = {"gguf": refuse_gguf, "onnx": refuse_onnx}


def read_weights(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """All tensors of a weight file, a folder or an ``*.index.json`` with shards, by name, on the CPU; tied ones are one tensor.

    Raises `ModelFormatError` (LW-M40 to LW-M72) for a bad file, `NonFiniteWeights` LW-M53 for NaN or infinity, `CorruptRun`
    for a folder of ours that does not match its manifest, `UsageError` for a path that is not there.
    """
    tensors = dict(_each(Path(path)))
    check_finite(tensors, source=str(Path(path).absolute()), code=NON_FINITE)
    return tensors


def stream_weights(path: str | os.PathLike[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """As `read_weights`, one (name, tensor) at a time: of safetensors only one tensor, of other files one file is in memory."""
    for name, tensor in _each(Path(path)):
        check_finite({name: tensor}, source=str(Path(path).absolute()), code=NON_FINITE)
        yield name, tensor


def _each(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    files, placed = find_files(path)
    origin: dict[str, Path] = {}
    for file in files:
        for name, tensor in _in_file(file):
            if name in origin or placed.get(name, file) != file:
                where = origin.get(name, placed.get(name, file))
                what = f"holds {listed([name])}, which belongs to {where.name!r}."
                raise bad(62, file, what, "Shards of two models were mixed: download them again into an empty folder.")
            origin[name] = file
            yield name, tensor
    absent = [name for name in placed if name not in origin]
    if absent:
        what = f"promises {len(absent):,} tensors that no shard holds: {listed(absent)}."
        raise bad(60, path, what, "Index and shards are of two models: download them again into an empty folder.")


def _in_file(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    kind = kind_of(path)
    if kind == "safetensors":
        yield from stream_safetensors(path)
    elif kind in _READERS:
        if path.name.endswith(".safetensors"):
            raise bad(
                49, path, "is called safetensors but is a pickle of torch; nothing was loaded.", f"Do not trust it. {RESAVE}"
            )
        yield from _READERS[kind](path).items()
    elif kind in _ARTIFACTS:
        _ARTIFACTS[kind](path)
    else:
        raise refuse(path, kind)
