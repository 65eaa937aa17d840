"""One module's parameter gradients for each sample, from what went in and the gradient of what came out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from layerwise import trees

Gradients = dict[str, Tensor]  # parameter name → (samples, *shape)
CHUNK = 1 << 26  # elements (256 MB) that an unfolded convolution input may take at once


def module_gradients(
    module: nn.Module, parameters: Mapping[str, Tensor], saved: Any, gradient: Tensor, samples: int
) -> Gradients | None:
    """Gradients of `parameters` (owned by `module`) for each of `samples`, or None where they cannot be told apart.

    `saved` is (args, kwargs) of the call; rows of the first dimension belong to the samples in order, any number each.
    """
    if not gradient.dim() or gradient.shape[0] % samples:
        return None
    closed = CLOSED_FORMS.get(type(module).forward)
    inputs = [t for _, t in trees.tensors(saved)]
    if closed is not None and len(inputs) == 1 and inputs[0].shape[0] == gradient.shape[0]:
        found = closed(module, inputs[0], gradient, samples)
        if found is not None and parameters.keys() <= found.keys():
            return {name: found[name] for name in parameters}
    return _by_vmap(module, parameters, saved, gradient, samples)


def _linear(module: nn.Linear, x: Tensor, gradient: Tensor, samples: int) -> Gradients:
    """x (rows, …, in), gradient (rows, …, out) → weight (samples, out, in), bias (samples, out)."""
    a = x.reshape(samples, -1, x.shape[-1])
    g = gradient.reshape(samples, -1, gradient.shape[-1])
    return {"weight": torch.bmm(g.transpose(1, 2), a.to(g.dtype)), "bias": g.sum(1)}


def _convolution(module: nn.Conv1d | nn.Conv2d, x: Tensor, gradient: Tensor, samples: int) -> Gradients | None:
    """x (rows, C, …), gradient (rows, O, …) → weight (samples, O, C/groups, …), bias (samples, O)."""
    if module.padding_mode != "zeros" or isinstance(module.padding, str) or x.dim() != module.weight.dim():
        return None
    if isinstance(module, nn.Conv1d):  # a 2-D convolution of height 1
        x, gradient = x.unsqueeze(2), gradient.unsqueeze(2)
    rows = x.shape[0] // samples
    size = math.prod(module.weight.shape[2:]) * x[0].numel() * rows
    step = max(CHUNK // max(size, 1), 1)
    parts = [
        _unfolded(module, x[n * rows : (n + step) * rows], gradient[n * rows : (n + step) * rows], rows)
        for n in range(0, samples, step)
    ]
    bias = gradient.reshape(samples, rows, gradient.shape[1], -1).sum((1, 3))
    return {"weight": torch.cat(parts), "bias": bias}


def _unfolded(module: nn.Conv1d | nn.Conv2d, x: Tensor, gradient: Tensor, rows: int) -> Tensor:
    pad = (0,) * (2 - len(module.kernel_size))
    one = (1,) * (2 - len(module.kernel_size))
    columns = F.unfold(
        x,
        one + module.kernel_size,
        dilation=one + module.dilation,
        padding=pad + tuple(int(p) for p in module.padding),  # a string was refused above
        stride=one + module.stride,
    )
    groups, count = module.groups, x.shape[0] // rows
    columns = columns.reshape(count, rows, groups, -1, columns.shape[-1])
    outputs = gradient.reshape(count, rows, groups, module.out_channels // groups, -1)
    weight = torch.einsum("nrgol,nrgkl->ngok", outputs, columns)
    return weight.reshape(count, *module.weight.shape)


CLOSED_FORMS: dict[Any, Callable[..., Gradients | None]] = {
    nn.Linear.forward: _linear,
    nn.Conv1d.forward: _convolution,
    nn.Conv2d.forward: _convolution,
}


class _Forward(nn.Module):
    """Calls the module's forward without its hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        output = self.module.forward(*args, **kwargs)
        return next(t for _, t in trees.tensors(output) if t.is_floating_point())


def _by_vmap(module: nn.Module, parameters: Mapping[str, Tensor], saved: Any, gradient: Tensor, samples: int) -> Gradients | None:
    """Any module by itself. Inputs with as many rows as the output are split by samples, others are shared by all."""
    found = list(trees.tensors(saved))
    split = [bool(t.dim()) and t.shape[0] == gradient.shape[0] for _, t in found]
    if not any(split):
        return None
    tensors = [_by_sample(t, samples) if s else t for (_, t), s in zip(found, split, strict=True)]
    wrapper = _Forward(module)
    own = {f"module.{name}": p.detach() for name, p in parameters.items()}

    def one(g: Tensor, *parts: Tensor) -> Gradients:
        args, kwargs = saved
        for (path, _), part in zip(found, parts, strict=True):
            args, kwargs = trees.replaced((args, kwargs), path, part)
        pull = vjp(lambda p: functional_call(wrapper, p, args, kwargs), own)[1]
        return pull(g)[0]

    try:
        dims = (0, *(0 if s else None for s in split))
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no batching rule: vmap would loop over them
            by_name = vmap(one, in_dims=dims)(_by_sample(gradient, samples), *tensors)
    except Exception:  # the module's own code, on parts of what it was given: whatever it objects to, the loop does
        return None
    return {name: by_name[f"module.{name}"] for name in parameters}


def _by_sample(tensor: Tensor, samples: int) -> Tensor:
    return tensor.reshape(samples, tensor.shape[0] // samples, *tensor.shape[1:])
