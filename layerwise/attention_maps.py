"""What each layer's attention looked at, seen beside the model's own computation, whose bits stay as they are.

Fused attention never forms its map, and switching it off would change the numbers. So the calls are watched: a torch function
mode sees ``scaled_dot_product_attention``, whoever calls it under whatever name, lets it run as it is, and hands on query, key,
mask and scale, from which the map is computed again, a block of rows at a time, for those who reduce it at once. Attention
written out is seen by its softmax over the last dimension of a tensor (samples, heads, queries, keys).
``F.multi_head_attention_forward`` is one function to the mode, so the two are exchanged inside it for as long as it runs. Every
call belongs to the layer that was running.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from layerwise.structure import Layer

# A bias this low leaves a weight of exactly 0 in every float type: lowest values, −inf and the older habit of −10000 alike.
MASKED = -9000.0
BLOCK = 2**22  # entries of a map that are formed at a time
SOFTMAXES = (F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax)


class AttentionCall(ABC):
    """One call: maps of `shape` (rows, heads, queries, keys), where `rows` is a multiple of `samples`, sample by sample.

    `keep` (rows, queries) is False for padding; `first`: the layer has not attended before. `gradient`, that of the call's
    output, is set when the call is handed on in the backward pass.
    """

    shape: tuple[int, int, int, int]
    samples: int
    keep: Tensor
    first: bool
    gradient: Tensor | None = None

    @abstractmethod
    def weights(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The maps of these queries in float64 (rows, heads, queries, keys), and which keys each query may see.

        A query that sees no key has weights 0.
        """

    @abstractmethod
    def slope(self, rows: slice) -> Tensor:
        """The gradient of the loss by these weights, float64."""

    @abstractmethod
    def visible_keys(self) -> Tensor:
        """Which keys any query sees: (rows or 1, keys)."""

    def blocks(self) -> Iterator[slice]:
        """Slices of the queries, small enough for their maps to be formed at once."""
        n, heads, queries, keys = self.shape
        size = max(1, BLOCK // max(n * heads * keys, 1))
        for start in range(0, queries, size):
            yield slice(start, min(start + size, queries))

    def by_sample(self, values: Tensor) -> Tensor:
        """Sums (rows, …) over the rows of each sample."""
        return values.unflatten(0, (self.samples, -1)).sum(1)

    def own_padding(self) -> Tensor:
        """(rows, queries): in attention of a sequence to itself, a position that nobody sees is padding."""
        n, _, queries, keys = self.shape
        seen = self.visible_keys() if queries == keys else torch.ones(1, queries, dtype=torch.bool)
        return seen.expand(n, queries)


class Fused(AttentionCall):
    """A call of ``scaled_dot_product_attention``; see there for the arguments. Grouped keys and values are repeated."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> None:
        self.query, key, value = (_four(t) for t in (query, key, value))
        groups = self.query.shape[1] // key.shape[1]
        self.key, self.value = (t if groups == 1 else t.repeat_interleave(groups, 1) for t in (key, value))
        self.causal = causal
        self.scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        n, heads, queries, _ = self.query.shape
        self.shape = (n, heads, queries, self.key.shape[2])
        self.mask = None if mask is None else _four_mask(mask.detach(), query.shape[:-1])

    def weights(self, rows: slice) -> tuple[Tensor, Tensor]:
        scores = (_wide(self.query[:, :, rows]) @ _wide(self.key).mT).double() * self.scale
        visible = torch.ones(1, 1, scores.shape[2], scores.shape[3], dtype=torch.bool, device=scores.device)
        if self.causal:
            first = torch.arange(rows.start, rows.stop, device=scores.device)[:, None]
            visible = visible & (torch.arange(self.shape[3], device=scores.device) <= first)
        if self.mask is not None:
            mask = self.mask if self.mask.shape[2] == 1 else self.mask[:, :, rows]
            visible = visible & _visible(mask)
            if mask.dtype != torch.bool:
                scores = scores + mask.double()
        # the lowest finite value and not −inf: a row without any key must come out as 0, not as NaN
        weights = scores.masked_fill(~visible, torch.finfo(torch.float64).min).softmax(-1)
        return weights.masked_fill(~visible, 0.0), visible

    def slope(self, rows: slice) -> Tensor:
        assert self.gradient is not None
        return (_wide(_four(self.gradient)[:, :, rows]) @ _wide(self.value).mT).double()

    def visible_keys(self) -> Tensor:
        if self.mask is None:
            return torch.ones(1, self.shape[3], dtype=torch.bool, device=self.query.device)
        return _visible(self.mask).any(2).any(1)


class Explicit(AttentionCall):
    """A softmax: `found` is its result, `scores` what went in (None where that is no longer held)."""

    def __init__(self, found: Tensor, scores: Tensor | None) -> None:
        self.found = found
        self.scores = scores
        self.shape = (found.shape[0], found.shape[1], found.shape[2], found.shape[3])

    def weights(self, rows: slice) -> tuple[Tensor, Tensor]:
        visible = self._visible(rows)
        return self.found[:, :, rows].double().masked_fill(~visible, 0.0), visible

    def _visible(self, rows: slice) -> Tensor:
        return self.found[:, :, rows] > 0 if self.scores is None else _visible(self.scores[:, :, rows])

    def slope(self, rows: slice) -> Tensor:
        assert self.gradient is not None
        return self.gradient[:, :, rows].double()

    def visible_keys(self) -> Tensor:
        return self._visible(slice(None)).any(2).any(1)


def _four(tensor: Tensor) -> Tensor:
    """(…, positions, features) as (rows, heads, positions, features)."""
    return tensor.unsqueeze(1) if tensor.dim() == 3 else tensor.flatten(1, -3)


def _four_mask(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """A mask that broadcasts to (*shape, keys) as (rows or 1, heads or 1, queries or 1, keys)."""
    mask = mask[(None,) * (len(shape) + 1 - mask.dim())]
    if len(shape) == 2:
        return mask.unsqueeze(1)
    return mask if len(shape) == 3 else mask.expand(*shape[:-1], *mask.shape[-2:]).flatten(1, -3)


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _visible(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > MASKED


Emit = Callable[[int, AttentionCall], None]


class _Watch(TorchFunctionMode):
    """Sees every torch function that runs inside, and notes attention."""

    def __init__(self, samples: int, now: Emit | None, later: Emit | None, live: bool = False) -> None:
        super().__init__()
        self.samples, self.now, self.later, self.live = samples, now, later, live
        self.running: list[int] = []
        self.padding: Tensor | None = None  # of the sequence whose attention to itself the running layer began with

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.running:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self.fused(func, *args, **kwargs)
        if func in SOFTMAXES:
            return self.softmax(func, 0, *args, **kwargs)
        if func is F.multi_head_attention_forward:
            with _inside(self, kwargs["num_heads"] if "num_heads" in kwargs else args[4]):
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def fused(self, func: Any, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = func(*args, **kwargs)
        query, key, value, mask, causal, scale = _arguments(*args, **kwargs)
        if not query.is_nested and query.dim() >= 3:
            query, key, value = (self._held(t) for t in (query, key, value))
            call = Fused(query, key, value, mask, causal, scale)
            self._note(call, call, output, lambda gradient: gradient)
        return output

    def softmax(self, func: Any, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        """`heads` is given where they are folded into the rows (rows · heads, queries, keys)."""
        found: Tensor = func(*args, **kwargs)
        scores = kwargs["input"] if "input" in kwargs else args[0]
        dim = kwargs["dim"] if "dim" in kwargs else args[1]
        if dim in (-1, found.dim() - 1) and found.dim() == (3 if heads else 4):

            def split(tensor: Tensor) -> Tensor:
                return tensor.unflatten(0, (-1, heads)) if heads else tensor

            # what went in is not held until the backward pass: the model itself would not hold it
            held = split(self._held(found))
            self._note(Explicit(held, split(self._held(scores))), Explicit(held, None), found, split)
        return found

    def _held(self, tensor: Tensor) -> Tensor:
        return tensor if self.live else tensor.detach()

    def _note(self, first: AttentionCall, second: AttentionCall, output: Tensor, split: Callable[[Tensor], Tensor]) -> None:
        if first.shape[0] % self.samples:
            return  # rows that are not samples: nothing of this can be said per sample
        begins = self.padding is None
        if self.padding is None or self.padding.shape != (first.shape[0], first.shape[2]):
            self.padding = first.own_padding().to(output.device)
        for call in (first, second):
            call.samples, call.keep, call.first = self.samples, self.padding, begins
        layer = self.running[-1]
        if self.now is not None:
            with torch.set_grad_enabled(self.live and torch.is_grad_enabled()):
                self.now(layer, first)
        if self.later is not None and output.requires_grad:
            output.register_hook(lambda gradient: self._backward(layer, second, split(gradient)))

    def _backward(self, layer: int, call: AttentionCall, gradient: Tensor) -> None:
        assert self.later is not None
        call.gradient = gradient.detach()
        with torch.no_grad():
            self.later(layer, call)
        call.gradient = None

    def enter(self, layer: int) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            self.running.append(layer)
            self.padding = None

        return enter

    def leave(self, *_: Any) -> None:
        self.running.pop()


def _arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, bool, float | None]:
    """The signature of ``scaled_dot_product_attention``, without what the values say themselves."""
    return query, key, value, attn_mask, is_causal, scale


@contextmanager
def _inside(watch: _Watch, heads: int) -> Iterator[None]:
    """Sees what ``F.multi_head_attention_forward`` calls: while it runs, the mode itself is off."""
    fused, softmax = F.scaled_dot_product_attention, F.softmax

    def watched_fused(*args: Any, **kwargs: Any) -> Tensor:
        return watch.fused(fused, *args, **kwargs)

    def watched_softmax(*args: Any, **kwargs: Any) -> Tensor:
        return watch.softmax(softmax, heads, *args, **kwargs)

    F.scaled_dot_product_attention, F.softmax = watched_fused, watched_softmax
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.softmax = fused, softmax


def attending(layers: Sequence[Layer]) -> list[Layer]:
    """Those to which attention calls are counted: the blocks; where only units are looked at, attentions that are a module."""
    blocks = [x for x in layers if x.site is None]
    return blocks or [x for x in layers if x.granularity == "sublayer" and x.kind == "attention" and ":" not in x.name]


@contextmanager
def attention_watched(
    layers: Sequence[Layer], samples: int, now: Emit | None, later: Emit | None, *, live: bool = False
) -> Iterator[None]:
    """Inside, each attention call of `layers` is handed to `now` in the forward pass and to `later`, with its gradient, in the
    backward pass. `live`: what `now` gets has its graph, so that a loss can be made of the maps.
    """
    watch = _Watch(samples, now, later, live)
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.module.register_forward_pre_hook(watch.enter(layer.index)).remove)
            stack.callback(layer.module.register_forward_hook(watch.leave).remove)
        stack.enter_context(watch)
        yield
