"""Weights into one safetensors file, whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from layerwise.files import staged_file
from layerwise.weights.problems import bad, listed
from layerwise.weights.torch_file import DTYPES


def save_weights(path: str | os.PathLike[str], weights: torch.nn.Module | Mapping[str, torch.Tensor]) -> None:
    """Write the state dict of a module, or named tensors, to `path`.

    Tied tensors are stored once, under their first name; the header's metadata maps each other name to it, as
    ``safetensors.torch.save_model`` does, and `read_weights` gives them back as one tensor. Raises `ModelFormatError` for
    what the format cannot hold, and as `layerwise.files.staged_file` does.
    """
    path = Path(path)
    tensors = weights.state_dict() if isinstance(weights, torch.nn.Module) else dict(weights)
    _check(path, tensors)
    stored, aliases = _untied(tensors)
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    with staged_file(path, size=size) as temporary, _os_errors():
        temporary.touch()
        mode = temporary.stat().st_mode  # the library's own file would be readable by its owner alone
        save_file(stored, temporary, metadata={"format": "pt"} | aliases)
        temporary.chmod(mode)


def _check(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise bad(42, path, f"cannot hold {listed([name])}: a {type(tensor).__name__}, not a tensor.")
        if tensor.layout is not torch.strided or tensor.dtype not in DTYPES:
            what = f"cannot hold {listed([name])}: {tensor.dtype}, {tensor.layout}."
            raise bad(54, path, what, "Convert it to a dense tensor of plain numbers first.")
        if tensor.device.type == "meta":
            raise bad(42, path, f"cannot hold {listed([name])}: it has no data (device meta).")


def _untied(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Each distinct tensor once, contiguous and with storage of its own, and for every other name the name it shares."""
    stored: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in tensors.items():
        identity = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and identity in first:
            aliases[name] = first[identity]
            continue
        first[identity] = name
        plain = tensor.detach().contiguous()
        whole = plain.untyped_storage().nbytes() == plain.numel() * plain.element_size()
        stored[name] = plain if whole else plain.clone()  # a slice of a larger buffer
    return stored, aliases


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    """The library hides the operating system's error in its text: "… (os error 28)"."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
