"""Forward-mode derivatives: how fast every layer's stream moves along a path of inputs, exact, in one forward.

Decision: a pass of its own without a graph, beside the one that gives the gradients. In one pass the graph would record the
tangents too, for a backward that has no use for them; and fused attention, whose kernels know no forward mode, would have to go
where the model is to run as it is. Here it is taken apart into products, which do.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from layerwise.errors import UserModelError


@contextmanager
def forward_mode(remedy: str = "") -> Iterator[None]:
    """Inside, what is made of a `moving` tensor moves too. Raises `UserModelError` (LW-U74) where an operator has no tangent."""
    try:
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            _read_rules()
            yield
    except UserModelError as error:
        if not isinstance(error.__cause__, NotImplementedError):
            raise
        what = f"An operator of the model has no forward-mode derivative: {str(error.__cause__).splitlines()[0]}"
        raise UserModelError(what, place=error.place, remedy=remedy, code="LW-U74") from error.__cause__


def _read_rules() -> None:
    """torch reads its rules when it makes its first dual number, and warns itself of its own old functions meanwhile."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


def moving(tensor: Tensor, velocity: Tensor) -> Tensor:
    """`tensor`, of which the derivative is `velocity`; for use inside `forward_mode`."""
    return forward_ad.make_dual(tensor, velocity)


def velocity(tensor: Tensor) -> Tensor:
    """The derivative of `tensor` inside `forward_mode`, of its shape; zeros where nothing that moves went into it."""
    tangent = forward_ad.unpack_dual(tensor).tangent
    return torch.zeros_like(tensor) if tangent is None else tangent.detach().clone()
