"""How large the inputs are that each weight meets: ‖x‖₂ over samples and positions, for any layer that is linear in its weight.

Decision: no table of layer types. A layer run on x² gives a sum whose gradient in a weight is the sum of the x² that this weight
was multiplied by, so strides, padding, groups and kernels need no code of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from layerwise.data import Data
from layerwise.model import UniversalModel
from layerwise.sparsity import Matrix
from layerwise.trace import unfused


def input_norms(model: UniversalModel, matrices: Sequence[Matrix], data: Data) -> dict[str, Tensor]:
    """Name of a matrix → float32 of its shape: the norm of the inputs that each weight meets on `data`.

    Padding of a batch counts as input like any other position. A matrix whose layer is not called is left out.
    """
    sums: dict[str, Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(unfused())
        for matrix in matrices:
            handle = matrix.module.register_forward_pre_hook(_recorder(matrix, sums), with_kwargs=True)
            stack.callback(handle.remove)
        for batch in data:
            model.predict(batch)
    return {name: total.sqrt().float() for name, total in sums.items()}


def _recorder(matrix: Matrix, sums: dict[str, Tensor]) -> Any:
    inside = False

    def record(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal inside
        if inside:  # our own run of the layer
            return
        inside = True
        try:
            met = squares(matrix, next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)))
        finally:
            inside = False
        sums[matrix.name] = sums[matrix.name] + met if matrix.name in sums else met

    return record


def squares(matrix: Matrix, inputs: Tensor) -> Tensor:
    """The sum of the squares of `inputs` that each weight of `matrix` is multiplied by; float64, of the weight's shape."""
    with torch.enable_grad():
        weight = matrix.weight.detach().double().requires_grad_(True)
        own = {name: p.detach().double() for name, p in matrix.module.named_parameters(recurse=False)}
        output = functional_call(matrix.module, own | {"weight": weight}, (inputs.detach().double().square(),))
        return torch.autograd.grad(output.sum(), weight)[0]
