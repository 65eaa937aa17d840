"""How gradients pass through the layers: their size, how each layer scales them, how consistent they are over samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from layerwise import trees
from layerwise.analyzer import ANALYZERS, ImportanceAnalyzer, Signal, Statistic
from layerwise.data import Batch
from layerwise.errors import UsageError, nearest
from layerwise.features import observations
from layerwise.model import UniversalModel
from layerwise.moments import Moments
from layerwise.scores import LayerScore, Status
from layerwise.statistics import UNREACHED, MomentsStatistic
from layerwise.structure import Layer
from layerwise.sweep import Seen, frozen
from layerwise.trace import evaluating, run, unfused
from layerwise.walk import Walk

UNITS = {
    "norm": "nats per unit of the stream",
    "log_ratio": "log ratio",
    "update_ratio": "nats per unit of θ²",
    "signal_to_noise": "ratio",
    "jacobian_gain": "ratio",
}


class GradientNorm(MomentsStatistic):
    """Per sample: ‖gradient of what leaves‖; the norm is taken before any mean."""

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.ACTIVATIONS, Signal.GRADIENTS})

    def __init__(self, layers: int) -> None:
        super().__init__(Moments(layers))

    def observe(self, seen: Seen) -> None:
        for layer in seen.layers:
            norm = _norms(seen, layer)
            if norm is not None:
                self.moments.add_(layer.index, norm)


class LogRatio(MomentsStatistic):
    """Per sample: log ‖gradient of what enters‖ − log ‖gradient of what leaves‖, for layers whose forerunner feeds them."""

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.ACTIVATIONS, Signal.GRADIENTS})

    def __init__(self, layers: int) -> None:
        super().__init__(Moments(layers))

    def observe(self, seen: Seen) -> None:
        norms = [_norms(seen, layer) for layer in seen.layers]
        for before, layer in zip(seen.layers, seen.layers[1:], strict=False):
            entering, leaving = norms[before.index], norms[layer.index]
            if entering is None or leaving is None or not follows(before, layer):
                continue
            both = (entering > 0) & (leaving > 0)  # a sample without gradient has no ratio
            ratio = torch.where(both, (entering / leaving).log(), 0.0)
            self.moments.add_(layer.index, ratio, both.double())


def _norms(seen: Seen, layer: Layer) -> Tensor | None:
    gradient = seen.gradients[layer.index]
    if gradient is None or not seen.complete(layer):
        return None
    return gradient.flatten(1).double().square().sum(1).sqrt()


def follows(before: Layer, layer: Layer) -> bool:
    """Whether both stand in one chain, so that what leaves the one is what enters the other."""
    return before.group == layer.group and before.granularity == layer.granularity


class UpdateRatio(MomentsStatistic):
    """Per sample: ‖gradient of the layer's parameters‖."""

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.SAMPLE_GRADIENTS})

    def __init__(self, layers: int) -> None:
        super().__init__(Moments(layers))
        self._batch: dict[int, Tensor] = {}

    def sample_gradient(self, layer: int, parameter: Tensor, gradient: Tensor) -> None:
        part = gradient.flatten(1).double().square().sum(1)
        self._batch[layer] = self._batch[layer] + part if layer in self._batch else part

    def observe(self, seen: Seen) -> None:
        for layer, total in self._batch.items():
            self.moments.add_(layer, total.sqrt())
        self._batch.clear()


class SignalToNoise(Statistic):
    """Per batch of b samples: b, S = Σₙ‖gₙ‖², pairs b(b−1) and C = Σ over n ≠ m of gₙ·gₘ, with their second moments.

    C / pairs estimates ‖mean gradient‖² without bias and S / b estimates that plus the trace of the covariance, so four numbers
    per layer stand in for a mean gradient of the size of the model.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.SAMPLE_GRADIENTS})

    def __init__(self, layers: int) -> None:
        self.sums = torch.zeros(layers, 4, dtype=torch.float64)
        self.squares = torch.zeros(layers, 4, 4, dtype=torch.float64)
        self.batches = torch.zeros(layers, dtype=torch.float64)
        self._batch: dict[int, Tensor] = {}

    def sample_gradient(self, layer: int, parameter: Tensor, gradient: Tensor) -> None:
        g = gradient.flatten(1).double()
        own = g.square().sum()
        part = torch.stack([own, g.sum(0).square().sum() - own])
        self._batch[layer] = self._batch[layer] + part if layer in self._batch else part

    def observe(self, seen: Seen) -> None:
        b = seen.batch.size
        for layer, (own, cross) in self._batch.items():
            row = torch.stack([torch.full_like(own, b), own, torch.full_like(own, b * (b - 1)), cross])
            if self.sums.device != row.device:
                self.sums, self.squares = self.sums.to(row.device), self.squares.to(row.device)
            self.sums[layer] += row
            self.squares[layer] += torch.outer(row, row)
            self.batches[layer] += 1
        self._batch.clear()

    def merge_(self, other: SignalToNoise) -> None:
        self.sums = self.sums + other.sums.to(self.sums.device)
        self.squares = self.squares + other.squares.to(self.squares.device)
        self.batches = self.batches + other.batches.to(self.batches.device)

    def state(self) -> dict[str, Tensor]:
        return {"sums": self.sums, "squares": self.squares, "batches": self.batches}

    def load_(self, state: Mapping[str, Tensor]) -> None:
        self.sums, self.squares, self.batches = state["sums"], state["squares"], state["batches"]

    @property
    def samples(self) -> int:
        return int(self.sums[:, 0].max()) if len(self.sums) else 0

    def score(self, layer: int) -> LayerScore:
        """‖mean g‖² / tr Σ with the delta method's standard error over batches."""
        sums, batches = self.sums[layer].cpu(), float(self.batches[layer])
        if not batches:
            return LayerScore.missing(Status.NOT_APPLICABLE, UNREACHED)
        b, own, pairs, cross = (float(v) for v in sums)
        if not pairs:
            return LayerScore.missing(Status.NOT_APPLICABLE, "needs batches of at least 2 samples")
        signal = cross / pairs
        noise = own / b - signal
        if noise <= 0:
            return LayerScore.missing(Status.FAILED, f"the gradients' variance came out as {noise:.3g}")
        if batches < 2:
            return LayerScore.measured(signal / noise)
        # signal / noise = x / (y − x) with x = cross / pairs and y = own / b; both are ratios of sums over batches
        dx, dy = (own / b) / noise**2, -signal / noise**2
        gradient = torch.tensor([-dy * own / b**2, dy / b, -dx * signal / pairs, dx / pairs], dtype=torch.float64)
        spread = self.squares[layer].cpu() - torch.outer(sums, sums) / batches
        variance = float(gradient @ spread @ gradient) * batches / (batches - 1)
        return LayerScore.measured(signal / noise, math.sqrt(max(variance, 0.0)))


class JacobianGain(MomentsStatistic):
    """Per sample: mean over probes of ‖Jᵀv‖² with v ~ N(0, 1) on what leaves, weighted by the numbers that leave."""

    walks: ClassVar[bool] = True
    differentiates = True

    def __init__(self, layers: int, probes: int) -> None:
        super().__init__(Moments(layers))
        self.probes = probes

    def walk(self, walk: Walk) -> None:
        generator = walk.generator()
        with ExitStack() as stack:
            for context in (evaluating(walk.model.module), unfused(), torch.enable_grad(), frozen(walk.model.module)):
                stack.enter_context(context)
            ends = _cut(walk, stack)
            run(walk.model.module, walk.batch)
            walk.counts.forwards += 1
            pairs = {i: (a, b) for i, (a, b) in ends.items() if b.requires_grad and len(a) == len(b) == walk.batch.size}
            if pairs:
                self._probe(walk, pairs, generator)

    def _probe(self, walk: Walk, pairs: Mapping[int, tuple[Tensor, Tensor]], generator: torch.Generator) -> None:
        masks = {i: _mask(walk.batch, walk.model.layers[i], b) for i, (_, b) in pairs.items()}
        total: dict[int, Tensor] = {}
        for _ in range(self.probes):
            noise = [torch.randn(b.shape, generator=generator).to(b) * masks[i].to(b) for i, (_, b) in pairs.items()]
            found = torch.autograd.grad(
                [b for _, b in pairs.values()], [a for a, _ in pairs.values()], noise, retain_graph=True, allow_unused=True
            )
            walk.counts.backwards += 1
            for i, gradient in zip(pairs, found, strict=True):
                if gradient is not None:
                    total[i] = total.get(i, 0.0) + gradient.flatten(1).double().square().sum(1)
        for i, value in total.items():
            self.moments.add_(i, value / self.probes, masks[i].expand(pairs[i][1].shape).flatten(1).sum(1))

    def gain(self, layer: int) -> LayerScore:
        """‖J‖_F / √d."""
        if not float(self.moments.sums[0, layer]):
            return LayerScore.missing(Status.NOT_APPLICABLE, UNREACHED)
        score = self.moments.score(layer)
        root = math.sqrt(max(score.value, 0.0))
        return LayerScore.measured(root, score.stderr / (2 * root) if root else math.nan)


def _mask(batch: Batch, layer: Layer, leaving: Tensor) -> Tensor:
    """1 for numbers that count, 0 for padding, to be broadcast over `leaving`."""
    if leaving.dim() != 3:
        return torch.ones([1] * leaving.dim(), dtype=torch.float64, device=leaving.device)
    return observations(batch, layer, leaving)[1][..., None]


def _cut(walk: Walk, stack: ExitStack) -> dict[int, tuple[Tensor, Tensor]]:
    """Hooks that make each layer's input a leaf and hand on its output detached; layer → (entering, leaving) of its last call."""
    ends: dict[int, tuple[Tensor, Tensor]] = {}
    leaves: dict[int, Tensor] = {}

    def enter(layer: Layer, path: trees.Path) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            leaf = leaves[layer.index] = trees.get((args, kwargs), path).detach().requires_grad_()
            return trees.replaced((args, kwargs), path, leaf.clone())  # the block may write into its input

        return hook

    def leave(layer: Layer, path: trees.Path) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            ends[layer.index] = (leaves[layer.index], trees.get(output, path))
            return trees.mapped(output, lambda t: t.detach().clone())

        return hook

    for layer in walk.model.layers:
        if layer.stream is not None:
            module, stream = layer.module, layer.stream
            stack.callback(module.register_forward_pre_hook(enter(layer, stream.enters), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave(layer, stream.leaves), with_kwargs=True).remove)
    return ends


@dataclass(frozen=True)
@ANALYZERS.register("gradient_flow")
class GradientFlowAnalyzer(ImportanceAnalyzer):
    """Mean over samples of the norm of the loss's gradient with respect to what leaves the layer (default); how gradients pass.

    In a healthy net the default changes monotonically with depth, so that it ranks layers much as their depth does.

    Parameters
    ----------
    measure
        ``norm``: E‖g‖ (default); ``log_ratio``: E log(‖gradient entering‖ / ‖gradient leaving‖) over neighbours of one chain, how
        much the layer enlarges the gradient on its way back; ``update_ratio``: E‖∂loss/∂θ‖ / ‖θ‖; ``signal_to_noise``:
        ‖mean g‖² / tr Σ of the parameters' gradients, the reciprocal of the simple gradient noise scale; ``jacobian_gain``:
        ‖∂leaving/∂entering‖_F / √(numbers that leave), 1 for an orthogonal map.
    probes
        Random vectors per sample for ``jacobian_gain``.

    Norms are each sample's own, taken before the mean, so they do not depend on the batch size. Cost: F + B;
    ``jacobian_gain`` F + `probes` × B. Standard errors: over samples, for ``signal_to_noise`` over batches (delta method).

    References
    ----------
    Glorot, Bengio (2010), "Understanding the difficulty of training deep feedforward neural networks"; McCandlish et al. (2018),
    "An empirical model of large-batch training" (noise scale; here from all pairs within a batch).
    """

    method: ClassVar[str] = "gradient_flow"
    unit: ClassVar[str] = UNITS["norm"]

    measure: Literal["norm", "log_ratio", "update_ratio", "signal_to_noise", "jacobian_gain"] = "norm"
    probes: int = 4

    def __post_init__(self) -> None:
        if self.measure not in UNITS:
            raise UsageError(f"Unknown measure {self.measure!r} of gradient_flow.", remedy=nearest(self.measure, UNITS))
        if self.probes < 1:
            raise UsageError(f"gradient_flow needs at least 1 probe, not {self.probes}.")

    def measured_in(self) -> str:
        return UNITS[self.measure]

    def statistic(self, model: UniversalModel) -> Statistic:
        layers = len(model.layers)
        if self.measure == "jacobian_gain":
            return JacobianGain(layers, self.probes)
        kinds: dict[str, type[GradientNorm | LogRatio | UpdateRatio | SignalToNoise]] = {
            "norm": GradientNorm, "log_ratio": LogRatio, "update_ratio": UpdateRatio, "signal_to_noise": SignalToNoise,
        }  # fmt: skip
        return kinds[self.measure](layers)

    def score(self, model: UniversalModel, statistic: MomentsStatistic | SignalToNoise) -> Mapping[str, LayerScore]:
        if isinstance(statistic, SignalToNoise):
            return {x.name: statistic.score(x.index) for x in model.layers}
        if isinstance(statistic, JacobianGain):
            return {x.name: statistic.gain(x.index) for x in model.layers}
        if isinstance(statistic, LogRatio):
            alone = [x for i, x in enumerate(model.layers) if i == 0 or not follows(model.layers[i - 1], x)]
            return statistic.scores(model.layers, missing={x.name: "no layer of its chain comes before it" for x in alone})
        if isinstance(statistic, UpdateRatio):
            norms = [_parameter_norm(x) for x in model.layers]
            still = {x.name: "its parameters are all zero" for x in model.layers if not norms[x.index]}
            return statistic.scores(model.layers, scale=[1 / n if n else 0.0 for n in norms], missing=still)
        return statistic.scores(model.layers)


def _parameter_norm(layer: Layer) -> float:
    return math.sqrt(sum(float(p.detach().double().square().sum()) for _, p in layer.tensors()))
