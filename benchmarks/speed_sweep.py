"""Observing methods in one shared sweep against the dearest of them alone and the sum of all: processor time on a ViT-Tiny.

``python benchmarks/speed_sweep.py [rounds] [batch]`` prints ratios, by turns in one process with one thread.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timing import seconds

from layerwise.analyzer import ImportanceAnalyzer, Statistic
from layerwise.analyzers.attention_analysis import AttentionAnalyzer
from layerwise.analyzers.fisher_information import FisherInformationAnalyzer
from layerwise.analyzers.gradient_based import GradientBasedAnalyzer
from layerwise.analyzers.gradient_flow import GradientFlowAnalyzer
from layerwise.analyzers.information_bottleneck import InfoBottleneckAnalyzer
from layerwise.analyzers.layer_correlation import LayerCorrelationAnalyzer
from layerwise.analyzers.mutual_information import MutualInformationAnalyzer
from layerwise.analyzers.neuron_activation import NeuronActivationAnalyzer
from layerwise.analyzers.topology_analysis import TopologyAnalyzer
from layerwise.data import Batch, Data
from layerwise.feeding import Feeder
from layerwise.model import UniversalModel
from layerwise.task import Classification

TEN: Mapping[str, ImportanceAnalyzer] = {
    "fisher_information": FisherInformationAnalyzer(),
    "gradient_based": GradientBasedAnalyzer(),
    "gradient_based(activation)": GradientBasedAnalyzer(form="activation"),
    "gradient_flow": GradientFlowAnalyzer(),
    "attention_analysis": AttentionAnalyzer(),
    "neuron_activation": NeuronActivationAnalyzer(),
    "layer_correlation": LayerCorrelationAnalyzer(),
    "mutual_information": MutualInformationAnalyzer(),
    "information_bottleneck": InfoBottleneckAnalyzer(),
    "topology_analysis": TopologyAnalyzer(),
}


def subject(size: int) -> tuple[UniversalModel, Data]:
    """A ViT-Tiny of twelve blocks with random weights and two batches of `size` images."""
    torch.manual_seed(0)
    module = timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()
    batches = [Batch((torch.randn(size, 3, 224, 224),), {}, torch.randint(0, 10, (size,))) for _ in range(2)]
    model = UniversalModel(module, task=Classification(), example=batches[0].narrow(0, 2))
    assert len(model.layers) == 12
    return model, Data.of(batches)


def sweep(model: UniversalModel, data: Data, names: list[str]) -> None:
    """The statistics called `names`, fed with all of `data` in one pass."""
    statistics: dict[str, Statistic] = {n: s for n in names if (s := TEN[n].statistic(model)) is not None}
    feeder = Feeder(model, statistics, data, 0)
    for index in range(len(data)):
        feeder.feed(index)
    feeder.finish()


def main(rounds: int = 3, size: int = 16) -> dict[str, Any]:
    """Measures, prints and returns the figures."""
    torch.set_num_threads(1)
    model, data = subject(size)
    sweep(model, data, list(TEN))  # warm
    alone: dict[str, list[float]] = {name: [] for name in TEN}
    together = []
    for _ in range(rounds):
        for name, times in alone.items():
            times.append(seconds(lambda name=name: sweep(model, data, [name])))  # type: ignore[misc]
        together.append(seconds(lambda: sweep(model, data, list(TEN))))
    least = {name: min(times) for name, times in alone.items()}
    dearest = max(least, key=lambda n: least[n])
    figures = {
        "batch": size,
        "methods": len(TEN),
        "dearest": dearest,
        "all in one / the dearest alone": min(together) / least[dearest],
        "all in one / the sum of all": min(together) / sum(least.values()),
        "each alone / all in one": {name: round(value / min(together), 3) for name, value in least.items()},
    }
    print(json.dumps(figures, indent=2))
    return figures


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:]))
