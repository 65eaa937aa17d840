"""How many weights are zero, where, and what that is worth: nothing in memory, something in a compressed file."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.model import UniversalModel
from layerwise.sparsity import CHUNK
from layerwise.structure import outside
from layerwise.tensors import byte_size, dense, distinct, flattened


@dataclass(frozen=True)
class Zeros:
    """`parameters` are counts, `prunable` those in matrices and kernels; `zeros` of the prunable ones, `sparsity` their share."""

    parameters: int
    prunable: int
    zeros: int

    @property
    def sparsity(self) -> float:
        return self.zeros / self.prunable if self.prunable else 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"sparsity": self.sparsity}


@dataclass(frozen=True)
class PruningStatistics(Mapping[str, Any]):
    """Of the whole model and of each layer; ``statistics["sparsity"]`` and every other field by its name.

    `bytes` are those of parameters and buffers, which zeros do not change, nor the safetensors file. `compressed_bytes` is what
    zlib makes of them (level 1); 0 where it was not asked for.
    """

    total: Zeros
    layers: Mapping[str, Zeros]
    rest: Zeros  # what belongs to no layer: embeddings, heads
    bytes: int
    compressed_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        layers = {name: zeros.to_dict() for name, zeros in self.layers.items()}
        sizes = {"bytes": self.bytes, "compressed_bytes": self.compressed_bytes}
        return self.total.to_dict() | {"layers": layers, "rest": self.rest.to_dict()} | sizes

    def __getitem__(self, key: str) -> Any:
        return self.to_dict()[key]

    def __iter__(self) -> Any:
        return iter(self.to_dict())

    def __len__(self) -> int:
        return len(self.to_dict())


def pruning_statistics(model: UniversalModel, *, compressed: bool = False) -> PruningStatistics:
    """Counts every parameter once, in the first layer that has it."""
    seen: set[int] = set()
    layers = {layer.name: _count(dict(layer.module.named_parameters()), seen) for layer in model.blocks}
    rest = _count(dict(outside(model.module, model.blocks)), seen)
    parts = [*layers.values(), rest]
    total = Zeros(*(sum(getattr(part, name) for part in parts) for name in ("parameters", "prunable", "zeros")))
    return PruningStatistics(total, layers, rest, byte_size(model.module), _compressed(model.module) if compressed else 0)


def _count(tensors: Mapping[str, Tensor], seen: set[int]) -> Zeros:
    parameters = prunable = zeros = 0
    for tensor in tensors.values():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        parameters += tensor.numel()
        if tensor.dim() > 1:
            prunable += tensor.numel()
            zeros += tensor.numel() - int(dense(tensor).count_nonzero())
    return Zeros(parameters, prunable, zeros)


def _compressed(module: nn.Module) -> int:
    """A chunk at a time."""
    size, seen = 0, set()
    for name, tensor in distinct(module):
        for plain in flattened(name, tensor).values():
            if id(plain) in seen:
                continue
            seen.add(id(plain))
            packer = zlib.compressobj(level=1)
            for part in plain.detach().cpu().contiguous().reshape(-1).view(torch.uint8).split(4 * CHUNK):
                size += len(packer.compress(part.numpy().tobytes()))
            size += len(packer.flush())
    return size
