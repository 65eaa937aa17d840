"""A student at half the layers of MiniLM on Banking77, with and without a teacher: ``python benchmarks/compression_distill.py``.

The finished model, which is the teacher, is the encoder with a linear head that was fitted on a part of the training split. Its
copy with three of six layers is trained on few of these rows (drawn by the seed, the same number of each of the 77 intents): on
the labels alone, or under the teacher. Embeddings stay as they are. Contenders of a seed begin at the same weights, by the same
recipe, and see the same batches in the same order. The epoch is never chosen by the test rows: the last one counts. ``--pilot``
tries learning rates for the student WITHOUT a teacher on rows of seed 9, judged on training rows that no model saw; ``--rate``
is everybody's. ``--all`` adds the contenders that only explain, ``--quick`` shows that it runs and writes nothing.

``--equal`` is the fairer comparison, kept beside the first: the teacher, head and layers, is trained on the very rows that its
student is given, so that it knows no more than the labels say; the rate is the pilot's best for the student without a teacher;
and each objective stands alone too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
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
PER_CLASS, TAUGHT, EPOCHS, RATE, BATCH, LETTERS, TESTED = 10, 60, 4, 3e-4, 32, 100, 1540
RATES = (1e-4, 3e-4, 1e-3)
EQUAL, LOWER_RATES, TEACHER_RATE = "equal rows", (3e-5, 1e-4, 3e-4), 1e-4
RECIPE = {
    "rows per intent": PER_CLASS,
    "teacher's rows per intent": TAUGHT,
    "epochs": EPOCHS,
    "learning rate": RATE,
    "batch": BATCH,
    "letters": LETTERS,
}
ALONE = "no teacher"
CONTENDERS: Mapping[str, tuple[str, ...]] = {ALONE: (), "response + feature": ("response", "feature")}
EXPLAINING: Mapping[str, tuple[str, ...]] = {"response": ("response",), "feature": ("feature",)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="little data, one seed, one epoch; writes nothing")
    parser.add_argument("--all", action="store_true", help="also the contenders that only explain")
    parser.add_argument("--pilot", action="store_true", help="only try learning rates for the student without a teacher")
    parser.add_argument(
        "--rate", type=float, help=f"the learning rate of all contenders ({RATE:g}; with --equal the pilot's best)"
    )
    parser.add_argument("--equal", action="store_true", help="the teacher knows no rows but its student's")
    chosen = parser.parse_args()
    if chosen.pilot:
        pilot(equal=chosen.equal)
    elif chosen.equal:
        equal_rows(chosen.rate, quick=chosen.quick)
    else:
        finished_teacher(chosen.rate or RATE, everything=chosen.all, quick=chosen.quick)


def finished_teacher(rate: float, *, everything: bool, quick: bool) -> None:
    """The teacher knows `TAUGHT` rows of each intent, its students a part of them."""
    seeds, per_class, taught_on, epochs, tested = ((0,), 2, 3, 1, 154) if quick else (SEEDS, PER_CLASS, TAUGHT, EPOCHS, TESTED)
    teacher = taught(texts("train", minilm_encoder(), 0, 0, taught_on))
    test = texts("test", teacher, 0, 0, None, tested)
    rows = [row(teacher, "teacher", 0, test), row(cut_student(teacher, 3), "untrained student", 0, test)]
    for seed in seeds:
        training = texts("train", teacher, seed, 0, per_class)
        rows += students(teacher, training, test, CONTENDERS | EXPLAINING if everything else CONTENDERS, rate, epochs, seed)
        if not quick:
            write({"seeds": list(seeds[: seed + 1]), "recipe": recipe(rate)}, rows)


def equal_rows(rate: float | None, *, quick: bool) -> None:
    """A teacher for each seed, trained on its student's rows alone."""
    seeds, per_class, epochs, tested = ((0,), 2, 1, 154) if quick else (SEEDS, PER_CLASS, EPOCHS, TESTED)
    tried = {} if rate else pilot(equal=True, rates=LOWER_RATES[:1] if quick else LOWER_RATES, epochs=epochs)
    rate = rate or max(tried, key=lambda candidate: tried[candidate])
    rows = list[dict[str, Any]]()
    for seed in seeds:
        teacher, training = trained_on(per_class, epochs, seed)
        test = texts("test", teacher, 0, 0, None, tested)
        rows += [row(teacher, "teacher", seed, test), row(cut_student(teacher, 3), "untrained student", seed, test)]
        rows += students(teacher, training, test, CONTENDERS | EXPLAINING, rate, epochs, seed)
        if not quick:
            about = {
                "command": f"{COMMAND} --equal",
                "seeds": list(seeds[: seed + 1]),
                "recipe": recipe(rate, PER_CLASS) | {"teacher's learning rate": TEACHER_RATE},
            }
            write({EQUAL: about | {"pilot": {f"{r:g}": accuracy for r, accuracy in tried.items()}}}, rows, EQUAL)


def trained_on(per_class: int, epochs: int, seed: int) -> tuple[UniversalModel, Data]:
    """A teacher whose head was fitted, and whose layers were then trained, on the rows that its student is given; these rows."""
    teacher = taught(texts("train", minilm_encoder(), seed, 0, per_class))
    training = texts("train", teacher, seed, 0, per_class)
    learn(teacher, Supplies(training=training, executor="local"), TASK_LOSS, TEACHER_RATE, epochs, seed)
    return teacher, training


def students(
    teacher: UniversalModel, training: Data, test: Data, contenders: Mapping[str, tuple[str, ...]], rate: float, epochs: int,
    seed: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of one seed; what the teacher shows is shared."""
    rows, memory = [], Memory()
    for name, terms in contenders.items():
        student, began = cut_student(teacher, 3), time.process_time()
        supplies = Supplies(training=training, teacher=teacher, executor="local")
        learn(student, supplies, Distillation(terms, memory=memory) if terms else TASK_LOSS, rate, epochs, seed)
        rows.append(row(student, name, seed, test, time.process_time() - began))
    return rows


def recipe(rate: float, known: int = TAUGHT) -> dict[str, Any]:
    """What all contenders have in common."""
    changed = {"teacher's rows per intent": known, "learning rate": rate, "temperature": 4.0, "alpha": 0.7, "beta": 0.3}
    return RECIPE | changed | {"optimizer": "adamw, cosine, 10 % warm-up"}


def write(about: dict[str, Any], rows: list[dict[str, Any]], setting: str = "") -> None:
    """Puts the rows of `setting` in the place of those that there are, and leaves those of the other."""
    machine = environment(RunConfig())
    old = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"rows": []}
    made = {"command": COMMAND, "device": machine["cpu"], "threads": machine["threads"], "versions": machine["packages"]}
    others = [r for r in old["rows"] if r["setting"] != setting]
    mine = [r | {"setting": setting} for r in rows]
    result = old | made | about | {"rows": [*mine, *others] if not setting else [*others, *mine]}
    write_atomic(RESULTS, json.dumps(result, indent=1) + "\n")
    print(section(result))


def learn(student: UniversalModel, supplies: Supplies, objective: Objective, rate: float, epochs: int, seed: int) -> None:
    settings = TrainingSettings(epochs=epochs, learning_rate=rate, keep_best=False, seed=seed)
    with only_training(student.module, [*(layer.module for layer in student.layers), student.module.head]):
        train_(student, supplies, objective, settings)


def taught(rows: Data) -> UniversalModel:
    """The encoder with a head fitted on `rows`."""
    teacher = load(minilm_encoder(), head=rows)
    teacher.task = Classification()
    teacher.see(rows[0])
    return teacher


def texts(split: str, model: UniversalModel, seed: int, start: int, stop: int | None, rows: int | None = None) -> Data:
    """Of `split` the rows start … stop − 1 of each intent, or `rows` of them. What a seed draws for a student is drawn from the
    teacher's rows. Neighbours in length share a batch, so that little is padding.
    """
    table = pd.read_parquet(data_folder("banking77") / f"{split}.parquet").sample(frac=1, random_state=0)
    names = {label: i for i, label in enumerate(sorted(table["category"].unique()))}
    place = table.groupby("category").cumcount()
    if seed and stop is not None:
        table = table[place < TAUGHT].sample(frac=1, random_state=seed)
        place = table.groupby("category").cumcount()
    table = table[(place >= start) & (place < (len(table) if stop is None else stop))].head(rows or len(table))
    table = table.sort_values("text", key=lambda found: found.str.len(), kind="stable")
    listed = [{"text": t[:LETTERS], "label": names[c]} for t, c in zip(table["text"], table["category"], strict=True)]
    return load_data(listed, model, batch_size=BATCH)


def row(model: UniversalModel, name: str, seed: int, test: Data, seconds: float = 0.0) -> dict[str, Any]:
    means = evaluate(model, test).means()
    found = {
        "subject": SUBJECT,
        "method": name,
        "setting": "",
        "seed": seed,
        "task": "classification",
        "bytes": byte_size(model.module),
        "metrics": {metric: round(means[metric], 4) for metric in ("accuracy", "loss")},
        "processor seconds": round(seconds, 1),
        "samples": test.samples,
    }
    print(found, flush=True)
    return found


def pilot(*, equal: bool, rates: Sequence[float] | None = None, epochs: int = EPOCHS) -> dict[float, float]:
    """Learning rate → accuracy of the student without a teacher, on training rows that no model saw."""
    if equal:
        teacher, training = trained_on(PER_CLASS, epochs, 9)
    else:
        teacher = taught(texts("train", minilm_encoder(), 0, 0, TAUGHT))
        training = texts("train", teacher, 9, 0, PER_CLASS)
    held_out = texts("train", teacher, 0, TAUGHT, None, 1024)
    row(teacher, "teacher, rows held out", 9, held_out)
    found = {}
    for rate in rates or (LOWER_RATES if equal else RATES):
        student = cut_student(teacher, 3)
        learn(student, Supplies(training=training, executor="local"), TASK_LOSS, rate, epochs, 9)
        found[rate] = row(student, f"learning rate {rate:g}, rows held out", 9, held_out)["metrics"]["accuracy"]
    return found


def section(result: dict[str, Any]) -> str:
    """Both settings in Markdown."""
    first = [r for r in result["rows"] if r["setting"] != EQUAL]
    equal = [r for r in result["rows"] if r["setting"] == EQUAL]
    return "\n\n".join([_finished(result, first), *([_equal(result[EQUAL], equal)] if equal else [])])


def _equal(result: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    tried = ", ".join(f"{100 * accuracy:.1f} % at {rate}" for rate, accuracy in result["pilot"].items())
    chosen = f": on other rows (one seed) that one was right on {tried}" if tried else ""
    if tried and result["recipe"]["learning rate"] == max(map(float, result["pilot"])):
        chosen += "; larger ones were not tried"
    return f"""**Equal rows** (`{result["command"]}`). The teacher is trained on the very rows that its student is given,
{result["recipe"]["rows per intent"]} of each intent, a teacher for each seed: first its head alone, then its layers by the recipe
of the students at {result["recipe"]["teacher's learning rate"]:g}. Students are cut from it. Their learning rate is
{result["recipe"]["learning rate"]:g}, the best of those tried for the student without a teacher{chosen}. The rest is as above,
and each objective stands alone too.

{table(rows)}

Wanted: response + feature at least 1 point better than no teacher; {verdict(rows)}."""


def _finished(result: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    recipe = result["recipe"]
    known = recipe["teacher's rows per intent"]
    return f"""The teacher is MiniLM with a linear head that was fitted on {known} rows (or all that there are) of each of the 77
intents of Banking77. The student, its copy with three of the six layers, is trained on
{recipe["rows per intent"]} of these rows per intent for {recipe["epochs"]} epochs (AdamW, learning rate
{recipe["learning rate"]:g}, embeddings fixed, texts cut at {recipe["letters"]} letters); judged are {rows[0]["samples"]:,} test
rows. All have the same learning rate, which is not each one's best: on other rows (`--pilot`, one seed) the student *without* a
teacher was right on 84.5 % after training at 1e-4, 83.4 % at 3e-4 and 78.9 % at 1e-3.
Mean and range over {len(result["seeds"])} seeds, which draw the student's rows; gains are in points against no teacher, paired
by seed. The teacher knows more rows than the student is given: this is the case of a finished model that is compressed with a
sample of its data, and part of the gain is that knowledge.

{table(rows)}

Wanted: response + feature at least 1 point better than no teacher; {verdict(rows)}."""


def table(rows: list[dict[str, Any]]) -> str:
    there = {r["method"] for r in rows}
    names = [name for name in ("teacher", *CONTENDERS, *EXPLAINING, "untrained student") if name in there]
    head = "| | bytes | accuracy | gain, points | processor seconds |\n|---|---|---|---|---|\n"
    return head + "\n".join(line(rows, name) for name in names)


def verdict(rows: list[dict[str, Any]]) -> str:
    best = gain(rows, "response + feature")
    return f"{'reached' if statistics.mean(best) >= 1 else 'missed'}: {spread(best)} points"


def line(rows: list[dict[str, Any]], name: str) -> str:
    own = [r for r in rows if r["method"] == name]
    accuracy = spread([100 * r["metrics"]["accuracy"] for r in own]) + " %"
    learned = name in (*CONTENDERS, *EXPLAINING)
    against = spread(gain(rows, name)) if learned and name != ALONE else "–"
    seconds = f"{statistics.mean(r['processor seconds'] for r in own):.0f}" if learned else "–"
    return f"| {name} | {own[0]['bytes'] / rows[0]['bytes']:.2f}× | {accuracy} | {against} | {seconds} |"


def gain(rows: list[dict[str, Any]], name: str) -> list[float]:
    """Points of accuracy against the student without a teacher, seed by seed."""
    alone = {r["seed"]: r["metrics"]["accuracy"] for r in rows if r["method"] == ALONE}
    return [100 * (r["metrics"]["accuracy"] - alone[r["seed"]]) for r in rows if r["method"] == name]


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ({min(values):.2f} … {max(values):.2f})"


if __name__ == "__main__":
    main()
