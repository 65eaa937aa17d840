"""Which inputs of a linear map can go, and what the others become so that its outputs change least; from one Gram matrix.

Decision: float64 throughout. Inputs come in blocks (the pixels of one channel that a kernel meets), and blocks go as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def damped(gram: Tensor, ridge: float) -> Tensor:
    """`gram` with `ridge` times its mean diagonal added to the diagonal, in float64: inputs that are alike stay solvable."""
    gram = gram.double()
    return gram + ridge * gram.diagonal().mean().clamp_min(1e-30) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def refitted(weight: Tensor, gram: Tensor, kept: Sequence[int]) -> Tensor:
    """(outputs, inputs): the weights on the inputs `kept` whose outputs are nearest to those of `weight`, and 0 elsewhere.

    Minimizes E ‖(W − W') x‖² for inputs with E x xᵀ = `gram`, by the normal equations.
    """
    result = torch.zeros_like(weight, dtype=torch.float64)
    if len(kept):
        rows = torch.as_tensor(list(kept), device=weight.device)
        result[:, rows] = torch.linalg.solve(gram[rows][:, rows], gram[rows] @ weight.double().T).T
    return result


def elimination(weight: Tensor, gram: Tensor, block: int) -> list[int]:
    """The blocks of `block` inputs in the order in which they can go: each time the one that costs least after a refit.

    Optimal Brain Surgeon by blocks (Hassibi & Stork 1993; Kurtic et al. 2023): the cost of block b is tr(W_b (P_bb)⁻¹ W_bᵀ) with
    P the inverse of the Gram matrix of what is left.
    """
    left = list(range(weight.shape[1] // block))
    inverse, weight, order = torch.linalg.inv(gram), weight.double(), list[int]()
    while left:
        own = inverse.view(len(left), block, len(left), block).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (left, block, block)
        parts = weight.view(len(weight), len(left), block).transpose(0, 1)  # (left, outputs, block)
        costs = (torch.linalg.solve(own, parts.mT) * parts.mT).sum((1, 2))
        place = int(costs.argmin())
        gone = slice(place * block, (place + 1) * block)
        kept = torch.ones(len(inverse), dtype=torch.bool, device=weight.device)
        kept[gone] = False
        step = torch.linalg.solve(inverse[gone, gone], inverse[gone])
        weight = (weight - weight[:, gone] @ step)[:, kept]
        inverse = (inverse - inverse[:, gone] @ step)[kept][:, kept]
        order.append(left.pop(place))
    return order
