"""The prefix-tree walk: outputs for many sets of skipped layers, where what two sets have in common runs once.

What a layer call gives depends only on which of the calls *before* it are skipped. So the sets are visited in the order of a
depth-first walk over keep/skip decisions, one per call, and a stack holds the output of each call on the way, one per call and no
more. A call whose forerunners are decided as in the set before is answered from the stack. The blocks that really run are
the tree's distinct edges (decisions before, layer kept): for all 2^L subsets of L layers of one chain 2^L − 1, the replay's own
unchanged run included, against L·2^(L−1) without sharing.

Nothing is assumed about the model between its blocks: embeddings, norms and heads run anew for every set, as `Counts.forwards`
says, and each output equals that of `Replay.skipping` bit for bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from layerwise import trees
from layerwise.patching import Replacement, skip
from layerwise.replay import Replay
from layerwise.structure import Layer

Skipped = frozenset[int]  # indices of layers


def skipping_each(replay: Replay, sets: Iterable[Skipped]) -> Iterator[tuple[Skipped, Tensor]]:
    """(set, output with its layers skipped) for every distinct set, in the order of the walk and not of `sets`."""
    order = [layer.index for layer, _ in replay.calls]
    walk = _Walk(replay)
    for path, skipped in sorted((tuple(i in each for i in order), tuple(sorted(each))) for each in set(sets)):
        yield frozenset(skipped), walk.output(path)


class _Walk:
    """The stack: `outputs[n]` is what the n-th call gave for the decisions before it on the current `path`, if it ran."""

    def __init__(self, replay: Replay) -> None:
        self.replay = replay
        self.outputs: list[tuple[Any] | None] = [(output,) for _, output in replay.calls]
        self.path: Sequence[bool] = (False,) * len(replay.calls)

    def output(self, path: Sequence[bool]) -> Tensor:
        """The model's output when the calls marked in `path` are skipped."""
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self.path, path, strict=True)))
        for later in range(shared + 1, len(path)):  # the call that is decided differently still has the same input
            self.outputs[later] = None
        self.path = path
        if not any(path):
            return self.replay.output
        position = iter(range(len(path)))
        output = self.replay.run({x.index: self._answer(x, position) for x in self.replay.model.layers})
        if next(position, None) is not None:
            raise self.replay.changed("fewer layers ran than before")
        return output

    def _answer(self, layer: Layer, position: Iterator[int]) -> Replacement:
        def answer(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            at = next(position, None)
            if at is None or self.replay.calls[at][0] is not layer:
                raise self.replay.changed(f"{layer.name} ran out of turn")

            def ours(*a: Any, **k: Any) -> Any:
                if self.outputs[at] is None:
                    self.outputs[at] = (self.replay.call(forward, a, k),)
                return trees.mapped(self.outputs[at][0], Tensor.clone)  # type: ignore[index]  # filled just above

            return skip(layer)(ours, args, kwargs) if self.path[at] else ours(*args, **kwargs)

        return answer
