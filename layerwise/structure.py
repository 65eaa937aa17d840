"""A model's layers: what is known of each, and how they are read from the module tree and one traced forward. No model names.

Where they are is found by `layerwise.chains`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from layerwise.chains import Chain, find_layers
from layerwise.data import Batch
from layerwise.errors import ModelError, UserModelError
from layerwise.trace import Call, traced
from layerwise.trees import Path


@dataclass(frozen=True)
class Stream:
    """Where a layer's main tensor enters (key in (args, kwargs)) and leaves (key in the output)."""

    enters: Path
    leaves: Path
    alone: bool  # the output holds no other tensor
    passed: tuple[tuple[Path, Path], ...] = ()  # other tensors it hands on as they came: (leaves, enters)
    gives: tuple[Path, ...] = ()  # where other tensors leave that it computed itself


@dataclass(frozen=True)
class Site:
    """Where a unit's share of the computation can be seen and silenced: a tensor that `module` takes or gives, or a slice of it.

    `path` is the key in (args, kwargs) when the unit is seen as `module` is entered, else in what it gives. `dim`, `start` and
    `stop` cut out the unit's slice; the whole tensor where `stop` is 0.
    """

    module: nn.Module
    path: Path
    entering: bool = False
    dim: int = 0
    start: int = 0
    stop: int = 0

    @property
    def whole(self) -> Site:
        """The site without the slice: equal for all units that are slices of one tensor."""
        return Site(self.module, self.path, self.entering, self.dim) if self.stop else self

    def of(self, tensor: Tensor) -> Tensor:
        """The unit's slice of the site's tensor, a view."""
        return tensor.narrow(self.dim, self.start, self.stop - self.start) if self.stop else tensor


@dataclass(frozen=True, eq=False)
class Share:
    """A parameter of a unit, or the slice of it that is the unit's (the whole where `stop` is 0)."""

    name: str
    parameter: Tensor
    dim: int = 0
    start: int = 0
    stop: int = 0

    @property
    def tensor(self) -> Tensor:
        """The unit's part, a view."""
        return self.parameter.narrow(self.dim, self.start, self.stop - self.start) if self.stop else self.parameter


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer: a block, or a unit inside one (see `layerwise.units`). `name` identifies it in scores, plans and rows.

    A block's name is the dotted path of `module`. A unit has a `site`, the name of its block as `parent`, and in `shares` what
    is its own of the parameters; its `module` may hold more than the unit, and it has no `stream`.
    `skippable`: its output has the shape and type of its input, so the model runs without it; otherwise `reason` says why not.
    `silent` are modules inside that own parameters but were not called themselves (their owner reads the weights directly).
    `group` names the chain it belongs to. `macs` are multiply-accumulates per sample, `shape` that of the traced output.
    """

    name: str
    index: int
    module: nn.Module
    kind: str
    parameters: int
    skippable: bool
    group: str
    reason: str = ""
    stream: Stream | None = None
    calls: int = 1
    macs: int = 0
    shape: tuple[int, ...] = ()
    silent: tuple[nn.Module, ...] = ()
    granularity: str = "block"
    parent: str = ""
    site: Site | None = None
    shares: tuple[Share, ...] = ()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The layer's parameters as (name, tensor), each shared one once; of a unit its share: whole parameters or views."""
        if self.site is None:
            yield from self.module.named_parameters()
        for share in self.shares:
            yield share.name, share.tensor

    @property
    def masked(self) -> bool:
        """Whether it is a slice of its site: a head or a channel, whose gradient is taken through a mask on that slice."""
        return self.site is not None and bool(self.site.stop)

    @property
    def observable(self) -> bool:
        """Whether a tensor of its own can be seen: a stream, or a unit's site."""
        return self.stream is not None or self.site is not None


def read_layers(module: nn.Module, batch: Batch) -> list[Layer]:
    """The layers of `module` in the order in which they run on `batch`.

    Raises `ModelError` (LW-M20) where no layer is found, `UserModelError` (LW-U75) without parameters or if the forward fails.
    """
    if not any(True for _ in module.parameters()):
        raise UserModelError("The model has no parameters.", remedy="There is nothing to rank or compress.", code="LW-U75")
    root = traced(module, batch)
    layers = [_layer(i, chain, calls, batch.answers) for i, (chain, calls) in enumerate(find_layers(root))]
    if not layers:
        raise ModelError("No layers were found: no module with a weight ran.", code="LW-M20")
    return layers


def _layer(index: int, chain: Chain, calls: list[Call], samples: int) -> Layer:
    first = calls[0]
    stream, reason = _stream(calls)
    return Layer(
        name=first.name,
        index=index,
        module=first.module,
        kind=_kind(first),
        parameters=first.parameters,
        skippable=not reason,
        group=chain.group,
        reason=reason,
        stream=stream,
        calls=len(calls),
        macs=sum(c.macs for c in calls) // max(samples, 1),
        shape=first.out_shape,
        silent=_silent(first),
    )


def _silent(call: Call) -> tuple[nn.Module, ...]:
    called = {c.module for c in call.walk()}
    return tuple(m for m in call.module.modules() if m not in called and any(True for _ in m.parameters(recurse=False)))


def _stream(calls: Sequence[Call]) -> tuple[Stream | None, str]:
    """The main tensor's way through the layer, and why it cannot be skipped ('' if it can)."""
    first = calls[0]
    floats = [(path, shape, dtype) for path, shape, _, dtype in first.inputs if dtype.is_floating_point]
    outputs = [(path, shape, dtype) for path, shape, _, dtype in first.outputs if dtype.is_floating_point]
    if not floats or not outputs:
        return None, "takes or gives no floating-point tensor"
    leaves, shape, dtype = outputs[0]
    same = [path for path, s, d in floats if s == shape and d == dtype]
    stream = Stream(same[0] if same else floats[0][0], leaves, len(first.outputs) == 1, *_others(calls, leaves))
    if not same:
        return stream, f"input {floats[0][1]} and output {shape} differ in shape"
    for call in calls[1:]:
        shapes = {path: s for path, s, _, _ in call.inputs}
        if shapes.get(stream.enters) != call.out_shape:
            return stream, "a later call of this shared layer changes the shape"
    return stream, ""


def _others(calls: Sequence[Call], leaves: Path) -> tuple[tuple[tuple[Path, Path], ...], tuple[Path, ...]]:
    """Of the tensors besides the main one: those handed on unchanged in every call (leaves, enters), and the computed ones."""
    handed = [
        {(out, into) for out, _, a, _ in call.outputs for into, _, b, _ in call.inputs if a == b and out != leaves}
        for call in calls
    ]
    same = dict(sorted(set.intersection(*handed), key=str))
    own = tuple(path for path, _, _, _ in calls[0].outputs if path != leaves and path not in same)
    return tuple(same.items()), own


def _kind(call: Call) -> str:
    """From the operators that ran inside, not from class names."""
    ops = call.operators
    if any("scaled_dot_product" in op or "softmax" in op for op in ops):
        return "attention"
    if any("lstm" in op or "gru" in op or "rnn" in op for op in ops) or _recurs(call):
        return "recurrent"
    if any("convolution" in op for op in ops):
        return "convolution"
    if call.matrices > 1:
        return "mlp"
    return "linear" if call.matrices else "other"


def _recurs(call: Call) -> bool:
    """Holds one of torch's own recurrent nets, which mostly dissolve into plain matrix products."""
    return any(isinstance(inner.module, nn.RNNBase | nn.RNNCellBase) for inner in call.walk())


def coverage(module: nn.Module, layers: Sequence[Layer]) -> float:
    """The layers' share of all parameters, 0 … 1, each shared parameter counted once."""
    total = {id(p): p.numel() for p in module.parameters()}
    inside = {id(p): p.numel() for layer in layers for p in layer.module.parameters()}
    return sum(n for key, n in inside.items() if key in total) / max(sum(total.values()), 1)


def outside(module: nn.Module, layers: Sequence[Layer]) -> list[tuple[str, Tensor]]:
    """Named parameters that belong to no layer (embeddings, heads, norms between stages)."""
    inside = {id(p) for layer in layers for p in layer.module.parameters()}
    return [(name, p) for name, p in module.named_parameters() if id(p) not in inside]


__all__ = ["Layer", "Share", "Site", "Stream", "coverage", "outside", "read_layers"]
