"""What changed blocks do to the outputs, on replay: everything before the first changed block is answered from a cache.

Decision: damage is the divergence from the unchanged model's outputs, KL in nats (Fisher's second order), wherever the outputs
are logits: it needs no labels, is never negative and has a far smaller error than the change of the loss on the same samples, so
that few samples are enough to tell actions apart. Where outputs are no logits it is what the loss rises by. The task's own
quality is measured beside it.

The work is counted in *forward equivalents*: calls of blocks over those of one forward of all the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from layerwise import trees
from layerwise.counts import Counts
from layerwise.data import Batch, Data
from layerwise.errors import LayerwiseError
from layerwise.evaluation import Evaluation
from layerwise.method import Applied, CompressionMethod, apply_plan
from layerwise.model import UniversalModel
from layerwise.patching import Replacement
from layerwise.plan import CompressionPlan
from layerwise.planning.blocks import Blocks, build_each, installed
from layerwise.planning.outside import REST
from layerwise.replay import Replay
from layerwise.supplies import Supplies
from layerwise.task import task_named
from layerwise.tensors import byte_size

DEAR = 0.25  # of the model's bytes: room for blocks whose making took forwards (calibration)
LOGITS = frozenset({"classification", "language_modelling", "token_classification", "fidelity", "generation"})


@dataclass(frozen=True)
class Effect:
    """`damage` ± `stderr` in nats per sample, the task's `figures`, and why it does not run at all (`failure`)."""

    damage: float
    stderr: float
    figures: Mapping[str, float]
    failure: str = ""


@dataclass(frozen=True)
class _Dear:
    """A kept block, and the forwards that it took per byte."""

    block: nn.Module
    worth: float


@dataclass
class Meter:
    """Measures on `data`; `spent` counts forward equivalents, those of `calibration` included."""

    model: UniversalModel
    data: Data
    spent: float = 0.0
    references: dict[int, Tensor] = field(default_factory=dict, repr=False)
    dear: dict[tuple[str, str], _Dear] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.model.see(self.data[0])
        self.samples = self.data.samples
        self.calls = sum(layer.calls for layer in self.model.layers)  # of one forward

    def effects(self, base: Blocks, changes: Sequence[Blocks], share: float = 1.0) -> list[Effect]:
        """The effect of each of `changes` on top of `base`, on the first `share` of the data; infinite damage where blocks fail.

        The change ``{}`` is `base` itself, for nothing more than the one forward that fills the cache.
        """
        assert self.model.task is not None  # settled by see
        tallies = [_Tally(Evaluation(self.model.task), Evaluation(task_named("fidelity"))) for _ in changes]
        whole = _Tally(Evaluation(self.model.task), Evaluation(task_named("fidelity")))
        data = self.part(share)
        for number, batch in enumerate(data):
            counts = Counts()
            replay = Replay(self.model, batch, counts, lambda: installed(self.model, base))
            reference = self._reference(number, replay.batch, share, counts) if base else self._keep(number, replay.output, share)
            if self.model.task.name not in LOGITS:
                whole.add(reference, replay.batch, reference)
            for change, tally in zip(changes, tallies, strict=True):
                tally.run(replay.batch, reference, lambda change=change, replay=replay: self._output(replay, base, change))  # type: ignore[misc]  # called at once
            self.spent += counts.block_calls * batch.size / (self.calls * self.samples)
        before = whole.task.means().get("loss", 0.0) if self.model.task.name not in LOGITS else None
        return [tally.effect(before) for tally in tallies]

    def compared(self, changed: UniversalModel) -> Effect:
        """The effect of having the model `changed` instead, for one forward of it."""
        assert self.model.task is not None  # settled by see
        tally = _Tally(Evaluation(self.model.task), Evaluation(task_named("fidelity")))
        whole = _Tally(Evaluation(self.model.task), Evaluation(task_named("fidelity")))
        for number, raw in enumerate(self.data):
            batch, counts = raw.to(self.model.device), Counts()
            reference = self._reference(number, batch, 1.0, counts)
            tally.add(changed.predict(batch), batch, reference)
            whole.add(reference, batch, reference)
            self.spent += (counts.block_calls / self.calls + 1) * batch.size / self.samples
        return tally.effect(None if self.model.task.name in LOGITS else whole.task.means()["loss"])

    def part(self, share: float) -> Data:
        """The first `share` of the samples."""
        return self.data if share >= 1 else self.data.head(max(round(share * self.samples), 1))

    def build(
        self, methods: Sequence[CompressionMethod], layers: Sequence[str], supplies: Supplies
    ) -> tuple[dict[str, nn.Module], dict[str, str]]:
        """`build_each` on the model, its forwards counted. Small blocks that took forwards are kept: who asks again gets them."""
        key, begun = repr(methods), self.spent
        known = {name: self.dear[key, name].block for name in layers if (key, name) in self.dear}
        left = [name for name in layers if name not in known]
        if not left:
            return known, {}
        with self._counting() as clean:
            built, failed = build_each(self.model, methods, left, supplies)
            for block in built.values():
                clean(block)
        if self.spent > begun:
            self.dear |= {(key, n): _Dear(b, (self.spent - begun) / len(built) / max(byte_size(b), 1)) for n, b in built.items()}
            while self.bytes_beside({}) > DEAR * byte_size(self.model.module):
                self.dear.pop(min(self.dear, key=lambda pair: self.dear[pair].worth))
        return known | built, failed

    def bytes_beside(self, blocks: Blocks) -> int:
        """What `blocks` hold together with those that are kept."""
        return byte_size(nn.ModuleList([*(kept.block for kept in self.dear.values()), *blocks.values()]))

    def carry_out(self, plan: CompressionPlan, supplies: Supplies) -> Applied:
        """`apply_plan` on the model, its forwards counted. The copy fills the memory: kept blocks have to go."""
        self.dear.clear()
        with self._counting() as clean:
            applied = apply_plan(self.model, plan, supplies)
            clean(applied.model.module)
        return applied

    @contextmanager
    def _counting(self) -> Iterator[Callable[[nn.Module], None]]:
        """Inside, blocks and their copies count the samples that pass them; gives what stops the copies."""
        count = _Count(self)
        handles = [layer.module.register_forward_pre_hook(count, with_kwargs=True) for layer in self.model.layers]

        def clean(module: nn.Module) -> None:
            for m in module.modules():
                for key in [key for key, hook in m._forward_pre_hooks.items() if hook is count]:
                    del m._forward_pre_hooks[key]
                    m._forward_pre_hooks_with_kwargs.pop(key, None)

        try:
            yield clean
        finally:
            for handle in handles:
                handle.remove()

    def _output(self, replay: Replay, base: Blocks, change: Blocks) -> Tensor:
        """What comes out with `change` on top of `base`. What is changed outside of the layers comes before them: all run."""
        if not change:
            return replay.output
        if REST not in change:
            return replay.replacing(self._replacements(change, replay))
        replay.counts.block_calls += self.calls
        with installed(self.model, {**base, **change}):
            return self.model.predict(replay.batch)

    def _replacements(self, change: Blocks, replay: Replay) -> dict[int, Replacement]:
        def swap(block: nn.Module) -> Replacement:
            return lambda forward, args, kwargs: replay.call(block, args, kwargs)

        return {self.model.layer(name).index: swap(block) for name, block in change.items()}

    def _reference(self, number: int, batch: Batch, share: float, counts: Counts) -> Tensor:
        """The unchanged model's output, kept while all of them take less room than the model."""
        if share >= 1 and number in self.references:
            return self.references[number]
        counts.block_calls += self.calls
        return self._keep(number, self.model.predict(batch), share)

    def _keep(self, number: int, output: Tensor, share: float) -> Tensor:
        room = byte_size(self.model.module) - sum(t.nbytes for t in self.references.values())
        if share >= 1 and number not in self.references and output.nbytes <= room:
            self.references[number] = output
        return output


class _Count:
    """A hook that copies of a module share."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def __deepcopy__(self, memo: Any) -> _Count:
        return self

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        samples = next((t.shape[0] for _, t in trees.tensors((args, kwargs)) if t.dim()), 1)
        self.meter.spent += samples / (self.meter.calls * self.meter.samples)


@dataclass
class _Tally:
    task: Evaluation
    divergence: Evaluation
    failure: str = ""

    def run(self, batch: Batch, reference: Tensor, output: Callable[[], Tensor]) -> None:
        if self.failure:
            return
        try:
            self.add(output(), batch, reference)
        except LayerwiseError as error:
            self.failure = error.what

    def add(self, output: Tensor, batch: Batch, reference: Tensor) -> None:
        self.task.add(output, batch, reference)
        if self.task.task.name in LOGITS:
            self.divergence.add(output, batch, reference)

    def effect(self, before: float | None) -> Effect:
        """`before`: the unchanged model's loss where damage is what the loss rises by."""
        if self.failure:
            return Effect(math.inf, math.nan, {}, self.failure)
        of = self.divergence if before is None else self.task
        damage, error = of.means()["loss"], _error(of, "loss")
        if before is not None:
            damage = max(damage - before, 0.0)
        if not math.isfinite(damage):
            return Effect(math.inf, math.nan, {}, "its outputs are not finite")
        return Effect(damage, error, self.task.means())


def _error(evaluation: Evaluation, metric: str) -> float:
    return evaluation.sums[metric].score(0).stderr


__all__ = ["Effect", "Meter"]
