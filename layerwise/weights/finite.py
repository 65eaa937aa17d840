"""NaN and infinity are found before any work is done on them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from layerwise.errors import NonFiniteWeights
from layerwise.tensors import flattened
from layerwise.weights.problems import SHOWN, short

CHUNK = 1 << 22  # values checked at a time


def check_finite(weights: torch.nn.Module | Mapping[str, torch.Tensor], *, source: str = "", code: str = "LW-M04") -> None:
    """Raise `NonFiniteWeights` that names every tensor with NaN or infinity and how many; `source` is where they are from.

    Of a module its parameters and saved buffers. A causal mask (zero, and minus infinity above the diagonal) is no fault.
    """
    tensors = weights.state_dict() if isinstance(weights, torch.nn.Module) else weights
    plain = [part for name, t in tensors.items() if isinstance(t, torch.Tensor) for part in flattened(name, t).items()]
    found = [text for name, tensor in plain if (text := _fault(name, tensor))]
    if not found:
        return
    more = f" and {len(found) - SHOWN:,} more tensors" if len(found) > SHOWN else ""
    raise NonFiniteWeights(
        f"{len(found):,} of {len(tensors):,} tensors hold NaN or infinity: {', '.join(found[:SHOWN])}{more}.",
        place=source,
        remedy="Nothing was computed from them. Take an earlier checkpoint: training diverged, or the file is damaged.",
        code=code,
    )


def _fault(name: str, tensor: torch.Tensor) -> str:
    values = _values(tensor)
    if values is None or _all_finite(values) or _is_causal_mask(values):
        return ""
    values = values.float() if values.element_size() == 1 else values
    nan, infinite = int(torch.isnan(values).sum()), int(torch.isinf(values).sum())
    return f"{short(name)!r} ({nan:,} NaN, {infinite:,} Inf of {values.numel():,})"


def _values(tensor: torch.Tensor) -> torch.Tensor | None:
    """The numbers to look at; None where there are none (whole numbers, no data)."""
    tensor = tensor.detach()
    if tensor.layout is torch.sparse_coo:
        tensor = tensor._values()
    elif tensor.layout is not torch.strided:
        tensor = tensor.values()
    if tensor.device.type == "meta" or not (tensor.is_floating_point() or tensor.is_complex()):
        return None
    return tensor


def _all_finite(values: torch.Tensor) -> bool:
    """In chunks: `isfinite` of a whole tensor would hold it twice more."""
    chunks = values.reshape(-1).split(CHUNK)
    return all(bool(torch.isfinite(c.float() if c.element_size() == 1 else c).all()) for c in chunks)  # 8-bit: no isfinite


def _is_causal_mask(values: torch.Tensor) -> bool:
    if values.ndim < 2 or values.shape[-1] != values.shape[-2] or values.is_complex():
        return False
    return torch.equal(values, torch.full_like(values, -torch.inf).triu(1))
