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
from layerwise.weights.safetensors_file import describe_safetensors, stream_safetensors
from layerwise.weights.sniff import kind_of, refuse
from layerwise.weights.torch_file import read_torch_pickle, read_torch_zip

NON_FINITE = "LW-M53"
_READERS: dict[str, Callable[[Path], dict[str, torch.Tensor]]] = {"zip": read_torch_zip, "pickle": read_torch_pickle}
_ARTIFACTS: dict[str, Callable[[Path], None]] = {"gguf": refuse_gguf, "onnx": refuse_onnx}


def read_weights(path: str | os.PathLike[str], *, finite: bool = True) -> dict[str, torch.Tensor]:
    """All tensors of a weight file, a folder or an ``*.index.json`` with shards, by name, on the CPU; tied ones are one tensor.

    `finite`: whether NaN and infinity are refused; a buffer may be meant so (a bound that does not bind).
    Raises `ModelFormatError` (LW-M40 to LW-M72) for a bad file, `NonFiniteWeights` LW-M53 for NaN or infinity, `CorruptRun`
    for a folder of ours that does not match its manifest, `UsageError` for a path that is not there.
    """
    tensors = dict(_each(Path(path)))
    if finite:
        check_finite(tensors, source=str(Path(path).absolute()), code=NON_FINITE)
    return tensors


def stream_weights(path: str | os.PathLike[str], *, mapped: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """As `read_weights`, one (name, tensor) at a time: of safetensors only one tensor, of other files one file is in memory.

    `mapped`: tensors of safetensors are the pages of the file, which stay in memory until the file is read through. Else each
    is read into memory of its own, so that no more than one tensor is there.
    """
    for name, tensor in _each(Path(path), mapped):
        check_finite({name: tensor}, source=str(Path(path).absolute()), code=NON_FINITE)
        yield name, tensor
        del tensor  # else it would be held while the next one is read


def describe_weights(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Name → a tensor without data (``meta``) of its shape and type; of safetensors only the headers are read."""
    files, _ = find_files(Path(path))
    found: dict[str, torch.Tensor] = {}
    for file in files:
        if kind_of(file) == "safetensors":
            found |= describe_safetensors(file)
        else:
            found |= {name: tensor.to("meta") for name, tensor in _in_file(file, mapped=True)}
    return found


def _each(path: Path, mapped: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    files, placed = find_files(path)
    origin: dict[str, Path] = {}
    for file in files:
        for name, tensor in _in_file(file, mapped):
            if name in origin or placed.get(name, file) != file:
                where = origin.get(name, placed.get(name, file))
                what = f"holds {listed([name])}, which belongs to {where.name!r}."
                raise bad(62, file, what, "Shards of two models were mixed: download them again into an empty folder.")
            origin[name] = file
            yield name, tensor
            del tensor
    absent = [name for name in placed if name not in origin]
    if absent:
        what = f"promises {len(absent):,} tensors that no shard holds: {listed(absent)}."
        raise bad(60, path, what, "Index and shards are of two models: download them again into an empty folder.")


def _in_file(path: Path, mapped: bool) -> Iterator[tuple[str, torch.Tensor]]:
    kind = kind_of(path)
    if kind == "safetensors":
        yield from stream_safetensors(path, mapped=mapped)
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
