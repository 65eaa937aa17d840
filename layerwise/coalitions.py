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
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from layerwise import trees
from layerwise.patching import Replacement, skip
from layerwise.replay import Replay
from layerwise.structure import Layer

Skipped = frozenset[int]  # indices of layers
Path = tuple[tuple[int, ...], ...]  # for each block call, the skipped ones of its layers: itself, or units inside


def skipping_each(replay: Replay, sets: Iterable[Skipped]) -> Iterator[tuple[Skipped, Tensor]]:
    """(set, output with its layers skipped) for every distinct set, in the order of the walk and not of `sets`."""
    walk = _Walk(replay)
    for path, skipped in sorted((walk.path_of(each), tuple(sorted(each))) for each in set(sets)):
        yield frozenset(skipped), walk.output(path)


class _Walk:
    """The stack: `outputs[n]` is what the n-th call gave for the decisions before it on the current `path`, if it ran."""

    def __init__(self, replay: Replay) -> None:
        self.replay = replay
        self.outputs: list[tuple[Any] | None] = [(output,) for _, output in replay.calls]
        self.path: Path = ((),) * len(replay.calls)
        self.inside = {layer.index for layer in replay.model.layers if layer.site is not None}

    def path_of(self, skipped: Skipped) -> Path:
        """The decisions that stand for a set."""
        layers = self.replay.model.layers
        by_block: dict[str, list[int]] = {}
        for index in sorted(skipped):
            by_block.setdefault(layers[index].parent or layers[index].name, []).append(index)
        return tuple(tuple(by_block.get(block.name, ())) for block, _ in self.replay.calls)

    def output(self, path: Path) -> Tensor:
        """The model's output when the layers named in `path` are skipped."""
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self.path, path, strict=True)))
        differs = {*self.path[shared], *path[shared]} if shared < len(path) else set()
        same_input = 0 if differs & self.inside else 1  # decided differently as a whole, a block would still compute the same
        for later in range(shared + same_input, len(path)):
            self.outputs[later] = None
        self.path = path
        if not any(path):
            return self.replay.output
        position = iter(range(len(path)))
        units = [self.replay.model.layers[i] for i in sorted(set().union(*path) & self.inside)]
        answers = {block.name: self._answer(block, position) for block in self.replay.model.blocks}
        output = self.replay.run(answers, [(unit, skip(unit)) for unit in units])
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

            whole = any(index not in self.inside for index in self.path[at])
            return skip(layer)(ours, args, kwargs) if whole else ours(*args, **kwargs)

        return answer
