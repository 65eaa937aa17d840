"""Batches as plain data: whole (for a fresh process that must see the same samples) or in outline (shapes, no one's data)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from layerwise.data import Batch
from layerwise.errors import UsageError
from layerwise.layout import restored

SCALARS = (bool, int, float, str, type(None))


def pack(batch: Batch) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """JSON data that describes `batch` without its labels, and the tensors it points to."""
    tensors: dict[str, Tensor] = {}

    def keep(tensor: Tensor) -> dict[str, Any]:
        key = f"tensor{len(tensors)}"
        tensors[key] = tensor.detach().cpu().contiguous().clone()
        return {"tensor": key}

    return _form(batch, keep), tensors


def unpack(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Batch:
    """The inverse of `pack`."""
    return _batch(described, lambda item: tensors[item["tensor"]])


def outline(batch: Batch) -> dict[str, Any]:
    """`batch` as JSON data with shapes, types and ranges in place of its samples."""
    return _form(batch, _shape)


def stand_in(outlined: Mapping[str, Any]) -> Batch:
    """A batch with the shapes of `outline` and made-up content: fixed noise, and 1 (at most the largest seen) for integers.

    The edges of graphs make rings.
    """
    batch = _batch(outlined, _made_up)
    return batch if batch.layout is None else replace(batch, kwargs=batch.layout.connected(batch.kwargs))


def _form(batch: Batch, tensor: Any) -> dict[str, Any]:
    found = {"args": _described(list(batch.args), tensor), "kwargs": _described(dict(batch.kwargs), tensor)}
    return found if batch.layout is None else found | {"layout": batch.layout.described()}


def _shape(tensor: Tensor) -> dict[str, Any]:
    most = None if tensor.is_floating_point() or not tensor.numel() else int(tensor.max())
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."), "most": most}


def _made_up(item: Mapping[str, Any]) -> Tensor:
    dtype: torch.dtype = getattr(torch, item["dtype"])
    if dtype.is_floating_point:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(item["shape"], generator=generator).to(dtype)
    # an attention mask of zeros would leave nothing to attend to; every vocabulary has an entry 1
    return torch.full(item["shape"], min(1, item["most"] or 0), dtype=dtype)


def _described(tree: Any, tensor: Any) -> Any:
    if isinstance(tree, Tensor):
        return tensor(tree)
    if isinstance(tree, Mapping):
        return {"dict": {str(k): _described(v, tensor) for k, v in tree.items()}}
    if isinstance(tree, tuple | list):
        return {type(tree).__name__ if type(tree) in (tuple, list) else "tuple": [_described(v, tensor) for v in tree]}
    if isinstance(tree, SCALARS):
        return {"value": tree}
    raise UsageError(
        f"A batch holds a {type(tree).__name__}, which cannot be saved.",
        remedy="Give tensors, numbers, strings, None, and tuples, lists or dicts of them.",
    )


def _batch(described: Mapping[str, Any], tensor: Any) -> Batch:
    layout = restored(described.get("layout"))
    return Batch(tuple(_restored(described["args"], tensor)), _restored(described["kwargs"], tensor), None, layout)


def _restored(item: Mapping[str, Any], tensor: Any) -> Any:
    if "dict" in item:
        return {k: _restored(v, tensor) for k, v in item["dict"].items()}
    if "list" in item:
        return [_restored(v, tensor) for v in item["list"]]
    if "tuple" in item:
        return tuple(_restored(v, tensor) for v in item["tuple"])
    return item["value"] if "value" in item else tensor(item)
