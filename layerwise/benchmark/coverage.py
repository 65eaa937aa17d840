"""Whether layerwise can work with a model: four checks, each of which either holds or says in words why not.

- *layers*: at least two, disjoint, in the order in which they run, and together holding at least `LEAST_SHARE` of the weights
  that run, embeddings and heads apart (see `layerwise.benchmark.weights_used`);
- *replay*: the forward gives the same bits twice, and so does a replay that changes nothing, from the cache alone and with every
  block after the first really run;
- *skip*: without any one of the layers that are called skippable, the model runs and gives a finite output of the same shape;
- *gradients*: one sweep with per-sample gradients gives at least `LEAST_SCORED` of the layers a finite score, not all equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from layerwise.analyzers.gradient_based import GradientBasedAnalyzer
from layerwise.benchmark.weights_used import Uses, uses_of
from layerwise.data import Batch, Data
from layerwise.errors import LayerwiseError
from layerwise.model import UniversalModel
from layerwise.observe import observe
from layerwise.replay import Replay
from layerwise.scores import Status
from layerwise.structure import Layer
from layerwise.task import Fidelity

LEAST_LAYERS = 2
LEAST_SHARE = 0.8
LEAST_SCORED = 0.5  # of the layers: a forward may have a side that its main output does not depend on
SAME = "every score is the same"
CHECKS = ("layers", "replay", "skip", "gradients")


@dataclass(frozen=True)
class Judgement:
    """`share` of the weights that the layers hold, 0 … 1; `scored`: layers with a gradient score. `failures`: check → why."""

    layers: int
    skippable: int
    scored: int
    share: float
    parameters: int
    failures: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether all four checks held."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Found:
    """What the checks learn of one model, for the figures of the judgement."""

    share = 0.0
    scored = 0


def judge(model: UniversalModel) -> Judgement:
    """Runs the checks on the model's own example. Raises what reading the layers raises; a failed check is a reason."""
    batch, found = model.example, Found()
    layers = model.blocks
    checks: dict[str, Callable[[], str]] = {
        "layers": lambda: _layers(model, batch, layers, found),
        "replay": lambda: _replay(model, batch),
        "skip": lambda: _skip(model, batch),
        "gradients": lambda: _gradients(model, batch, found),
    }
    reasons = {name: _reason(checks[name]) for name in CHECKS}
    return Judgement(
        layers=len(layers),
        skippable=sum(layer.skippable for layer in layers),
        scored=found.scored,
        share=round(found.share, 4),
        parameters=sum(p.numel() for p in model.module.parameters()),
        failures={name: reason for name, reason in reasons.items() if reason},
    )


def _reason(check: Callable[[], str]) -> str:
    """What the check says, or what it raised: one model's failure must not hide the other checks'."""
    try:
        return check()
    except LayerwiseError as error:
        return str(error)
    except Exception as error:  # a check runs other people's code
        return f"{type(error).__name__}: {error}"


def _layers(model: UniversalModel, batch: Batch, layers: Sequence[Layer], found: Found) -> str:
    uses = uses_of(model.module, batch)
    found.share = uses.share(layers)
    missing = uses.outside(layers)
    if len(layers) < LEAST_LAYERS:
        return f"{len(layers)} layer was found"
    if any(layer.module in set(other.module.modules()) for layer in layers for other in layers if layer is not other):
        return "layers overlap"  # a part that several of them call (an activation, a position encoding) is in each of them
    if _disordered(uses, layers):
        return "layers are not in the order in which they run"
    if found.share < LEAST_SHARE:
        return f"the layers hold {100 * found.share:.0f} % of the weights; outside: {', '.join(missing[:4])}"
    return ""


def _disordered(uses: Uses, layers: Sequence[Layer]) -> bool:
    order = [uses.order.get(layer.module, math.inf) for layer in layers]
    return order != sorted(order) or math.inf in order


def _replay(model: UniversalModel, batch: Batch) -> str:
    expected = model.predict(batch)
    if not bool(expected.isfinite().any()):
        return "no value of the output is finite"
    if not _same(expected, model.predict(batch)):
        return "the forward itself gives other bits each time"
    replay = Replay(model, batch)
    first = model.blocks[0].index
    runs = {
        "with the layers recorded": replay.output,
        "from the cache alone": replay.replacing({}),
        "with every layer after the first run": replay.replacing({first: lambda forward, args, kwargs: forward(*args, **kwargs)}),
    }
    return "; ".join(f"other bits {how}" for how, output in runs.items() if not _same(expected, output))


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal in every bit that means something; masked logits may be −inf, and nothing may be NaN that was not."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _skip(model: UniversalModel, batch: Batch) -> str:
    replay = Replay(model, batch)
    for layer in model.blocks:
        if not layer.skippable:
            continue
        try:
            output = replay.skipping([layer])
        except LayerwiseError as error:
            return f"without {layer.name}: {error}"
        if output.shape != replay.output.shape:
            return f"without {layer.name} the output is {tuple(output.shape)}, not {tuple(replay.output.shape)}"
        if bool((replay.output.isfinite() & ~output.isfinite()).any()):
            return f"without {layer.name} the output is not finite"
    return ""


def _gradients(model: UniversalModel, batch: Batch, found: Found) -> str:
    said = _swept(model, batch, found)
    if said != SAME:
        return said
    # random weights may give logits so large that the answer is certain and its gradient exactly 0: by the output's direction
    around = model.around(model.module, source=None)
    around.task = Fidelity(kind="cosine")
    return _swept(around, batch, found)


def _swept(model: UniversalModel, batch: Batch, found: Found) -> str:
    analyzer = GradientBasedAnalyzer()
    statistic: Any = analyzer.statistic(model)
    observe(model, Data.of([batch]), {analyzer.method: statistic})
    scores = analyzer.score(model, statistic)
    values = [score.value for score in scores.values() if score.status is Status.OK]
    found.scored = len(values)
    failed = [f"{name}: {score.reason}" for name, score in scores.items() if score.status is Status.FAILED]
    if failed:
        return f"{failed[0]} (and {len(failed) - 1} more)" if failed[1:] else failed[0]
    if len(values) < max(LEAST_LAYERS, LEAST_SCORED * len(scores)):
        missing = next(s.reason for s in scores.values() if s.status is not Status.OK) if len(values) < len(scores) else ""
        return f"{len(values)} of {len(scores)} layers have a score; the others: {missing}"
    return SAME if len(set(values)) == 1 else ""


__all__ = ["CHECKS", "Judgement", "judge"]
