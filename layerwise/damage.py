"""The measured damage of leaving out sets of layers: for the removal curve and the planner, by replay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from layerwise.counts import Counts
from layerwise.data import Data
from layerwise.evaluation import Evaluation
from layerwise.importance import RemovalCurve
from layerwise.model import UniversalModel
from layerwise.replay import Replay

LayerSet = frozenset[str]


def evaluate_skips(
    model: UniversalModel,
    data: Data,
    sets: Sequence[LayerSet],
    *,
    counts: Counts | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[LayerSet, Evaluation]:
    """The task's metrics with each set of layers skipped. The empty set is the whole model and costs nothing extra."""
    model.see(data[0])
    assert model.task is not None  # settled by see
    found = {chosen: Evaluation(model.task) for chosen in sets}
    total = len(data)
    for index, batch in enumerate(data):
        replay = Replay(model, batch, counts)
        for chosen, evaluation in found.items():
            output = replay.skipping([model.layer(name) for name in chosen]) if chosen else replay.output
            evaluation.add(output, replay.batch, replay.output)
        if progress is not None:
            progress(index + 1, total)
    _act(model, data, found)
    return found


def _act(model: UniversalModel, data: Data, found: Mapping[LayerSet, Evaluation]) -> None:
    """The whole model acts where the task asks it; with layers skipped only if that is what the task is judged by."""
    assert model.task is not None  # settled by evaluate_skips
    whole = model.task.acted(model, data)
    for chosen, evaluation in found.items():
        if not chosen:
            evaluation.acted = whole
        elif model.task.quality in whole:
            with model.skipping(chosen):
                evaluation.acted = model.task.acted(model, data)


def removal_curve(
    model: UniversalModel, data: Data, order: Sequence[str], *, progress: Callable[[int, int], None] | None = None
) -> tuple[RemovalCurve, dict[str, float]]:
    """The task's quality after skipping the first k layers of `order`, k = 0 … len(order), and the whole model's metrics."""
    prefixes = [frozenset(order[:k]) for k in range(len(order) + 1)]
    found = evaluate_skips(model, data, prefixes, progress=progress)
    assert model.task is not None  # settled by evaluate_skips
    metric = model.task.quality
    curve = RemovalCurve(metric, tuple(order), tuple(found[p].means()[metric] for p in prefixes))
    return curve, found[prefixes[0]].means()
