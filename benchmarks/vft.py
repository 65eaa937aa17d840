"""A VFT, its dense twin and a dense net of its size, trained alike on three tasks; and what a block costs beside a dense one.

``python benchmarks/vft.py --data FOLDER`` writes ``benchmarks/results/vft.json`` after every run and goes on where it stopped;
``python benchmarks/vft_page.py`` makes ``docs/vft.md`` of it. The data folder holds ``fsdd/fsdd.parquet``,
``tinyshakespeare/input.txt``, ``stories260k``, ``tinystories_sample`` and ``sst2``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from timing import machine
from vft_convert import MODELS, conversions
from vft_cost import costs, memory
from vft_dense import dense, matched, parameters
from vft_tasks import TASKS, TaskData, quality, trained

from layerwise.data import Batch
from layerwise.native import VFTModel
from layerwise.trace import traced

RESULTS = Path(__file__).parent / "results" / "vft.json"
SEEDS = (0, 1, 2)
NETS: Mapping[str, Callable[[TaskData], VFTModel]] = {
    "VFT": lambda task: VFTModel(task.settings),
    "dense twin": lambda task: dense(task.settings),
    "dense, as many parameters": lambda task: matched(task.settings),
}


def run(task: TaskData, net: str, seed: int) -> dict[str, Any]:
    """Trains one net. `macs` are those of one test sample; `off_plane` and `gate` per block on the first 64 test samples."""
    torch.manual_seed(seed)
    model = NETS[net](task)
    started = time.process_time()
    trained(model, task, seed)
    row: dict[str, Any] = {"seed": seed, "width": model.settings.d_model, "parameters": parameters(model)}
    row["train_seconds"] = round(time.process_time() - started, 1)
    row[task.metric] = round(quality(model, task), 5)
    sample = {task.argument: task.test[0][:64]}
    row["macs"] = traced(model, Batch((), sample)).macs // 64
    if net == "VFT":
        found = model.statistics(**sample)
        row["off_plane"] = [round(float(s.mean), 3) for s in found]
        row["gate"] = [round(float(s.share), 3) for s in found]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--part", choices=("train", "cost", "memory", "convert", "all"), default="all")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.part in ("train", "all"):
        train(chosen.data)
    if chosen.part in ("cost", "all"):
        write({"cost": costs()})
    if chosen.part in ("memory", "all"):
        write({"memory": memory()})
    if chosen.part in ("convert", "all"):
        for name in MODELS:
            write({"converted": read().get("converted", {}) | {name: conversions(name, chosen.data)}})


def train(folder: Path) -> None:
    """All runs that the results do not hold yet."""
    tasks = {name: make(folder) for name, make in TASKS.items()}
    about = {name: (task.metric, task.steps, task.batch, task.settings.to_dict()) for name, task in tasks.items()}
    named = {n: dict(zip(("metric", "steps", "batch", "settings"), v, strict=True)) for n, v in about.items()}
    write({"machine": machine(), "tasks": named})
    for seed, name, net in itertools.product(SEEDS, TASKS, NETS):
        runs = read().get("runs", {})
        rows = runs.setdefault(name, {}).setdefault(net, [])
        if all(row["seed"] != seed for row in rows):
            rows.append(run(tasks[name], net, seed))
            write({"runs": runs})
            print(name, net, rows[-1], flush=True)


def read() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}


def write(parts: Mapping[str, Any]) -> None:
    """Exchanges these parts of the results and keeps the others."""
    RESULTS.write_text(json.dumps(read() | dict(parts), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
