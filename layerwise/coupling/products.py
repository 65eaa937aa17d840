"""What products do to labels: matrices, batches and groups of them, convolutions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from layerwise.coupling.labels import Layers, along, line, reshaped, unique, varying

if TYPE_CHECKING:
    from layerwise.coupling.labelling import Labelling


def mm(on: Labelling, func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
    a, b = args[:2]
    on.put(result, [layer[0] for layer in on.product(a, b, _batched(on, a), _batched(on, b), (1, *result.shape))])


def bmm(on: Labelling, func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
    on.put(result, on.product(args[0], args[1], on.layers(args[0]), on.layers(args[1]), result.shape))


def addmm(on: Labelling, func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
    (mm if result.dim() == 2 else bmm)(on, func, args[1:3], {}, result)
    on.put(result, on.together([args[0], result], result.shape))


def grouped_mm(on: Labelling, func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
    """Rows times one of several matrices each: what tells these apart is chosen by numbers, the rest is as in one product."""
    rows, stack = args[:2]
    if rows.dim() != 2 or stack.dim() != 3:
        for tensor in (rows, stack):
            on.fix(tensor, "a grouped product in this form is not followed")
        return
    for layer in on.layers(stack):
        if 0 in varying(layer):
            on.labels.fix(layer, "it is chosen by numbers")
    right = [layer.narrow(0, 0, 1) for layer in on.layers(stack) if 0 not in varying(layer)]
    on.put(result, [layer[0] for layer in on.product(rows, stack, _batched(on, rows), right, (1, *result.shape))])


def mv(on: Labelling, func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
    for tensor in args[:2]:
        on.fix(tensor, "a product with a vector takes it")


def linear(on: Labelling, func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
    x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else kwargs.get("bias")
    flat = result.reshape(-1, result.shape[-1])
    left = [reshaped(layer, (1, flat.shape[0], x.shape[-1])) for layer in on.layers(x)]
    right = [layer.t().unsqueeze(0) for layer in on.layers(weight)]
    found = on.product(x, weight, left, right, (1, *flat.shape))
    on.put(result, [reshaped(layer[0], result.shape) for layer in found])
    if bias is not None:
        on.put(result, on.together([bias, result], result.shape))


def _batched(on: Labelling, tensor: Tensor) -> Layers:
    return [layer.unsqueeze(0) for layer in on.layers(tensor)]


def convolution(on: Labelling, func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
    x, weight, bias = args[:3]
    transposed, groups = bool(args[6]), int(args[8])
    flat = [on.labels.unite(layer, [d for d in varying(layer) if d != 1], "a convolution mixes it") for layer in on.layers(x)]
    entering = [line(layer, 1) for layer in flat if 1 in varying(layer)]
    rows, columns = (1, 0) if transposed else (0, 1)
    into = [line(layer, columns) for layer in on.layers(weight) if columns in varying(layer)]
    out = [line(layer, rows) for layer in on.layers(weight) if rows in varying(layer)]
    pure = on.pure(weight) and not on.pure(x)
    if groups == 1:
        on.contract(entering, into, eats=pure)
        if pure:
            on.labels.given += [unique(layer) for layer in out]
    else:
        out = _grouped(on, entering, into, out, groups, (x.shape[1], result.shape[1]), transposed)
    on.put(result, [along(layer, 1, result.shape) for layer in out])
    if bias is not None:
        on.put(result, on.together([result, bias], result.shape, at=1))


def _grouped(
    on: Labelling, entering: Layers, into: Layers, out: Layers, groups: int, sizes: tuple[int, int], transposed: bool
) -> Layers:
    """Whole groups go: what enters one, its rows, and what leaves it. The dimension that all groups share stays."""
    own, shared = (into, out) if transposed else (out, into)  # the dimension of the weight that all groups make up
    for layer in shared:
        on.labels.fix(layer, "all groups of a convolution share it")
    folded = [layer.reshape(groups, -1) for layer in (*entering, *own)]
    whole = [on.labels.unite(layer, [1], "a group of a convolution goes as a whole") for layer in folded]
    if not entering:
        for layer in own:
            on.labels.fix(layer, "a grouped convolution reads channels of fixed size")
        return []
    first = [layer[:, 0] for layer in whole]
    for layer in first[1:]:
        on.labels.meet(first[0], layer, "it meets what stays", both=True)
    return [first[0][:, None].expand(groups, sizes[1] // groups).reshape(-1)]


__all__ = ["addmm", "bmm", "convolution", "grouped_mm", "linear", "mm", "mv"]
