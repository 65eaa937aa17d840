"""`Walk`: one batch for a statistic that runs the model itself, on inputs that the data does not hold.

Path integrals, corruptions and Jacobian products cannot share the sweep's pass. They get the batch, a seed and the counter to
which every forward and backward they make is added.

Decision: continuous inputs are changed where they enter the model. Models that read numbers of tokens are changed in the streams
that enter their first layers, that is in the embeddings: those streams that no other layer feeds (an encoder's and a decoder's).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from layerwise import trees
from layerwise.counts import Counts
from layerwise.data import Batch
from layerwise.errors import UsageError, nearest
from layerwise.model import UniversalModel
from layerwise.structure import Layer
from layerwise.sweep import Seen, copied, frozen, watched
from layerwise.trace import evaluating, run, unfused

Change = Callable[[Tensor], Tensor]
At = Literal["auto", "inputs", "stream"]
PLACES = ("auto", "inputs", "stream")


@dataclass(frozen=True)
class Walk:
    """The `batch` is on the model's device; `seed` is this batch's own; `ids` number its samples in the data set."""

    model: UniversalModel
    batch: Batch
    seed: int
    ids: Tensor
    counts: Counts

    def generator(self) -> torch.Generator:
        """A fresh CPU generator, the same at every call."""
        return torch.Generator().manual_seed(self.seed)

    def forward(
        self,
        batch: Batch,
        *,
        graph: bool = False,
        changes: Mapping[int, Change] | None = None,
        cut: Sequence[Layer] = (),
        keep: Change = copied,
    ) -> Seen:
        """One forward; `changes` (index of a block → function) are made to the streams that enter blocks.

        With `graph`, `backward` may follow: parameters do not require gradients, each layer's stream does. It goes no further
        than to what leaves the blocks in `cut`. What is seen is what `keep` makes of it.
        """
        self.counts.forwards += 1
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model.module))
            stack.enter_context(unfused())
            stack.enter_context(torch.set_grad_enabled(graph))
            stack.enter_context(frozen(self.model.module))
            stack.enter_context(entering_changed(self.model.blocks, changes or {}))
            seen = stack.enter_context(watched(self.model, batch, graph, keep))
            stack.enter_context(cut_before(cut))
            seen.output = batch.by_sample(self.model.read(run(self.model.module, batch)))
        return seen

    def backward(self, seen: Seen, values: Tensor, *, again: bool = False) -> None:
        """Fills `seen.gradients` with those of ``values.sum()``; where nothing reaches `values` they stay None."""
        if values.requires_grad:
            values.sum().backward(retain_graph=again)
            self.counts.backwards += 1
            seen.settle()

    def embedded(self) -> list[Layer]:
        """The blocks whose stream no other block feeds (costs a forward)."""
        with fed_by_none(self.model.blocks) as found:
            self.forward(self.batch, graph=True)
        return found


@contextmanager
def entering_changed(layers: Sequence[Layer], changes: Mapping[int, Change]) -> Iterator[None]:
    """Inside, for one forward, the stream that enters each of these layers is changed (at the first call of a shared one)."""
    done: set[int] = set()

    def hook(layer: Layer) -> Any:
        assert layer.stream is not None, layer.name
        path = layer.stream.enters

        def change(module: Any, args: Any, kwargs: Any) -> Any:
            if layer.index in done:
                return None
            done.add(layer.index)
            return trees.replaced((args, kwargs), path, changes[layer.index](trees.get((args, kwargs), path)))

        return change

    with ExitStack() as stack:
        for layer in layers:
            if layer.index in changes:
                stack.callback(layer.module.register_forward_pre_hook(hook(layer), with_kwargs=True).remove)
        yield


@contextmanager
def fed_by_none(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    """Fills the list while a forward with `graph` runs: a stream that needs no gradient yet comes from no block. Now it does."""
    found: list[Layer] = []
    met: set[int] = set()

    def hook(layer: Layer) -> Any:
        assert layer.stream is not None
        path = layer.stream.enters

        def note(module: Any, args: Any, kwargs: Any) -> Any:
            stream, first = trees.get((args, kwargs), path), layer.index not in met
            met.add(layer.index)
            if not first or stream.requires_grad:
                return None
            found.append(layer)
            return trees.replaced((args, kwargs), path, stream.detach().requires_grad_().clone())

        return note

    with ExitStack() as stack:
        for layer in layers:
            if layer.stream is not None:
                stack.callback(layer.module.register_forward_pre_hook(hook(layer), with_kwargs=True).remove)
        yield found


@contextmanager
def cut_before(layers: Sequence[Layer]) -> Iterator[None]:
    """Inside, these blocks compute without a graph, which begins at what leaves them. To be entered after `watched`."""

    def entering(layer: Layer) -> Any:
        assert layer.stream is not None
        path = layer.stream.enters
        return lambda module, args, kwargs: trees.replaced((args, kwargs), path, trees.get((args, kwargs), path).detach())

    def leaving(layer: Layer) -> Any:
        assert layer.stream is not None
        path = layer.stream.leaves

        def begin(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            stream = trees.get(output, path)
            # cloned, so that what works in place does not meet a leaf
            return None if stream.requires_grad else trees.replaced(output, path, stream.detach().requires_grad_().clone())

        return begin

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.module.register_forward_pre_hook(entering(layer), with_kwargs=True).remove)
            hook = layer.module.register_forward_hook(leaving(layer), with_kwargs=True, prepend=True)
            stack.callback(hook.remove)
        yield


def place_of(at: str, batch: Batch) -> Literal["inputs", "stream"]:
    """Where `batch` is changed: at its inputs if all are continuous, else in the streams that enter the first layers.

    Raises `UsageError` for inputs that are asked for and are not continuous.
    """
    paths = list(_inputs(batch))
    continuous = [path for path, tensor in paths if tensor.is_floating_point()]
    if at == "inputs" and not continuous:
        raise UsageError("The inputs are numbers of tokens, which cannot be interpolated.", remedy="Use at='stream'.")
    if at == "auto":
        return "inputs" if continuous and len(continuous) == len(paths) else "stream"
    return "inputs" if at == "inputs" else "stream"


def inputs_changed(batch: Batch, change: Change) -> Batch:
    """A copy with `change` made to each continuous input, masks and labels apart."""
    tree: Any = (batch.args, dict(batch.kwargs))
    for path, tensor in _inputs(batch):
        if tensor.is_floating_point():
            tree = trees.replaced(tree, path, change(tensor))
    return replace(batch, args=tree[0], kwargs=tree[1])


def _inputs(batch: Batch) -> Iterator[tuple[trees.Path, Tensor]]:
    """Tensors with one row per sample, masks apart."""
    size = batch.size
    for path, tensor in trees.tensors((batch.args, dict(batch.kwargs))):
        if tensor.dim() and tensor.shape[0] == size and not str(path[-1]).endswith("mask"):
            yield path, tensor


def sample_losses(model: UniversalModel, output: Tensor, batch: Batch, reference: Tensor) -> tuple[Tensor, Tensor]:
    """The task's loss per sample in nats and its weights, each (samples,); `reference` is the unchanged model's own output."""
    assert model.task is not None  # settled before the first batch
    values, weights = model.task.losses(output, batch, reference)
    return values.reshape(len(values), -1).sum(1), weights.reshape(len(weights), -1).sum(1)


def one_of(setting: str, value: str, known: Sequence[str], method: str) -> None:
    """Raises `UsageError` with the nearest name when `value` is not known."""
    if value not in known:
        raise UsageError(f"Unknown {setting} {value!r} of {method}.", remedy=nearest(value, known))
