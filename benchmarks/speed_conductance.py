"""Conductance of the twelve blocks of a ViT-Tiny with n = 20: one path for all, captum in a loop, and plain training passes.

``python benchmarks/speed_conductance.py [repeats] [batch]`` prints ratios of processor times: the median over `repeats` pairs
that take turns in one process with one thread. captum runs once: it takes minutes.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import timm
import torch
from captum.attr import LayerConductance

from layerwise.analyzers.layer_conductance import RULES, Conductances, LayerConductanceAnalyzer, conductances
from layerwise.counts import Counts
from layerwise.data import Batch
from layerwise.model import UniversalModel
from layerwise.task import Classification
from layerwise.walk import Walk

STEPS = 20


def seconds(work: Callable[[], object]) -> float:
    """Processor time of one call."""
    started = time.process_time()
    work()
    return time.process_time() - started


def error(found: Conductances) -> float:
    """The largest over layers of Σ |Σ Cond − ΔF| / Σ |ΔF|."""
    return float((found.totals - found.change).abs().sum(1).max() / found.change.abs().sum())


def main(repeats: int = 3, size: int = 2) -> dict[str, object]:
    """Measures, prints and returns the figures."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()
    images, labels = torch.randn(size, 3, 224, 224), torch.randint(0, 10, (size,))
    batch = Batch((images,), {}, labels)
    model = UniversalModel(module, task=Classification(), example=batch)
    walk = Walk(model, batch, 0, torch.arange(size), Counts())
    settings = {
        rule: LayerConductanceAnalyzer(steps=STEPS, rule=rule, target="logit", of="output")  # type: ignore[arg-type]
        for rule in RULES
    }
    default = LayerConductanceAnalyzer(steps=STEPS)

    def training_passes() -> None:
        for _ in range(STEPS + 1):
            module(images).gather(1, labels[:, None]).sum().backward()
            module.zero_grad(set_to_none=True)

    def loop() -> list[torch.Tensor]:
        return [
            # what captum gives hangs on its graph: kept for twelve layers, the graphs are 14 GB and more
            LayerConductance(module, layer.module)
            .attribute(images, target=labels, n_steps=STEPS, method="riemann_trapezoid")
            .detach()
            for layer in model.layers
        ]

    training_passes()  # warm
    ours, full = [], []
    for _ in range(repeats):  # by turns, so that a busy machine hits both
        ours.append(seconds(lambda: conductances(walk, default)))
        full.append(seconds(training_passes))
    theirs: list[torch.Tensor] = []
    captum = seconds(lambda: theirs.extend(loop()))
    found = {}
    taken = {rule: seconds(lambda rule=rule: found.update({rule: conductances(walk, settings[rule])})) for rule in RULES}
    gap = max(float((u - t).abs().max()) for u, t in zip(found["left"].units, theirs, strict=True) if u is not None)
    ratios = [a / b for a, b in zip(ours, full, strict=True)]
    figures: dict[str, object] = {
        "batch": size,
        "layers": len(model.layers),
        "steps": STEPS,
        "ours / (n+1 forward+backward)": statistics.median(ratios),
        "the same, lowest and highest of the pairs": [round(min(ratios), 3), round(max(ratios), 3)],
        "captum loop / ours": captum / min(ours),
        "gauss_legendre / trapezoid, processor time": taken["gauss_legendre"] / taken["trapezoid"],
        "largest difference from captum (left rule)": gap,
    }
    figures |= {f"completeness error, {rule}": error(found[rule]) for rule in ("left", "trapezoid", "gauss_legendre")}
    print(json.dumps(figures, indent=2))
    return figures


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:]))
