"""The replay: interventions that start at the layer they change, everything before it answering from a cache.

For one batch the output of every layer call is kept once. A run that changes layer i takes the outputs of the calls before i
from the cache, *cloned*, because modules may work in place; from i on the blocks really run. Between the blocks (embeddings,
norms, heads) the model runs as it is, so nothing about its architecture needs to be known, and the result equals that of the
naive loop bit for bit. Skipping each of L layers in turn costs L + L(L−1)/2 block calls instead of L(L+1).

The cache is one of blocks also where the layers are units inside them: a block with a changed unit really runs, with the unit's
site changed, and so does everything after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor

from layerwise import trees
from layerwise.counts import Counts
from layerwise.data import Batch
from layerwise.errors import UserModelError
from layerwise.model import UniversalModel
from layerwise.patching import Replacement, place, replacing, skip
from layerwise.structure import Layer
from layerwise.trace import evaluating, run, unfused


class Replay:
    """One batch's cache. Making it runs the model once: `output` is the unchanged output.

    `around` gives a context in which each run happens, for changes that all of them share (corrupted embeddings, say).
    """

    def __init__(
        self,
        model: UniversalModel,
        batch: Batch,
        counts: Counts | None = None,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.model = model
        self.around = around
        self.batch = batch.to(model.device)
        self.counts = counts if counts is not None else Counts()
        self.calls: list[tuple[Layer, Any]] = []  # every layer call of the unchanged run and what it gave
        self.output = self.run({block.name: self._remember(block) for block in model.blocks})
        if model.task is not None:
            model.task.check(batch, self.output)

    def skipping(self, layers: Iterable[Layer]) -> Tensor:
        """The output when these layers pass their input on."""
        return self.replacing({layer.index: skip(layer) for layer in layers})

    def replacing(self, changes: Mapping[int, Replacement]) -> Tensor:
        """The output when the layers with these indices compute something else: a unit's site does, and its block really runs."""
        position = iter(range(len(self.calls)))
        state = _State()
        changed = [(self.model.layers[index], change) for index, change in changes.items()]
        whole = {layer.name: change for layer, change in changed if layer.site is None}
        inside = [(layer, change) for layer, change in changed if layer.site is not None]
        open_ = {layer.parent for layer, _ in inside}
        replacements = {b.name: self._answer(b, whole.get(b.name), b.name in open_, position, state) for b in self.model.blocks}
        output = self.run(replacements, inside)
        if next(position, None) is not None:
            raise self.changed("fewer layers ran than before")
        return output

    def _remember(self, layer: Layer) -> Replacement:
        def remember(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            output = self.call(forward, args, kwargs)
            self.calls.append((layer, trees.mapped(output, torch.Tensor.clone)))
            return output

        return remember

    def _answer(
        self, layer: Layer, change: Replacement | None, changed_inside: bool, position: Iterator[int], state: _State
    ) -> Replacement:
        def answer(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            at = next(position, None)
            if at is None or self.calls[at][0] is not layer:
                raise self.changed(f"{layer.name} ran out of turn")
            state.changed |= changed_inside

            def ours(*a: Any, **k: Any) -> Any:
                if not state.changed:  # nothing before this call differs, so neither would its own output
                    return trees.mapped(self.calls[at][1], torch.Tensor.clone)
                return self.call(forward, a, k)

            if change is None:
                return ours(*args, **kwargs)
            output = change(ours, args, kwargs)
            state.changed = True
            return output

        return answer

    def call(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A block that really runs."""
        self.counts.block_calls += 1
        return forward(*args, **kwargs)

    def run(self, replacements: Mapping[str, Replacement], inside: Iterable[tuple[Layer, Replacement]] = ()) -> Tensor:
        """The output of the whole model with every block replaced (name → replacement) and units changed `inside` of blocks."""
        self.counts.forwards += 1
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(self.around())
            stack.enter_context(evaluating(self.model.module))
            if any(layer.site is not None for layer in self.model.layers):
                stack.enter_context(unfused())  # the whole model too: what is compared must differ by the change alone
            for block in self.model.blocks:
                stack.enter_context(replacing(block.module, replacements[block.name]))
            for unit, change in inside:
                stack.enter_context(replacing(place(unit), change))
            return self.batch.by_sample(self.model.read(run(self.model.module, self.batch)))

    def changed(self, what: str) -> UserModelError:
        """The error for a model whose layers do not run as they did for the cache."""
        return UserModelError(
            f"{self.model.name} does not run the same layers each time: {what}.",
            remedy="Layers that are chosen by the data or at random cannot be replayed; fix the choice (eval mode, a seed).",
            code="LW-U76",
        )


class _State:
    """Whether some call of this run has given something else than the cache holds."""

    changed = False
