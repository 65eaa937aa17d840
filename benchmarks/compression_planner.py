"""The planner against uniform, random and last-k at equal bytes: ``python benchmarks/compression_planner.py [--quick]``.

On each subject and budget all contenders draw from the same menu, see the same planning samples (a random three quarters of a
pool, by seed), calibrate on the same part of them, are not tuned afterwards, and are judged on test samples that none of them
saw: by the task's quality and by the divergence from the unchanged model, both paired sample by sample. The rivals are those of
``planner_rivals.py``. ``--subjects`` does a part.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from planner_page import CONTENDERS, RIVALS, section
from planner_rivals import at_random, last_k, uniform
from torch import Tensor

from layerwise.benchmark.subjects import SUBJECTS, Parts, data_folder
from layerwise.compress.drop_layers import DropLayers
from layerwise.compress.gptq import Gptq
from layerwise.compress.half_embeddings import HalfEmbeddings
from layerwise.compress.half_precision import HalfPrecision
from layerwise.compress.half_weights import HalfWeights
from layerwise.compress.low_rank import LowRank
from layerwise.compress.packed_embeddings import PackedEmbeddings
from layerwise.compress.structured_pruning import StructuredPruning
from layerwise.compress.weight_only import WeightOnly
from layerwise.data import Data
from layerwise.errors import LayerwiseError
from layerwise.loading import load_data
from layerwise.method import METHODS, CompressionMethod, apply_plan
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan, Step
from layerwise.planner import Planner
from layerwise.planning.actions import label_of
from layerwise.target import Target
from layerwise.task import task_named
from layerwise.tensors import byte_size

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "compression_planner.json"
COMMAND = "python benchmarks/compression_planner.py"
SUBJECTS_USED = ("digits_vit", "stories260k", "resnet20", "fsdd_cnn", "minilm_sst2", "minilm_banking77")
BUDGETS = (0.5, 0.35, 0.25)
SEEDS = (0, 1, 2)
FORWARDS = {"minilm_sst2": 40.0, "minilm_banking77": 40.0}  # passes that planning may take, where 60 would take minutes
METRIC = {"classification": "accuracy", "language_modelling": "loss"}
TESTS = {"resnet20": 5_000, "minilm_sst2": 600, "minilm_banking77": 600}  # where the data has more than the subject takes
WRITTEN = {"minilm_sst2": ("sst2", "label"), "minilm_banking77": ("banking77", "category")}
CALIBRATED = frozenset(name for name, method in METHODS.items() if method.needs) | {"low_rank", "structured_pruning"}


def menu() -> list[CompressionMethod]:
    bits = [HalfWeights(), *map(WeightOnly, (8, 6, 5, 4, 3, 2)), Gptq(4), Gptq(3)]
    cuts = [LowRank(0.75), LowRank(0.5), LowRank(0.25)]
    sliced = [StructuredPruning(0.25), StructuredPruning(0.5)]
    tables = [HalfEmbeddings(), *map(PackedEmbeddings, (8, 6, 5, 4))]
    return [DropLayers(), *bits, *cuts, *sliced, HalfPrecision("bfloat16"), *tables]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subjects", nargs="*", choices=SUBJECTS_USED, default=SUBJECTS_USED)
    parser.add_argument("--quick", action="store_true", help="one seed; the committed results stay as they are")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for name in chosen.subjects:
        begun = time.process_time()
        match = Match(name, SUBJECTS[name].open())
        for seed in SEEDS[:1] if chosen.quick else SEEDS:
            for row in match.seeded(seed):
                print(_line(row), flush=True)
        print(f"{name}: {time.process_time() - begun:.0f} s of CPU", flush=True)
        if not chosen.quick:
            write(match)


def write(match: Match) -> None:
    """The results with this subject's in the place of its earlier ones."""
    from layerwise.files import write_atomic

    old = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    about = {"command": COMMAND, "device": "cpu", "threads": torch.get_num_threads(), "versions": versions()}
    result = about | {"seeds": list(SEEDS), "subjects": list(SUBJECTS_USED), "menu": ", ".join(map(label_of, menu()))}
    for key, fresh in (("rows", match.rows), ("cells", list(match.cells()))):
        kept = [entry for entry in old.get(key, []) if entry["subject"] != match.name] + fresh
        result[key] = sorted(kept, key=lambda entry: SUBJECTS_USED.index(entry["subject"]))
    write_atomic(RESULTS, json.dumps(result, indent=1) + "\n")


def versions() -> dict[str, str]:
    return {package: version(package) for package in ("torch", "transformers", "scipy")}


def _line(row: Mapping[str, Any]) -> str:
    figures = " ".join(f"{row[key]:.6g}" for key in ("ratio", "quality", "damage") if key in row)
    more = {k: row[k] for k in ("cpu_seconds", "forwards", "failure", "steps") if k in row}
    return f"  {row['setting']} seed {row['seed']} {row['method']:8} {figures} {more}"


@dataclass(frozen=True)
class Judged:
    """Per test sample: `quality` (higher is better) and `damage` in nats, each (samples,), with the samples' weights."""

    quality: Tensor
    damage: Tensor
    weight: Tensor

    def mean(self, kind: str) -> float:
        return float((getattr(self, kind) * self.weight).sum() / self.weight.sum())


@dataclass
class Match:
    """All contenders on one subject."""

    name: str
    parts: Parts
    rows: list[dict[str, Any]] = field(default_factory=list)
    judged: dict[tuple[str, str, int], Judged] = field(default_factory=dict)  # (contender, budget, seed)
    known: dict[tuple[Step, ...], tuple[Judged, float]] = field(default_factory=dict)  # where the seed makes no difference

    def __post_init__(self) -> None:
        self.model = self.parts.model
        self.tests = tests(self.name, self.parts)
        self.references = [self.model.predict(batch) for batch in self.tests]
        self.whole = self.judge(self.model).mean("quality")

    def seeded(self, seed: int) -> Iterator[dict[str, Any]]:
        """The rows of one seed: one table, every budget."""
        planning = drawn(self.parts, seed)
        planner = Planner(self.model, None, [], planning, menu(), seed=seed, forwards=FORWARDS.get(self.name, 60.0))
        for budget in BUDGETS:
            setting, limit = f"size<={budget}x", budget * byte_size(self.model.module)
            makers: dict[str, Callable[[], tuple[Step, ...] | None]] = {
                "planner": lambda t=setting: planner.choose([Target.parse(t)]).steps,  # type: ignore[misc]  # first: it makes the table
                "uniform": lambda at=limit: uniform(planner, at),  # type: ignore[misc]
                "random": lambda at=limit: at_random(planner, at, seed),  # type: ignore[misc]
                "last-k": lambda at=limit: last_k(planner, at),  # type: ignore[misc]
            }
            for method, make in makers.items():
                row = {"subject": self.name, "method": method, "setting": setting, "seed": seed}
                self.rows.append(row | self._figures((method, setting, seed), make, planner))
                yield self.rows[-1]

    def _figures(
        self, key: tuple[str, str, int], make: Callable[[], tuple[Step, ...] | None], planner: Planner
    ) -> dict[str, Any]:
        begun, spent = time.process_time(), planner.meter.spent if hasattr(planner, "meter") else 0.0
        try:
            steps = make()
        except LayerwiseError as error:
            return {"failure": str(error)}
        if steps is None:
            return {"failure": "no choice within the budget"}
        took = {"cpu_seconds": round(time.process_time() - begun, 1), "forwards": round(planner.meter.spent - spent, 1)}
        found, ratio = self._judged(steps, planner)
        self.judged[key] = found
        figures = {kind: float(f"{found.mean(kind):.6g}") for kind in ("quality", "damage")}
        assert self.model.task is not None  # subjects come with one
        about = {"ratio": round(ratio, 4), "metrics": {}, "task": self.model.task.name, "metric": METRIC[self.model.task.name]}
        return took | about | figures | {"whole": round(self.whole, 6), "steps": told(steps)}

    def _judged(self, steps: tuple[Step, ...], planner: Planner) -> tuple[Judged, float]:
        if steps in self.known:
            return self.known[steps]
        changed = apply_plan(self.model, CompressionPlan(steps), planner.supplies).model
        found = self.judge(changed), byte_size(changed.module) / byte_size(self.model.module)
        if not any(step.method in CALIBRATED for step in steps):
            self.known[steps] = found
        return found

    def judge(self, changed: UniversalModel) -> Judged:
        task, fidelity = self.model.task, task_named("fidelity")
        assert task is not None  # subjects come with one
        sign = 1 if METRIC[task.name] == "accuracy" else -1
        parts = []
        for batch, reference in zip(self.tests, self.references, strict=True):
            output = changed.predict(batch)
            value, weight = task.figures(output, batch, reference)[METRIC[task.name]]
            apart, count = fidelity.figures(output, batch, reference)["loss"]
            parts.append([x.double() for x in (sign * value / weight.clamp_min(1e-12), apart / count.clamp_min(1e-12), weight)])
        return Judged(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def cells(self) -> Iterator[dict[str, Any]]:
        """Per budget the means over seeds, and the planner's paired gaps to each rival with two standard errors."""
        assert self.model.task is not None  # subjects come with one
        for setting in dict.fromkeys(setting for _, setting, _ in self.judged):
            by = {m: {s: j for (who, at, s), j in self.judged.items() if (who, at) == (m, setting)} for m in CONTENDERS}
            means = {
                m: {kind: sum(j.mean(kind) for j in found.values()) / len(found) for kind in ("quality", "damage")}
                for m, found in by.items()
                if found
            }
            gaps = {m: gap(by["planner"], by[m]) for m in RIVALS if by[m] and by["planner"]}
            about = {"subject": self.name, "budget": setting, "metric": METRIC[self.model.task.name]}
            yield about | {"tests": self.tests.samples, "whole": self.whole, "means": means, "gaps": gaps}


def gap(ours: Mapping[int, Judged], theirs: Mapping[int, Judged]) -> dict[str, dict[str, float]]:
    """The mean difference over seeds and test samples, and two standard errors over the samples of their means over seeds."""
    found = {}
    for kind in ("quality", "damage"):
        seeds = [s for s in ours if s in theirs]
        apart = torch.stack([getattr(ours[s], kind) - getattr(theirs[s], kind) for s in seeds]).mean(0)
        weight = ours[seeds[0]].weight
        mean = float((apart * weight).sum() / weight.sum())
        noise = 2 * float((((apart - mean) * weight) ** 2).sum() ** 0.5 / weight.sum())
        found[kind] = {"mean": mean, "noise": noise}
    return found


def tests(name: str, parts: Parts) -> Data:
    """The subject's test samples, or more where the data has more; ready tensors, as they are read dozens of times."""
    if name not in TESTS:
        return parts.evaluation
    if name == "resnet20":
        return Data.of(list(load_data(data_folder("cifar10_jpeg"), parts.model, "test", TESTS[name], 100)), name="test")
    folder, column = WRITTEN[name]
    train, test = (pd.read_parquet(data_folder(folder) / f"{split}.parquet") for split in ("train", "test"))
    names = {label: i for i, label in enumerate(sorted(train[column].unique()))}
    rows = test.sample(TESTS[name], random_state=0)
    listed = [{"text": t[:160], "label": names[y]} for t, y in zip(rows["text"], rows[column], strict=True)]
    return Data.of(list(load_data(listed, parts.model, batch_size=32)), name="test")


def drawn(parts: Parts, seed: int) -> Data:
    """Three quarters of the batches that are not the test's, in a random order."""
    batches = [*parts.calibration, *parts.second]
    picked = random.Random(seed).sample(range(len(batches)), round(0.75 * len(batches)))
    return Data.of([batches[i] for i in picked], name=f"planning-{seed}")


def told(steps: tuple[Step, ...]) -> dict[str, int]:
    """Method → on how many layers."""
    found: dict[str, int] = {}
    for step in steps:
        bits = step.settings.get("bits")
        name = f"{step.method} {bits}" if bits else step.method
        found[name] = found.get(name, 0) + len(step.layers)
    return found


__all__ = ["Match", "main", "section"]

if __name__ == "__main__":
    main()
