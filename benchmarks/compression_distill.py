"""A student at half the layers of MiniLM on Banking77, with and without a teacher: ``python benchmarks/compression_distill.py``.

For each seed rows of the training split are drawn (the same number of each of the 77 intents), a linear head is fitted on the
frozen encoder with them (the teacher), and its copy with three of six layers is trained on the same rows by the same recipe: on
the labels alone, or under the teacher. Embeddings stay as they are. Contenders of a seed begin at the same weights and see the
same batches in the same order. The epoch is never chosen by the test rows: the last one counts. ``--pilot`` tries learning rates
for the student WITHOUT a teacher on rows of seed 9, judged on other training rows; the best of them is everybody's. ``--main``
leaves out the contenders that only explain, ``--quick`` shows that it runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from layerwise.benchmark.subjects import data_folder, minilm_encoder
from layerwise.config import RunConfig
from layerwise.data import Data
from layerwise.distillation import Distillation, Memory, cut_student
from layerwise.environment import environment
from layerwise.files import write_atomic
from layerwise.loading import load, load_data
from layerwise.measure import evaluate
from layerwise.model import UniversalModel
from layerwise.supplies import Supplies
from layerwise.task import Classification
from layerwise.tensors import byte_size
from layerwise.training import TASK_LOSS, Objective, TrainingSettings, only_training, train_

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "compression_distill.json"
COMMAND = "python benchmarks/compression_distill.py"
SUBJECT = "MiniLM + Banking77, 3 of 6 layers"
SEEDS = (0, 1, 2)
PER_CLASS, EPOCHS, RATE, BATCH, LETTERS, TESTED = 10, 5, 3e-4, 32, 100, 1540
RATES = (3e-4, 1e-3)
RECIPE = {"rows per intent": PER_CLASS, "epochs": EPOCHS, "learning rate": RATE, "batch": BATCH, "letters": LETTERS}
ALONE = "no teacher"
CONTENDERS: Mapping[str, tuple[str, ...]] = {ALONE: (), "response + feature": ("response", "feature")}
EXPLAINING: Mapping[str, tuple[str, ...]] = {"response": ("response",), "feature": ("feature",)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two rows of each intent, one seed, one epoch; writes nothing")
    parser.add_argument("--main", action="store_true", help="only the two contenders that the figure wanted is about")
    parser.add_argument("--pilot", action="store_true", help="only try learning rates for the student without a teacher")
    chosen = parser.parse_args()
    if chosen.pilot:
        pilot()
        return
    seeds, per_class, epochs, tested = ((0,), 2, 1, 154) if chosen.quick else (SEEDS, PER_CLASS, EPOCHS, TESTED)
    stages = [Stage(seed, per_class, tested) for seed in seeds]
    rows = [row for stage in stages for row in stage.untrained()]
    for contenders in (CONTENDERS,) if chosen.main else (CONTENDERS, EXPLAINING):
        rows += [stage.trained(name, terms, epochs) for stage in stages for name, terms in contenders.items()]
        if not chosen.quick:
            write(rows, seeds)


def write(rows: list[dict[str, Any]], seeds: Sequence[int]) -> None:
    machine = environment(RunConfig())
    result = {
        "command": COMMAND,
        "device": machine["cpu"],
        "threads": machine["threads"],
        "versions": machine["packages"],
        "seeds": list(seeds),
        "recipe": RECIPE | {"temperature": 4.0, "alpha": 0.7, "beta": 0.3, "optimizer": "adamw, cosine, 10 % warm-up"},
        "rows": rows,
    }
    write_atomic(RESULTS, json.dumps(result, indent=1) + "\n")
    print(section(result))


class Stage:
    """One seed: the teacher, the rows that all learn from, and those that all are judged on."""

    def __init__(self, seed: int, per_class: int, tested: int) -> None:
        self.seed = seed
        self.teacher, self.training = taught(seed, per_class)
        self.test = texts("test", self.teacher, None, seed, tested)
        self.memory = Memory()  # the contenders of a seed share what the teacher showed

    def untrained(self) -> Iterator[dict[str, Any]]:
        yield row(self.teacher, "teacher", self)
        yield row(cut_student(self.teacher, 3), "untrained student", self)

    def trained(self, name: str, terms: tuple[str, ...], epochs: int) -> dict[str, Any]:
        student, began = cut_student(self.teacher, 3), time.process_time()
        learn(student, self, Distillation(terms, memory=self.memory) if terms else TASK_LOSS, RATE, epochs)
        return row(student, name, self, time.process_time() - began)


def learn(student: UniversalModel, stage: Stage, objective: Objective, rate: float, epochs: int) -> None:
    recipe = TrainingSettings(epochs=epochs, learning_rate=rate, keep_best=False, seed=stage.seed)
    supplies = Supplies(training=stage.training, teacher=stage.teacher, executor="local")
    with only_training(student.module, [*(layer.module for layer in student.layers), student.module.head]):
        train_(student, supplies, objective, recipe)


def taught(seed: int, per_class: int) -> tuple[UniversalModel, Data]:
    """The encoder with a head fitted on the seed's rows, and these rows in batches."""
    bare = minilm_encoder()
    training = texts("train", bare, per_class, seed)
    teacher = load(bare, head=training)
    teacher.task = Classification()
    teacher.see(training[0])
    return teacher, training


def texts(
    split: str, model: UniversalModel, per_class: int | None, seed: int, rows: int | None = None, *, skipped: int = 0
) -> Data:
    """Rows of `split` drawn by the seed: `per_class` of each intent, `rows` of them, or all but the first
    `skipped` of each. Neighbours in length share a batch, so that little is padding.
    """
    table = pd.read_parquet(data_folder("banking77") / f"{split}.parquet").sample(frac=1, random_state=seed)
    names = {label: i for i, label in enumerate(sorted(table["category"].unique()))}
    table = table[table.groupby("category").cumcount() >= skipped]
    if per_class is not None:
        table = table.groupby("category").head(per_class)
    table = table.head(rows or len(table))
    table = table.sort_values("text", key=lambda texts: texts.str.len(), kind="stable")
    listed = [{"text": t[:LETTERS], "label": names[c]} for t, c in zip(table["text"], table["category"], strict=True)]
    return load_data(listed, model, batch_size=BATCH)


def row(model: UniversalModel, name: str, stage: Stage, seconds: float = 0.0) -> dict[str, Any]:
    means = evaluate(model, stage.test).means()
    found = {
        "subject": SUBJECT,
        "method": name,
        "setting": "",
        "seed": stage.seed,
        "task": "classification",
        "ratio": round(byte_size(model.module) / byte_size(stage.teacher.module), 4),
        "metrics": {metric: round(means[metric], 4) for metric in ("accuracy", "loss")},
        "processor seconds": round(seconds, 1),
        "teacher forwards": stage.memory.forwards,
        "samples": stage.test.samples,
    }
    print(found, flush=True)
    return found


def pilot() -> None:
    """Accuracy of the student without a teacher for each learning rate, on training rows that it does not learn from."""
    stage = Stage(9, PER_CLASS, 32)
    stage.test = texts("train", stage.teacher, None, 9, 1024, skipped=PER_CLASS)
    for rate in RATES:
        student = cut_student(stage.teacher, 3)
        learn(student, stage, TASK_LOSS, rate, EPOCHS)
        row(student, f"learning rate {rate:g}", stage)


def section(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    rows, recipe = result["rows"], result["recipe"]
    there = {r["method"] for r in rows}
    names = [name for name in ("teacher", *CONTENDERS, *EXPLAINING, "untrained student") if name in there]
    table = "\n".join(line(rows, name) for name in names)
    best = gain(rows, "response + feature")
    verdict = "reached" if statistics.mean(best) >= 1 else "missed"
    return f"""A student with three of the six layers of MiniLM, trained on {recipe["rows per intent"]} rows of each of the 77
intents of Banking77 for {recipe["epochs"]} epochs (AdamW, learning rate {recipe["learning rate"]:g}, embeddings fixed, texts cut
at {recipe["letters"]} letters), judged on {rows[0]["samples"]:,} test rows. The teacher is the whole encoder with a linear head
that was fitted on the same rows. The learning rate is the better of {" and ".join(f"{r:g}" for r in RATES)} for the student
*without* a teacher (`--pilot`). Mean and range over {len(result["seeds"])} seeds, which draw the rows; gains are in points
against no teacher, paired by seed.

| | bytes | accuracy | gain, points | processor seconds |
|---|---|---|---|---|
{table}

Wanted: response + feature at least 1 point better than no teacher; {verdict}: {spread(best)} points."""


def line(rows: list[dict[str, Any]], name: str) -> str:
    own = [r for r in rows if r["method"] == name]
    accuracy = spread([100 * r["metrics"]["accuracy"] for r in own]) + " %"
    learned = name in (*CONTENDERS, *EXPLAINING)
    against = spread(gain(rows, name)) if learned and name != ALONE else "–"
    seconds = f"{statistics.mean(r['processor seconds'] for r in own):.0f}" if learned else "–"
    return f"| {name} | {own[0]['ratio']:.2f}× | {accuracy} | {against} | {seconds} |"


def gain(rows: list[dict[str, Any]], name: str) -> list[float]:
    """Points of accuracy against the student without a teacher, seed by seed."""
    alone = {r["seed"]: r["metrics"]["accuracy"] for r in rows if r["method"] == ALONE}
    return [100 * (r["metrics"]["accuracy"] - alone[r["seed"]]) for r in rows if r["method"] == name]


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ({min(values):.2f} … {max(values):.2f})"


if __name__ == "__main__":
    main()
