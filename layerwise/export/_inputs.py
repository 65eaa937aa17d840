"""A batch as the named tensors that an exported graph takes, and a module whose forward has exactly these arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from layerwise import trees
from layerwise.data import Batch
from layerwise.errors import UserModelError
from layerwise.trees import Path


@dataclass(frozen=True)
class Inputs:
    """Name → where the tensor stands in ``(args, kwargs)`` of the batches of one model."""

    paths: dict[str, Path]

    @classmethod
    def of(cls, module: nn.Module, batch: Batch) -> Inputs:
        """Names as the module's own forward has them."""
        parameters = list(inspect.signature(module.forward).parameters)
        paths = {_name(path, parameters): path for path, _ in trees.tensors((batch.args, dict(batch.kwargs)))}
        return cls(paths)

    def values(self, batch: Batch) -> dict[str, Tensor]:
        """The batch's tensors by name. Raises `UserModelError` if it has other arguments than the first one."""
        tree = (batch.args, dict(batch.kwargs))
        if [path for path, _ in trees.tensors(tree)] != list(self.paths.values()):
            raise UserModelError(
                "The batches do not all have the same arguments, and an exported graph has fixed ones.",
                remedy=f"Give every batch {', '.join(self.paths)}.",
                code="LW-U79",
            )
        return {name: trees.get(tree, path) for name, path in self.paths.items()}


class NamedForward(nn.Module):
    """Calls `model` with the batch's other arguments fixed, and gives the one tensor that tasks read.

    The exporter names the graph's inputs after the forward's arguments, and cannot see through ``*args``.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, batch: Batch, output: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        fixed = (batch.args, dict(batch.kwargs) | _no_cache(model))

        def forward(*values: Tensor) -> Tensor:
            tree: Any = fixed
            for path, value in zip(inputs.paths.values(), values, strict=True):
                tree = trees.replaced(tree, path, value)
            return output(model(*tree[0], **tree[1]))

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        forward.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in inputs.paths])  # type: ignore[attr-defined]
        self.forward = forward


def _no_cache(model: nn.Module) -> dict[str, bool]:
    """A cache of keys and values would become outputs that nobody asked for."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def _name(path: Path, parameters: list[str]) -> str:
    side, key, *rest = path
    first = parameters[key] if side == 0 and key < len(parameters) else f"input{key}" if side == 0 else str(key)
    name = "_".join(str(part) for part in (first, *rest))
    return name if name.isidentifier() else f"input_{abs(hash(path))}"
