"""The sweep: one instrumented forward (and backward) pass over a batch that feeds every observing statistic.

The loss is a SUM over samples and is reduced here once, so that each sample's gradient is its own whatever the batch size. The
parameters do not require gradients meanwhile: the backward pass computes only what flows through activations, and per-sample
parameter gradients are formed at each module from its input and output gradient (`layerwise.sample_gradients`).
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from layerwise import trees
from layerwise.analyzer import Signal, Statistic
from layerwise.attention_maps import AttentionCall, Emit, attending, attention_watched
from layerwise.counts import Counts
from layerwise.data import Batch
from layerwise.errors import UserModelError
from layerwise.model import UniversalModel
from layerwise.sample_gradients import SampleGradients
from layerwise.structure import Layer, Site
from layerwise.trace import evaluating, run, unfused


@dataclass(eq=False)
class Glimpse:
    """A site's tensor in one call of its module, and its gradient once the backward pass has come by."""

    tensor: Tensor
    gradient: Tensor | None = None


@dataclass
class Seen:
    """One batch as the sweep saw it; lists are indexed by layer. `gradients` are of the summed loss; None where none flowed.

    What enters a layer and what left the one before may be one tensor: nobody writes into either.
    """

    layers: Sequence[Layer]
    batch: Batch
    entering: list[Tensor | None]
    leaving: list[Tensor | None]
    gradients: list[Tensor | None]
    output: Tensor | None = None
    ids: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # each sample's number in the data set
    sites: dict[Site, list[Glimpse]] = field(default_factory=dict)  # of units: whole sites, one glimpse per call

    def complete(self, layer: Layer) -> bool:
        """Whether the layer's stream was seen with one row per sample. Windows folded into the batch, say, are not."""
        entering, leaving = self.entering[layer.index], self.leaving[layer.index]
        rows = self.batch.size
        if layer.site is not None:
            return leaving is not None and leaving.shape[0] == rows
        return entering is not None and leaving is not None and entering.shape[0] == rows == leaving.shape[0]

    def branch(self, layer: Layer) -> Tensor | None:
        """What the layer adds to its stream: leaving − entering where it keeps the shape, else what leaves; None if unseen.

        Of a unit inside a block it is what is seen at its site, a view.
        """
        entering, leaving = self.entering[layer.index], self.leaving[layer.index]
        if layer.site is not None:
            return leaving
        if entering is None or leaving is None:
            return None
        return leaving - entering if layer.skippable else leaving

    def mask_gradients(self) -> Iterator[tuple[Sequence[Layer], Tensor]]:
        """For the units of each site: the units, and d loss / d mask at mask 1 for each sample, (samples, units), float64.

        A mask multiplies what is seen at a unit's site: 1 leaves it, 0 silences it, so the derivative is ⟨gradient, tensor⟩,
        summed over the calls of a shared block. Sites that no gradient reached or whose rows are not samples are left out.
        """
        for site, units in _by_site(self.layers).items():
            glimpses = [(g.tensor, g.gradient) for g in self.sites.get(site, ())]
            if not glimpses or any(gradient is None for _, gradient in glimpses):
                continue
            totals = [self._by_sample(_per_unit(t.double() * g.double(), units)) for t, g in glimpses if g is not None]
            if all(total.shape[0] == self.batch.size for total in totals):
                yield units, torch.stack(totals).sum(0)

    def _by_sample(self, totals: Tensor) -> Tensor:
        """(rows, units) → (samples, units): nodes are summed over their graph."""
        found = self.batch.by_sample(totals)
        return found if found.dim() == 2 else found.sum(1)

    def forget_gradients(self) -> None:
        """Those seen so far were of another loss."""
        self.gradients[:] = [None] * len(self.gradients)
        for glimpse in (g for calls in self.sites.values() for g in calls):
            glimpse.gradient = None

    def settle(self) -> None:
        """After the passes: each unit gets its slice of its site, of the last call of a shared block."""
        for site, units in _by_site(self.layers).items():
            if not self.sites.get(site):
                continue
            last = self.sites[site][-1]
            for unit in units:
                assert unit.site is not None  # that is what they were grouped by
                self.leaving[unit.index] = self.batch.by_sample(unit.site.of(last.tensor))
                gradient = None if last.gradient is None else unit.site.of(last.gradient)
                self.gradients[unit.index] = None if gradient is None else self.batch.by_sample(gradient)


def _by_site(layers: Sequence[Layer]) -> dict[Site, list[Layer]]:
    """Whole site → the units that are slices of it."""
    found: dict[Site, list[Layer]] = defaultdict(list)
    for layer in layers:
        if layer.site is not None:
            found[layer.site.whole].append(layer)
    return found


def _per_unit(product: Tensor, units: Sequence[Layer]) -> Tensor:
    """(samples, units): the sums over each unit's slice of `product`."""
    sites = [unit.site for unit in units if unit.site is not None]
    if not sites[0].stop:
        return product.flatten(1).sum(1, keepdim=True).expand(-1, len(sites))
    size = sites[0].stop - sites[0].start  # slices of one site are equally wide and begin at multiples of their width
    by_place = product.movedim(sites[0].dim, -1).flatten(1, -2) if product.dim() > 2 else product.unsqueeze(1)
    sums = by_place.sum(1).unflatten(1, (-1, size)).sum(2)
    return sums[:, torch.tensor([site.start // size for site in sites], device=sums.device)]


class Sweep:
    """Runs `statistics` over batches of `model`. `counts` grows with each batch."""

    def __init__(self, model: UniversalModel, statistics: Sequence[Statistic]) -> None:
        self.model = model
        self.statistics = list(statistics)
        self.counts = Counts()
        self.needs: frozenset[Signal] = frozenset().union(*(s.needs for s in statistics))
        receivers = [s for s in statistics if Signal.SAMPLE_GRADIENTS in s.needs]

        def emit(layer: int, parameter: Tensor, gradient: Tensor) -> None:
            for statistic in receivers:
                statistic.sample_gradient(layer, parameter, gradient)

        self.gradients = SampleGradients(model.module, model.layers, emit, model.blocks) if receivers else None
        self._attribution_checked = False
        self._checking = False
        attending = [s for s in statistics if Signal.ATTENTION in s.needs]
        self.now = self._attention([s for s in attending if Signal.GRADIENTS not in s.needs])
        self.later = self._attention([s for s in attending if Signal.GRADIENTS in s.needs])

    def _attention(self, receivers: Sequence[Statistic]) -> Emit | None:
        def emit(layer: int, call: AttentionCall) -> None:
            if not self._checking:
                for statistic in receivers:
                    statistic.attention(layer, call)

        return emit if receivers else None

    def batch(self, batch: Batch, seed: int, first: int = 0) -> None:
        """Feeds one batch, whose first sample has the number `first`. `seed` draws the answers of tasks without labels."""
        host, batch = batch, batch.to(self.model.device)
        backward = bool(self.needs & {Signal.GRADIENTS, Signal.SAMPLE_GRADIENTS})
        with ExitStack() as stack:
            self._enter(stack, backward)
            seen = stack.enter_context(watched(self.model, batch, backward))
            if self.now or self.later:
                stack.enter_context(attention_watched(attending(self.model.layers), batch.size, self.now, self.later))
            if self.gradients is not None:
                stack.enter_context(self.gradients.attached(batch.size, split=batch.layout is None))
            output = self._forward(batch)
            if self.model.task is not None:
                self.model.task.check(host, output)
            if backward:
                self._backward(output, batch, seed, seen)
        if self.gradients is not None and self.gradients.loop:
            self._loop(batch, seed)
        seen.output = output.detach()
        seen.ids = torch.arange(first, first + batch.size)
        for statistic in self.statistics:
            statistic.observe(seen)

    def _enter(self, stack: ExitStack, backward: bool) -> None:
        stack.enter_context(evaluating(self.model.module))
        stack.enter_context(unfused())
        stack.enter_context(torch.set_grad_enabled(backward))
        stack.enter_context(frozen(self.model.module))

    def _forward(self, batch: Batch) -> Tensor:
        self.counts.forwards += 1
        return batch.by_sample(self.model.read(run(self.model.module, batch)))

    def _likelihood(self, output: Tensor, batch: Batch, seed: int) -> Tensor:
        assert self.model.task is not None  # settled before the first batch
        return self.model.task.likelihood(output, batch, torch.Generator().manual_seed(seed))

    def _backward(self, output: Tensor, batch: Batch, seed: int, seen: Seen) -> None:
        losses = self._likelihood(output, batch, seed)
        if not losses.requires_grad:
            return  # no layer's stream reaches the output: every gradient stays None, and the scores say so
        if len(losses) != batch.size:
            raise UserModelError(
                f"The output has {len(losses)} rows for {batch.size} samples: which of them are a sample's is not known.",
                place=self.model.name,
                remedy="Give a wrapper whose output has the samples first: (samples, …).",
                code="LW-U78",
            )
        if self.gradients is not None and self.gradients.splits and not self._attribution_checked and losses.numel() > 1:
            self._checking = True  # one sample's gradient, which is no observation
            try:
                self.gradients.check_attribution(losses)
            finally:
                self._checking = False
            seen.forget_gradients()  # those were of one sample's loss
            self.counts.backwards += 1
            self._attribution_checked = True
        losses.sum().backward()
        self.counts.backwards += 1
        if self.gradients is not None:
            self.gradients.finish()

    def _loop(self, batch: Batch, seed: int) -> None:
        """A forward of its own for the few parameters that need one backward per sample, with the same drawn answers."""
        assert self.gradients is not None
        with ExitStack() as stack:
            self._enter(stack, backward=True)
            for parameter in self.gradients.loop:
                parameter.requires_grad_(True)
            losses = self._likelihood(self._forward(batch), batch, seed)
            self.counts.backwards += self.gradients.run_loop(losses)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient inside; flags and ``.grad`` are as before afterwards."""
    flags = [(p, p.requires_grad, p.grad) for p in module.parameters()]
    for parameter, _, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, required, grad in flags:
            parameter.requires_grad_(required)
            parameter.grad = grad


def copied(tensor: Tensor) -> Tensor:
    """What a `Seen` holds of a tensor that the model goes on to use: a copy, because later modules may write into it."""
    return tensor.detach().clone()


class Copies:
    """What is kept of the streams. What one layer gives and the next takes as it is, is kept once, for both."""

    def __init__(self, keep: Callable[[Tensor], Tensor]) -> None:
        self.keep = keep
        # weak, because a hook that held a stream would hold the graph that holds it
        self.last: Callable[[], Tensor | None] = lambda: None
        self.version = 0
        self.copy: Tensor | None = None

    def leaving(self, stream: Tensor) -> Tensor:
        copy = self.keep(stream)
        if not stream.is_inference():  # such a tensor does not tell whether it was written into
            self.last, self.version, self.copy = weakref.ref(stream), stream._version, copy
        return copy

    def entering(self, stream: Tensor) -> Tensor:
        if self.copy is not None and self.last() is stream and stream._version == self.version:
            return self.copy
        return self.keep(stream)


@contextmanager
def watched(model: UniversalModel, batch: Batch, backward: bool, keep: Callable[[Tensor], Tensor] = copied) -> Iterator[Seen]:
    """Fills a `Seen` while the model runs, with what `keep` makes of each tensor, by sample.

    With `backward`, each stream that no gradient would reach is made to need one. Where samples mix, the gradient of a sum of
    losses is no sample's own: streams then have none, and neither have sites.
    """
    count, mixed = len(model.layers), batch.layout is not None and batch.layout.mixes
    seen = Seen(model.layers, batch, [None] * count, [None] * count, [None] * count)
    copies = Copies(lambda stream: batch.by_sample(keep(stream)))
    with ExitStack() as stack:
        for layer in model.layers:
            if layer.stream is None:
                continue
            enter, note = _entering(layer, seen, copies, backward), _noting(layer, seen, copies)
            stack.callback(layer.module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(layer.module.register_forward_hook(note, with_kwargs=True).remove)
        for site in _by_site(model.layers):
            look = _looking(site, seen.sites.setdefault(site, []), keep, backward, mixed)
            attach = site.module.register_forward_pre_hook if site.entering else site.module.register_forward_hook
            stack.callback(attach(look, with_kwargs=True).remove)
        yield seen
    seen.settle()


def _looking(site: Site, glimpses: list[Glimpse], keep: Callable[[Tensor], Tensor], backward: bool, mixed: bool) -> Any:
    """A hook on what enters the site's module, or on what leaves it."""

    def look(module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> Any:
        tree = (args, kwargs) if site.entering else output
        tensor = trees.get(tree, site.path)
        glimpse = Glimpse(keep(tensor))
        glimpses.append(glimpse)
        if not backward:
            return None
        if site.entering or not tensor.requires_grad:  # a tensor of its own: others may read what enters as well
            tensor = (tensor if tensor.requires_grad else tensor.detach().requires_grad_()).clone()
        if not mixed:
            tensor.register_hook(lambda gradient: _glimpsed(glimpse, gradient))
        return trees.replaced(tree, site.path, tensor)

    return look


def _glimpsed(glimpse: Glimpse, gradient: Tensor) -> None:
    glimpse.gradient = gradient.detach()


def _entering(layer: Layer, seen: Seen, copies: Copies, backward: bool) -> Any:
    assert layer.stream is not None
    path, i = layer.stream.enters, layer.index

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        stream = trees.get((args, kwargs), path)
        if seen.entering[i] is None:  # a shared layer is seen from its first input to its last output
            seen.entering[i] = copies.entering(stream)
        if stream.requires_grad or not backward:
            return None
        # cloned, so that a block which works in place does not meet a leaf
        return trees.replaced((args, kwargs), path, stream.detach().requires_grad_().clone())

    return enter


def _noting(layer: Layer, seen: Seen, copies: Copies) -> Any:
    assert layer.stream is not None
    stream, i = layer.stream, layer.index
    # all that the hook may hold: through `seen.output` it would hold the graph that holds the hook
    gradients, batch = seen.gradients, seen.batch
    mixed = batch.layout is not None and batch.layout.mixes

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        leaving = trees.get(output, stream.leaves)
        seen.leaving[i] = copies.leaving(leaving)
        if leaving.requires_grad and not mixed:
            leaving.register_hook(lambda gradient: _keep(gradients, i, batch.by_sample(gradient)))

    return note


def _keep(gradients: list[Tensor | None], layer: int, gradient: Tensor) -> None:
    """The backward pass reaches a shared layer's last call first; that is the one whose output was noted."""
    if gradients[layer] is None:
        gradients[layer] = gradient.detach()
