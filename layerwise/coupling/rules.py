"""What each operator does to labels. No model is named here: an operator that is not known fixes what enters it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerwise import trees
from layerwise.coupling.labels import along, compact, line, reshaped, unique, varying
from layerwise.coupling.products import addmm, bmm, convolution, grouped_mm, linear, mm, mv

if TYPE_CHECKING:
    from layerwise.coupling.labelling import Labelling

Rule = Callable[["Labelling", Any, Any, Any, Any], None]

# what moves elements: done to the labels as it is done to the tensor
MOVES = frozenset({
    "permute", "transpose", "t", "expand", "squeeze", "unsqueeze", "select", "slice", "split", "split_with_sizes",
    "chunk", "unbind", "flip", "roll", "narrow", "unfold", "diagonal", "movedim", "swapaxes", "repeat", "tile",
    "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "unsafe_split", "unsafe_chunk",
    "rot90", "numpy_T",
})  # fmt: skip
SHAPES = frozenset({"view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten"})
SAME = frozenset({
    "clone", "contiguous", "_to_copy", "alias", "detach", "lift_fresh", "lift", "tril", "triu", "dropout",
    "native_dropout", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "_conj",
    "resolve_conj", "_pin_memory", "bernoulli", "masked_fill", "clamp", "clamp_min", "clamp_max", "gelu", "hardtanh",
    "leaky_relu", "elu", "celu", "softplus", "nan_to_num", "_assert_tensor_metadata", "hardswish", "hardsigmoid",
    "silu", "mish", "relu", "relu6", "selu", "log_sigmoid_forward", "threshold", "hardshrink", "softshrink",
})  # fmt: skip
POINTWISE = frozenset(
    {"where", "add", "sub", "mul", "div", "addcmul", "addcdiv", "lerp", "maximum", "minimum", "pow", "prelu", "_prelu_kernel"}
)
REDUCE = frozenset({
    "mean", "sum", "amax", "amin", "var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm", "prod", "max", "min",
    "logsumexp", "argmax", "argmin", "any", "all", "nansum", "median",
})  # fmt: skip
ALONG = frozenset(
    {"softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp", "sort", "topk", "_safe_softmax"}
)
FEW = 4  # numbers that a program writes out, such as [-1] for the last head
RESIZES = ("pool", "upsample", "grid_sampler", "reflection_pad", "replication_pad")
BLANK = frozenset({"zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "scalar_tensor"})
IGNORED = frozenset(
    {"sym_size", "sym_numel", "is_same_size", "equal", "_local_scalar_dense", "_has_compatible_shallow_copy_type"}
)


def rule_of(func: Any) -> Rule:
    """By the operator's name without namespace and the underscore of in-place forms, then by its tags."""
    name = func._schema.name.split("::")[-1]
    plain = name if name in RULES or name in SAME | MOVES | SHAPES | REDUCE | ALONG else name.rstrip("_")
    if plain in RULES:
        return RULES[plain]
    for names, rule in (
        (SHAPES, _shape),
        (MOVES, _move),
        (SAME, _same),
        (REDUCE, _reduce),
        (ALONG, _mix_along),
        (POINTWISE, pointwise),
    ):
        if plain in names:
            return rule
    if plain in IGNORED:
        return _ignore
    if any(word in plain for word in RESIZES):
        return _resize
    return pointwise if torch.Tag.pointwise in func.tags else _unknown


def made(func: Any) -> bool:
    """Whether the operator makes a tensor of one value, whose size the model gives in numbers."""
    return func._schema.name.split("::")[-1] in BLANK


def _ignore(on: Labelling, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    """What gives no tensor whose size follows."""


def _unknown(on: Labelling, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    name = func._schema.name.split("::")[-1]
    for _, tensor in trees.tensors((args, kwargs)):
        on.fix(tensor, f"the operator {name} is not followed")


def _shape(on: Labelling, func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
    on.put(result, [reshaped(layer, result.shape) for layer in on.layers(args[0])], moved=args[0])


def _move(on: Labelling, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    for layer in on.layers(args[0]):
        found = func(layer, *args[1:], **kwargs)
        for one, tensor in zip(_several(found), _several(result), strict=True):
            on.add(tensor, one, moved=args[0])
    for tensor in _several(result):
        on.settle(tensor, moved=args[0])


def _same(on: Labelling, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    for tensor in _several(result):
        if tensor.shape == args[0].shape:
            on.put(tensor, on.layers(args[0]), moved=args[0])


def pointwise(on: Labelling, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    operands = [t for _, t in trees.tensors((args, kwargs))]
    for tensor in _several(result):
        on.put(tensor, on.together(operands, tensor.shape), pure=all(on.pure(t) for t in operands))


def _reduce(on: Labelling, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    x = args[0]
    if len(args) > 1 and isinstance(args[1], Tensor):  # max and min of two tensors
        return pointwise(on, func, args, kwargs, result)
    given = _named(func, args, kwargs, "dim")
    dims = range(x.dim()) if given is None or given == [] else [given] if isinstance(given, int) else given
    dims = sorted({d % x.dim() for d in dims}) if x.dim() else []
    for tensor in _several(result):
        for layer in on.layers(x):
            left = on.labels.unite(layer, dims, f"{_name(func)} mixes it")
            for dim in reversed(dims):
                left = left.narrow(dim, 0, 1)
                left = left if tensor.dim() == x.dim() else left.squeeze(dim)
            if left.dim() == tensor.dim():
                on.add(tensor, left.expand(tensor.shape))
        on.settle(tensor)
    return None


def _mix_along(on: Labelling, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    dim = _named(func, args, kwargs, "dim")
    dim = (-1 if dim is None else dim) % max(args[0].dim(), 1)
    for tensor in _several(result):
        found = [on.labels.unite(layer, [dim], f"{_name(func)} mixes it") for layer in on.layers(args[0])]
        on.put(tensor, [layer.narrow(dim, 0, 1).expand(tensor.shape) for layer in found])


def _layer_norm(on: Labelling, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    x, weights = args[0], [t for _, t in trees.tensors((args[1:], kwargs))]
    dims = range(x.dim() - len(args[1]), x.dim())
    tensor = _several(result)[0]
    on.put(tensor, [on.labels.unite(layer, dims, "a norm mixes it") for layer in on.layers(x)])
    on.put(tensor, on.together([tensor, *weights], tensor.shape))


def _batch_norm(on: Labelling, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    x, tensor = args[0], _several(result)[0]
    vectors = [t for t in args[1:5] if isinstance(t, Tensor)]
    counted = len(args) > 5 and args[5] is True  # its statistics are of what it is given: of a weight that it standardizes, say
    mixed = [d for d in range(x.dim()) if d != 1] if counted else []
    on.put(tensor, [on.labels.unite(layer, mixed, "a norm mixes it") for layer in on.layers(x)])
    on.put(tensor, on.together([tensor, *vectors], tensor.shape, at=1))


def _group_norm(on: Labelling, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    x, tensor, groups = args[0], _several(result)[0], args[6]
    layers = []
    for layer in on.layers(x):
        flat = on.labels.unite(layer, [d for d in varying(layer) if d > 1], "a norm mixes it")
        if 1 in varying(flat):
            folded = line(flat, 1).reshape(groups, -1)
            flat = along(on.labels.unite(folded, [1], "a norm mixes it").reshape(-1), 1, tensor.shape)
        layers.append(flat)
    on.put(tensor, layers)
    on.put(tensor, on.together([tensor, *[t for t in args[1:3] if isinstance(t, Tensor)]], tensor.shape, at=1))


def _resize(on: Labelling, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    x = args[0]
    for tensor in _several(result):
        other = {d for d in range(x.dim()) if x.shape[d] != tensor.shape[d]} | set(range(2, x.dim()))
        for layer in on.layers(x):
            left = on.labels.unite(layer, other, f"{_name(func)} mixes it")
            for dim in other:
                left = left.narrow(dim, 0, 1)
            on.add(tensor, left.expand(tensor.shape))
        on.settle(tensor)


def _pad(on: Labelling, func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
    """What is padded is of fixed size; a dimension without labels may grow as it likes."""
    widths = args[1]
    padded = {args[0].dim() - 1 - i // 2 for i, w in enumerate(widths) if w}
    for layer in on.layers(args[0]):
        if padded & set(varying(layer)):
            on.add(result, compact(torch.constant_pad_nd(layer, widths, 0)))
        else:
            for dim in padded:
                layer = layer.narrow(dim, 0, 1)
            on.add(result, layer.expand(result.shape))
    on.settle(result)


def _cat(on: Labelling, func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
    tensors = [t for t in args[0] if t.numel()]
    dim = _named(func, args, kwargs, "dim") or 0
    if _name(func) == "stack":
        dim %= result.dim()
        layered = [[layer.unsqueeze(dim) for layer in on.layers(t)] for t in tensors]
        sizes = [1] * len(tensors)
    else:
        dim %= result.dim()
        layered = [on.layers(t) for t in tensors]
        sizes = [t.shape[dim] for t in tensors]
    crossing = [[layer for layer in layers if set(varying(layer)) - {dim} or not varying(layer)] for layers in layered]
    rows = [[layer for layer in layers if varying(layer) == [dim]] for layers in layered]
    if any(rows):
        parts = []
        for layers, size in zip(rows, sizes, strict=True):
            for other in layers[1:]:
                on.labels.meet(layers[0], other, "it meets what stays")
            own = layers[0] if layers else torch.zeros(1, dtype=torch.int32)
            parts.append(line(own, dim) if layers else own.expand(size))
        on.add(result, along(torch.cat(parts), dim, result.shape))
    if any(crossing):
        shape = [*result.shape]
        parts_ = []
        for layers, size in zip(crossing, sizes, strict=True):
            shape[dim] = size
            parts_.append([layer.expand(shape) for layer in layers])
        if any(dim in varying(layer) for layers in parts_ for layer in layers):
            blank = [
                torch.zeros((), dtype=torch.int32).expand([*result.shape[:dim], size, *result.shape[dim + 1 :]]) for size in sizes
            ]
            on.add(result, compact(torch.cat([p[0] if p else b for p, b in zip(parts_, blank, strict=True)], dim)))
        else:
            first = [[layer.narrow(dim, 0, 1) for layer in layers] for layers in parts_]
            for layer in on.joined(first, [{d for d in range(result.dim()) if d != dim}] * len(first)):
                on.add(result, layer.expand(result.shape))
    on.settle(result)


def _embedding(on: Labelling, func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
    table = args[0]
    for layer in on.layers(table):
        if 1 in varying(layer):
            on.labels.given.append(unique(layer))
            on.add(result, along(line(layer, 1), result.dim() - 1, result.shape))
        else:
            on.labels.fix(layer, "it numbers what a table is asked for")


def _index(on: Labelling, func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
    indices = args[1]
    dims: set[int] = set()
    at = 0
    for index in indices:
        wide = index.dim() if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) else 1
        few = isinstance(index, Tensor) and wide == 1 and index.dim() == 1 and index.numel() <= FEW and index.dtype != torch.bool
        dims |= set(range(at, at + wide)) if isinstance(index, Tensor) and not few else set()
        at += wide
    for layer in on.layers(args[0]):
        own = on.labels.unite(layer, dims, "it is looked up by numbers")
        on.add(result, compact(func(own, indices)))
    on.settle(result)


def _pick(on: Labelling, func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
    """index_select and gather: along one dimension by numbers."""
    dim = args[1] % args[0].dim()
    for layer in on.layers(args[0]):
        own = on.labels.unite(layer, [dim], "it is looked up by numbers")
        own = own.narrow(dim, 0, 1)
        fits = all(a in (1, b) for a, b in zip(own.shape, result.shape, strict=True))
        on.add(result, own.expand(result.shape) if fits else compact(func(own.expand(layer.shape).contiguous(), *args[1:])))
    on.settle(result)


def _scatter(on: Labelling, func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
    """index_add, scatter and the like: `args` are (x, dim, index, source)."""
    x, dim = args[0], args[1] % args[0].dim()
    source = args[3] if len(args) > 3 and isinstance(args[3], Tensor) else kwargs.get("source", x)
    parts, sizes = [], []
    for tensor in (x, source):
        found = [on.labels.unite(layer, [dim], "it is looked up by numbers") for layer in on.layers(tensor)]
        parts.append([layer.narrow(dim, 0, 1) for layer in found])
        blank = on.blanks.get(tensor, frozenset())
        sizes.append({d for d in range(x.dim()) if d != dim and tensor.shape[d] > 1} - blank)
    on.put(result, [layer.expand(result.shape) for layer in on.joined(parts, sizes)])


def _complex(on: Labelling, func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
    last = args[0].dim() - 1
    found = [on.labels.unite(layer, [last], "complex numbers are made of it") for layer in on.layers(args[0])]
    on.put(result, [layer.select(-1, 0) for layer in found])


def _real(on: Labelling, func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
    on.put(result, [layer.unsqueeze(-1).expand(result.shape) for layer in on.layers(args[0])])


def _fft(on: Labelling, func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
    for layer in on.layers(args[0]):
        own = on.labels.unite(layer, [d % layer.dim() for d in args[1]], "a Fourier transform mixes it")
        for dim in args[1]:
            own = own.narrow(dim, 0, 1)
        on.add(result, own.expand(result.shape))
    on.settle(result)


def _copy(on: Labelling, func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
    """``x.copy_(y)``: what is written into a part of something else stays in place."""
    target, source = args[:2]
    if target.numel() == target.untyped_storage().nbytes() // max(target.element_size(), 1):
        on.put(target, [layer.expand(target.shape) for layer in on.layers(source)])
    else:
        on.put(target, on.together([target, source], target.shape))


def _im2col(on: Labelling, func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
    kernel = args[1][0] * args[1][1]
    for layer in on.layers(args[0]):
        flat = on.labels.unite(layer, [d for d in varying(layer) if d != layer.dim() - 3], "windows mix it")
        repeated = line(flat, -3)[:, None].expand(-1, kernel).reshape(-1)
        on.add(result, along(repeated, result.dim() - 2, result.shape))
    on.settle(result)


RULES: dict[str, Rule] = {
    "native_layer_norm": _layer_norm, "layer_norm": _layer_norm, "rms_norm": _layer_norm,
    "_fused_rms_norm": _layer_norm, "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm, "batch_norm": _batch_norm,
    "_native_batch_norm_legit": _batch_norm, "cudnn_batch_norm": _batch_norm, "native_group_norm": _group_norm,
    "constant_pad_nd": _pad, "cat": _cat, "stack": _cat, "embedding": _embedding, "index": _index,
    "_unsafe_index": _index, "index_select": _pick, "gather": _pick, "index_add": _scatter, "scatter": _scatter,
    "scatter_add": _scatter, "index_copy": _scatter, "scatter_reduce": _scatter, "mm": mm, "bmm": bmm,
    "addmm": addmm, "baddbmm": addmm, "linear": linear, "_grouped_mm": grouped_mm, "mv": mv, "dot": mv, "addmv": mv,
    "convolution": convolution, "_convolution": convolution, "view_as_complex": _complex, "view_as_real": _real,
    "_fft_r2c": _fft, "_fft_c2c": _fft, "_fft_c2r": _fft, "copy_": _copy, "im2col": _im2col,
}  # fmt: skip


def _several(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for t in result if isinstance(t, Tensor)] if isinstance(result, tuple | list) else []


def _name(func: Any) -> str:
    return func._schema.name.split("::")[-1].strip("_")


def _named(func: Any, args: Any, kwargs: Any, name: str) -> Any:
    """The argument of an operator by its name in the schema; None if it is not given."""
    if name in kwargs:
        return kwargs[name]
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == name and position < len(args):
            return args[position]
    return None
