"""Digits as image, speech and word: two small models, trained with modalities left out at random, and what the analyses say.

``LAYERWISE_DATA=DIR python benchmarks/trimodal.py`` writes ``benchmarks/results/trimodal.json``, the figures of
``docs/multimodal.md``: mean and standard deviation over seeds, which draw the pairs, the weights and what is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn import functional

from layerwise.data import Data
from layerwise.loading import load, load_data
from layerwise.model import UniversalModel
from layerwise.multimodal import MultiModalAnalysis, MultiModalReport

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "trimodal.json"
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TESTED = 300  # all that FSDD's official test split has
TRAINED = 8000  # of MNIST's test images the first ones go with training speech, the rest with test speech


def pairs(folder: Path, split: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Rows with an image, a clip and a word of the same digit; no image and no clip of one split is in the other."""
    clips = pd.read_parquet(folder / "fsdd" / "fsdd.parquet")
    clips = clips[clips["split"] == split].sample(count, random_state=seed)
    with np.load(folder / "mnist_t10k" / "t10k.npz") as digits:
        images, labels = digits["x"], digits["y"]
    numbers = np.arange(len(labels))
    ours = (numbers < TRAINED) == (split == "train")
    random = np.random.default_rng(seed)
    drawn = [random.choice(numbers[ours & (labels == digit)]) for digit in clips["digit"]]
    return [
        {"image": images[i], "audio": clip, "text": WORDS[digit], "label": int(digit)}
        for i, clip, digit in zip(drawn, clips["flac"], clips["digit"], strict=True)
    ]


def train_(model: UniversalModel, data: Data, epochs: int, seed: int) -> None:
    """AdamW on the cross entropy; each batch lacks a random set of modalities, so that missing ones are nothing new to it."""
    batches, names = list(data), model.adapter.modalities
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.module.parameters(), 2e-3)
    model.module.train()
    for _ in range(epochs):
        for batch in batches:
            there = int(torch.randint(2 ** len(names), (1,), generator=generator))
            changed = model.adapter.masked(batch, [name for i, name in enumerate(names) if not there >> i & 1])
            optimizer.zero_grad()
            functional.cross_entropy(model.module(**changed.kwargs), batch.labels).backward()
            optimizer.step()
    model.module.eval()


def accuracy(model: UniversalModel, data: Data, missing: Sequence[str] = ()) -> float:
    """The share of right answers without some modalities."""
    hits = [model.predict(model.adapter.masked(batch, missing)).argmax(-1) == batch.labels for batch in data]
    return float(torch.cat(hits).double().mean())


def trained(kind: str, folder: Path, rows: int, epochs: int, seed: int, tested: int = TESTED) -> tuple[UniversalModel, Data]:
    """The model ``examples/trimodal.py:KIND``, trained, and test rows."""
    torch.manual_seed(seed)
    model = load(f"{ROOT}/examples/trimodal.py:{kind}")
    train_(model, load_data(pairs(folder, "train", rows, seed), model, batch_size=50), epochs, seed)
    return model, load_data(pairs(folder, "test", tested, seed), model, batch_size=50)


def figures(model: UniversalModel, data: Data, report: MultiModalReport) -> dict[str, float]:
    """What the page shows, by name."""
    names = report.modalities
    found = {"accuracy": accuracy(model, data)}
    found |= {f"accuracy with {name} alone": accuracy(model, data, [n for n in names if n != name]) for name in names}
    found |= {f"cost without {name}": cost.value for name, cost in report.missing_cost.items()}
    for (a, b), parts in report.modal_complementarity.items():
        pair = f"{a} and {b}: "
        found |= {f"{pair}redundancy": parts.redundancy.value, f"{pair}synergy": parts.synergy.value}
        found |= {f"{pair}{name} alone": part.value for name, part in parts.unique.items()}
        found[f"{pair}interaction"] = report.modal_interaction_strength.interactions[a, b].value
    found |= {f"interacting in {layer}": fusion.fused for layer, fusion in report.information_fusion_analysis.items()}
    return found | {f"cross-attention in {layer}": seen.cross.value for layer, seen in report.cross_attention_analysis.items()}


def spread(runs: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Name → mean and standard deviation over the seeds."""
    values = {name: [run[name] for run in runs] for name in runs[0]}
    return {name: [round(statistics.mean(v), 4), round(statistics.stdev(v), 4)] for name, v in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=15)
    given = parser.parse_args()
    folder = Path(os.environ.get("LAYERWISE_DATA", ROOT / "data"))
    torch.set_num_threads(1)
    started = time.perf_counter()
    results: dict[str, Any] = {"device": "cpu, 1 thread", **vars(given), "test rows": TESTED}
    for kind in ("fusion", "late"):
        runs = []
        for seed in range(given.seeds):
            model, data = trained(kind, folder, given.rows, given.epochs, seed)
            runs.append(figures(model, data, MultiModalAnalysis(batch_size=50).analyze(model, data)))
        results[kind] = spread(runs)
    results["seconds"] = round(time.perf_counter() - started)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
