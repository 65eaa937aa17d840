"""The planner against uniform, random and last-k at equal bytes: ``python benchmarks/compression_planner.py [--quick]``.

On each subject and budget all contenders draw from the same menu, see the same planning samples (a random three quarters of a
pool, by seed), calibrate on them, are not tuned afterwards, and are judged on test samples that none of them saw. *uniform* is
the best uniform choice on the planning samples: one action on all layers, on the best of the whole-model methods. *random* takes
random layers to random cheaper actions until the budget is met. *last-k* drops the last layers, as few as it takes.
``--subjects`` does a part.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerwise.benchmark.subjects import SUBJECTS, Parts
from layerwise.compress.drop_layers import DropLayers
from layerwise.compress.half_precision import HalfPrecision
from layerwise.compress.low_rank import LowRank
from layerwise.compress.packed_embeddings import PackedEmbeddings
from layerwise.compress.structured_pruning import StructuredPruning
from layerwise.compress.weight_only import WeightOnly
from layerwise.data import Data
from layerwise.errors import LayerwiseError
from layerwise.method import CompressionMethod, apply_plan
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan, Step
from layerwise.planner import Planner
from layerwise.planning.actions import Table
from layerwise.planning.solve import smallest
from layerwise.planning.uniform import uniform_choices
from layerwise.planning.wholes import Whole
from layerwise.supplies import Supplies
from layerwise.target import Target
from layerwise.task import task_named
from layerwise.tensors import byte_size

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "compression_planner.json"
COMMAND = "python benchmarks/compression_planner.py"
SUBJECTS_USED = ("digits_vit", "stories260k", "resnet20", "fsdd_cnn", "minilm_sst2", "minilm_banking77")
BUDGETS = (0.5, 0.35, 0.25)
SEEDS = (0, 1, 2)
RIVALS = ("uniform", "random", "last-k")
FORWARDS = {"minilm_sst2": 30.0, "minilm_banking77": 30.0}  # passes that planning may take, where 100 would take minutes
METRIC = {"classification": "accuracy", "language_modelling": "loss"}


def menu() -> list[CompressionMethod]:
    bits = [WeightOnly(8), WeightOnly(4), WeightOnly(3), WeightOnly(2)]
    cuts = [LowRank(0.75), LowRank(0.5), LowRank(0.25)]
    sliced = [StructuredPruning(0.25), StructuredPruning(0.5)]
    return [DropLayers(), *bits, *cuts, *sliced, HalfPrecision("bfloat16"), PackedEmbeddings(8), PackedEmbeddings(4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subjects", nargs="*", choices=SUBJECTS_USED, default=SUBJECTS_USED)
    parser.add_argument("--quick", action="store_true", help="one subject, one seed; the committed results stay as they are")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    seeds = SEEDS[:1] if chosen.quick else SEEDS
    for name in SUBJECTS_USED[:1] if chosen.quick else chosen.subjects:
        parts, begun = SUBJECTS[name].open(), time.process_time()
        rows = []
        for seed in seeds:
            for row in seeded(name, parts, seed):
                rows.append(row)
                print(_line(row), flush=True)
        print(f"{name}: {time.process_time() - begun:.0f} s of CPU", flush=True)
        if not chosen.quick:
            write(rows)


def write(rows: list[dict[str, Any]]) -> None:
    """The results with these rows in the place of the subject's earlier ones."""
    from layerwise.files import write_atomic

    old = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.exists() else []
    fresh = {row["subject"] for row in rows}
    kept = [row for row in old if row["subject"] not in fresh] + rows
    kept.sort(key=lambda row: SUBJECTS_USED.index(row["subject"]))
    about = {"command": COMMAND, "device": "cpu", "threads": torch.get_num_threads(), "versions": versions()}
    names = [m.name for m in menu()]
    result = about | {"seeds": list(SEEDS), "menu": list(dict.fromkeys(names)), "rows": kept}
    write_atomic(RESULTS, json.dumps(result, indent=1) + "\n")


def versions() -> dict[str, str]:
    return {package: version(package) for package in ("torch", "transformers", "scipy")}


def _line(row: Mapping[str, Any]) -> str:
    figures = f"{row.get('ratio', math.nan):.3f} {row.get('quality', math.nan):.4f} {row.get('divergence', math.nan):.4f}"
    return f"  {row['setting']} seed {row['seed']} {row['method']:8} {figures} {row.get('cpu_seconds')} {row.get('failure', '')}"


def seeded(subject: str, parts: Parts, seed: int) -> Iterator[dict[str, Any]]:
    """The rows of one subject and seed: one table, every budget."""
    model, planning = parts.model, drawn(parts, seed)
    planner = Planner(model, None, [], planning, menu(), seed=seed, calibration=planning, forwards=FORWARDS.get(subject, 100.0))
    references = [model.predict(batch) for batch in parts.evaluation]
    whole = judged(model, model, parts.evaluation, references)
    for budget in BUDGETS:
        target = Target.parse(f"size<={budget}x")
        contenders = {"planner": lambda t=target: planner.choose([t]).steps}  # type: ignore[misc]  # first: it makes the table
        limit = budget * byte_size(model.module)
        contenders |= {
            "uniform": lambda at=limit: uniform(planner, at),  # type: ignore[misc]
            "random": lambda at=limit: at_random(planner, at, seed),  # type: ignore[misc]
            "last-k": lambda at=limit: last_k(planner, at),  # type: ignore[misc]
        }
        for method, make in contenders.items():
            begun = time.process_time()
            row: dict[str, Any] = {"subject": subject, "method": method, "setting": f"size<={budget}x", "seed": seed}
            try:
                steps = make()
            except LayerwiseError as error:
                yield row | {"failure": str(error)}
                continue
            if steps is None:
                yield row | {"failure": "no choice within the budget"}
                continue
            row["cpu_seconds"] = round(time.process_time() - begun, 1)
            changed = apply_plan(model, CompressionPlan(steps), Supplies(calibration=planning)).model
            ratio = byte_size(changed.module) / byte_size(model.module)
            row |= {"ratio": round(ratio, 4), "metrics": {}, "task": model.task.name if model.task else ""}
            row |= judged(model, changed, parts.evaluation, references) | {"whole": whole["quality"], "steps": told(steps)}
            yield row


def drawn(parts: Parts, seed: int) -> Data:
    """Three quarters of the batches that are not the test's, in a random order."""
    batches = [*parts.calibration, *parts.second]
    picked = random.Random(seed).sample(range(len(batches)), round(0.75 * len(batches)))
    return Data.of([batches[i] for i in picked], name=f"planning-{seed}")


def judged(model: UniversalModel, changed: UniversalModel, data: Data, references: list[Tensor]) -> dict[str, Any]:
    """`quality` (higher is better), its value per sample, and the divergence from the unchanged model."""
    task, fidelity = model.task, task_named("fidelity")
    assert task is not None  # subjects come with one
    metric = METRIC[task.name]
    values, weights, apart = [], [], []
    for batch, reference in zip(data, references, strict=True):
        output = changed.predict(batch)
        value, weight = task.figures(output, batch, reference)[metric]
        values.append(value), weights.append(weight)
        apart.append(fidelity.figures(output, batch, reference)["loss"])
    value, weight = torch.cat(values), torch.cat(weights)
    sign = 1 if metric == "accuracy" else -1
    per_sample = sign * value / weight.clamp_min(1e-12)
    total = [torch.cat([pair[i] for pair in apart]).sum() for i in (0, 1)]
    return {
        "metric": metric,
        "quality": round(sign * float(value.sum() / weight.sum()), 6),
        "divergence": round(float(total[0] / total[1]), 6),
        "samples": [round(float(x), 4) for x in per_sample],
    }


def told(steps: tuple[Step, ...]) -> dict[str, int]:
    """Method → on how many layers."""
    found: dict[str, int] = {}
    for step in steps:
        bits = step.settings.get("bits")
        name = f"{step.method} {bits}" if bits else step.method
        found[name] = found.get(name, 0) + len(step.layers)
    return found


# ---- the rivals, from the planner's own table


def uniform(planner: Planner, limit: float) -> tuple[Step, ...] | None:
    """The least damaging of one action on every layer that it treats, on top of one of the whole-model methods."""
    best: tuple[float, dict[str, str], Whole] | None = None
    for whole in planner.wholes:
        table = whole.on(planner.table)
        for chosen in uniform_choices(table, {"size": limit})[:1]:
            damage = table.damage(chosen) + whole.effect.damage
            if best is None or damage < best[0]:
                best = (damage, chosen, whole)
    return None if best is None else planner.table.steps(planner.model, best[1], best[2].methods)


def at_random(planner: Planner, limit: float, seed: int) -> tuple[Step, ...] | None:
    """A random whole-model method with which the budget can be met, then random layers to random cheaper actions."""
    draw = random.Random(1000 + seed)
    feasible = [w for w in planner.wholes if w.on(planner.table).total(smallest(w.on(planner.table), "size"), "size") <= limit]
    if not feasible:
        return None
    whole = draw.choice(feasible)
    table = whole.on(planner.table)
    chosen = table.kept()
    while table.total(chosen, "size") > limit:
        layer = draw.choice(list(chosen))
        size = table.entries[layer][chosen[layer]].size
        cheaper = [e.action for e in table.entries[layer].values() if e.size < size]
        moved = chosen | {layer: draw.choice(cheaper)} if cheaper else chosen
        chosen = moved if alive(table, moved) else chosen
    return planner.table.steps(planner.model, chosen, whole.methods)


def last_k(planner: Planner, limit: float) -> tuple[Step, ...] | None:
    """The last layers are dropped, as few as some whole-model method allows."""
    label = next(label for label, action in planner.table.actions.items() if [m.name for m in action.methods] == ["drop_layers"])
    found = []
    for whole in planner.wholes:
        table, chosen = whole.on(planner.table), planner.table.kept()
        for layer in [name for name in reversed(list(chosen)) if label in table.entries[name]]:
            if table.total(chosen, "size") <= limit:
                break
            chosen = chosen | {layer: label}
        if table.total(chosen, "size") <= limit and alive(table, chosen):
            count = sum(v == label for v in chosen.values())
            found.append((count, whole.effect.damage, len(found), chosen, whole))
    if not found:
        return None
    *_, chosen, whole = min(found, key=lambda entry: entry[:3])
    return planner.table.steps(planner.model, chosen, whole.methods)


def alive(table: Table, chosen: Mapping[str, str]) -> bool:
    return any(table.entries[k][v].params for k, v in chosen.items())


# ---- the page


def section(result: dict[str, Any]) -> str:
    """What was asked, the table of cells, and what lost."""
    cells = list(cells_of(result["rows"]))
    played = [c for c in cells if c["outcome"] != "none"]
    won = sum(c["outcome"] == "better" for c in played)
    lost = [c for c in played if c["outcome"] == "worse"]
    clear = sum(c["gain"] > c["noise"] for c in played)
    text = [
        "At the same budget of bytes, with the same menu, the same planning samples and no tuning afterwards: does the planner's"
        " choice do better on test samples than the best uniform choice, a random one and dropping the last layers? Accuracy in"
        " percent, loss per token for stories260k, means over seeds; ± is two standard errors of the paired difference from the"
        " best rival.",
        "",
        "| subject | size ≤ | unchanged | planner | uniform | random | last-k | planner − best rival |",
        "|---|---|---|---|---|---|---|---|",
        *(_cell_line(c) for c in cells),
        "",
        f"Ahead of every rival in {won} of {len(played)} cells ({won / max(len(played), 1):.0%}; asked: 80 %), by more than the"
        f" noise in {clear}; behind by more than the noise in {len(lost)}"
        f"{': ' + '; '.join(c['subject'] + ' at ' + c['budget'] for c in lost) if lost else ''}. Where the quality is equal, the"
        " smaller divergence from the unchanged model counts as ahead.",
        f"Menu: {', '.join(result['menu'])}. A dash: no choice of that kind meets the budget.",
        *(
            [f"Not yet run: {', '.join(missing)}."]
            if (missing := [n for n in SUBJECTS_USED if n not in {c["subject"] for c in cells}])
            else []
        ),
    ]
    return "\n".join(text)


def cells_of(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One record per subject and budget, judged against the best rival there; `outcome` is better, equal, worse or none."""
    keys = dict.fromkeys((r["subject"], r["setting"]) for r in rows)
    for subject, setting in keys:
        own = [r for r in rows if (r["subject"], r["setting"]) == (subject, setting) and "failure" not in r]
        by = {m: [r for r in own if r["method"] == m] for m in ("planner", *RIVALS)}
        mean = {m: sum(r["quality"] for r in found) / len(found) for m, found in by.items() if found}
        record = {"subject": subject, "budget": setting, "mean": mean, "outcome": "none"}
        record |= {"metric": own[0]["metric"], "whole": own[0]["whole"]} if own else {}
        rivals = [m for m in RIVALS if m in mean]
        if "planner" in mean and rivals:
            best = max(rivals, key=lambda m: mean[m])
            gain, noise = apart(by["planner"], by[best])
            closer = sum(r["divergence"] for r in by["planner"]) < sum(r["divergence"] for r in by[best])
            outcome = "better" if gain > 0 or (gain == 0 and closer) else "worse" if gain < -noise else "equal"
            record |= {"best": best, "gain": gain, "noise": noise, "outcome": outcome}
        yield record


def apart(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> tuple[float, float]:
    """The mean difference in quality, and two standard errors of it over the test samples, each a mean over seeds."""
    pairs = [(a, b) for a in ours for b in theirs if a["seed"] == b["seed"]]
    gaps = torch.tensor([[x - y for x, y in zip(a["samples"], b["samples"], strict=True)] for a, b in pairs], dtype=torch.float64)
    per_sample = gaps.mean(0)
    return float(sum(a["quality"] - b["quality"] for a, b in pairs) / len(pairs)), 2 * float(
        per_sample.std() / len(per_sample) ** 0.5
    )


def _cell_line(cell: dict[str, Any]) -> str:
    if "metric" not in cell:
        return f"| {cell['subject']} | {cell['budget'].removeprefix('size<=')} | – | – | – | – | – | no choice meets it |"
    scale, sign = (100, 1) if cell["metric"] == "accuracy" else (1, -1)

    def shown(value: float | None) -> str:
        return "–" if value is None else f"{sign * value * scale:.{1 if scale == 100 else 3}f}"

    gap = "–"
    if "gain" in cell:
        digits = 1 if scale == 100 else 3
        gap = f"{cell['gain'] * scale:+.{digits}f} ± {cell['noise'] * scale:.{digits}f} ({cell['best']})"
    columns = [shown(cell["whole"]), *(shown(cell["mean"].get(m)) for m in ("planner", *RIVALS)), gap]
    return f"| {cell['subject']} | {cell['budget'].removeprefix('size<=')} | {' | '.join(columns)} |"


if __name__ == "__main__":
    main()
