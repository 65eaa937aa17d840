"""The protocol of the faithfulness benchmark, fixed before its first run. Changing anything here is a new benchmark.

**Question.** Do the scores of a method order the layers of a model by the damage that is measured when a layer is
hurt?

**Signs.** A higher score means a more important layer; a higher damage means a more important layer. So a faithful
method has a positive rank correlation. No absolute value is taken anywhere: a method that orders the layers
backwards is wrong.

**Layers** are the blocks that `UniversalModel.layers` finds. **Damages** hurt one layer at a time, the rest of the
model whole:

- ``skip``: the layer passes its input on (only layers that keep the shape);
- ``w4``, ``w3``, ``w2``: its weight matrices and kernels rounded to nearest, symmetric, one scale per output
  channel;
- ``prune50``: the half of each of them that is smallest by |w| is set to 0;
- ``wanda50``: of each output channel the half that is smallest by |w|·‖x‖ is set to 0 (Sun et al. 2024), ‖x‖ over
  the calibration samples; a kernel's input channels share one norm.

**Metrics**, per sample, on data that no method has seen: ``dce``, the increase of the task's loss in nats
(primary), and ``kl``, KL(p ‖ p′) of the whole model's and the damaged model's outputs. The damage of a layer is Σ
values / Σ weights over samples.

**Samples.** Each subject says how many; the three parts (calibration A, calibration B, evaluation) are disjoint.
Methods see A; B only serves the stability. Everything is drawn with seed 0.

**Statistics per subject, method, damage and metric:** Spearman's rho; Kendall's tau-b; a 95 % percentile interval
by bootstrap over the evaluation samples; a one-sided permutation p over layers; the partial Spearman correlation
given depth and log parameters (only those of the two that vary; ranks on ranks by least squares; needs
`PARTIAL_FREEDOM` degrees of freedom); and the *score* rho / √reliability. **Reliability** is the mean over random
halves of the evaluation samples of the Spearman correlation between the two halves' damages, stepped up by
Spearman–Brown.

**Exclusions, all counted and listed:** a target (subject, damage, metric) with reliability below
`LEAST_RELIABILITY`; a target with fewer than `LEAST_LAYERS` layers; a method on a target where fewer than
`LEAST_LAYERS` layers, or less than `LEAST_COVERAGE` of the target's layers, have a score; a method whose scores of
those layers are all the same counts as rho = 0, since it says nothing; a method that fails on a subject (the reason
is recorded).

**Over models**, the model being the unit: Fisher's z of rho (clipped to ±`CLIP`), first the mean over the damages
of one model, then the mean over models weighted by (layers − 3), with a one-sided t-test of "greater than 0" on the
models' values and Holm's correction over the methods. The same with the partial correlations. Models that share an
encoder are separate units, and the page says so. The primary table is ``dce`` over all damages; each damage has its
own.

**Removal curve** (``skip``): q(k) is the mean over samples of exp(−loss per unit of weight) after the k least
important layers are skipped; A is the mean of q over k; (A − A_random) / (A_greedy − A_random), where random is the
mean over `random_orders` orders and greedy removes at each step what costs least on calibration A. Left out where
A_greedy − A_random < `LEAST_GAP`. Layers without a score are removed last, ties in the order of the model.

**Allocation**: one solver gives every method's ranking the same bits: minimize Σ rank · 4^(−bits) over bits ∈
`BITS` with a mean of at most `MEAN_BITS` per weight; layers without a score share the mean rank. Then all layers
are rounded at once, and dce is measured. Reported as the share of `random_orders` random rankings whose dce is
higher (ties count half), and beside it what one width of `MEAN_BITS` everywhere gives. Curves and allocations are
those of methods with a score for at least `LEAST_COVERAGE` of the layers in question.

**Cost** in passes over the data: F = 1 forward, a backward = 2, and for methods that intervene block calls /
layers, from `Counts` when the method runs alone. **Stability**: rank correlation between the scores from A and from
B. **Sanity**: on the same model with its layers' weights drawn anew the scores must change (Adebayo et al. 2018);
random, depth and size cannot, and are no methods.

**Methods**: every registered analyzer with its default settings, the `VARIANTS` below, and the greedy order.
Baselines: `BASELINES`.

**The rule for methods="auto"** (`auto_rule` in `layerwise.benchmark.choice`): candidates are registered analyzers
with default settings that are no baseline, are not themselves built from other methods or fitted on these results
(`COMPOSITE`), were judged on at least `AUTO_COVERAGE` of the models on which any method was, and cost at most
`AUTO_PASSES` passes. Starting from nothing, the candidate is added that raises the combined rho of the consensus
(mean of the members' ranks) most, ties to the cheaper one; it ends when no candidate that keeps the sum of the
costs within `AUTO_PASSES` raises it by at least `AUTO_GAIN`. ``depth`` is then added as the yardstick, without a
vote.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

PROTOCOL = 1  # raised whenever anything above changes

DAMAGES = ("skip", "w4", "w3", "w2", "prune50", "wanda50")
METRICS = ("dce", "kl")
PRIMARY = "dce"

LEAST_RELIABILITY = 0.5
LEAST_LAYERS = 5
LEAST_COVERAGE = 0.75
PARTIAL_FREEDOM = 2  # n − 2 − covariates
CLIP = 0.99
LEAST_GAP = 0.01

BITS = (2, 3, 4, 8)
MEAN_BITS = 3

AUTO_PASSES = 30.0
AUTO_GAIN = 0.02
AUTO_COVERAGE = 0.75
YARDSTICK = "depth"

BASELINES = (
    "random",
    "depth",
    "depth(reverse)",
    "parameter_count",
    "weight_norm",
    "layer_correlation",
    "layer_ablation",
    "greedy",
)
COMPOSITE = ("ensemble", "meta_learning")

# label → (analyzer, settings that differ from the default ones)
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "depth(reverse)": ("depth", {"reverse": True}),
    "gradient_based(activation)": ("gradient_based", {"form": "activation"}),
    "gradient_based(signed)": ("gradient_based", {"form": "signed"}),
    "gradient_based(norm)": ("gradient_based", {"form": "norm"}),
    "layer_correlation(cka)": ("layer_correlation", {"measure": "cka"}),
    "fisher_information(per_parameter)": ("fisher_information", {"per_parameter": True}),
}


@dataclass(frozen=True)
class Protocol:
    """The numbers that a miniature run for tests makes smaller; these are the benchmark's."""

    seed: int = 0
    bootstraps: int = 500
    permutations: int = 5_000
    halves: int = 50
    random_orders: int = 20
    curve_samples: int = 128

    def to_dict(self) -> dict[str, Any]:
        return {"version": PROTOCOL} | asdict(self)
