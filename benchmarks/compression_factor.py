"""Matrices in two factors, before any training: ``python benchmarks/compression_factor.py [--quick]``.

The conversion to TVA form at a share of every head leaves some number of parameters; low rank, activation-aware and plain, then
gets the largest ratio that leaves no more. Where nothing can be converted the ratio is the share. Three windows of calibration
samples; the plain SVD reads none. Nothing is trained: what is shown is the damage of the cut alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from layerwise.benchmark.subjects import SUBJECTS, Parts
from layerwise.compress.low_rank import LowRank
from layerwise.compress.tva_conversion import TVAConversion
from layerwise.data import Data
from layerwise.measure import evaluate
from layerwise.method import CompressionMethod, apply_step_, step_of, untreated
from layerwise.model import UniversalModel
from layerwise.proofs import judged
from layerwise.supplies import Supplies
from layerwise.tensors import parameter_count

RESULT = Path(__file__).resolve().parent / "results" / "compression_factor.json"
CHOSEN = ("digits_vit", "stories260k", "minilm_sst2")
SHARES = (0.75, 0.5, 0.25)
SEEDS = (0, 1, 2)
LABELS = {"aware": "activation-aware SVD", "plain": "plain SVD", "tva": "TVA conversion"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one subject, one share, one seed; writes nothing")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    began, rows = time.perf_counter(), list[dict[str, Any]]()
    for name in CHOSEN[:1] if quick else CHOSEN:
        rows += measured(name, SHARES[1:2] if quick else SHARES, SEEDS[:1] if quick else SEEDS)
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
        result = machine() | {"seconds": round(time.perf_counter() - began), "rows": rows}
        if not quick:  # what is there stays if the rest is stopped
            RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if quick:
        print(section(result))


def machine() -> dict[str, Any]:
    from layerwise.config import RunConfig
    from layerwise.environment import environment

    found = environment(RunConfig())
    command = "python benchmarks/compression_factor.py"
    return {"command": command, "device": found["cpu"], "threads": 1, "versions": found["packages"], "seeds": list(SEEDS)}


def measured(name: str, shares: tuple[float, ...], seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    parts = SUBJECTS[name].open()
    rows = [row(name, "uncompressed", 1.0, 0, parts, parts.model)]
    size = head_size(parts.model)
    for share in shares:
        for seed in seeds:
            data = drawn(parts, seed)
            made = {}
            if size:
                made["tva"] = cut(parts.model, TVAConversion(rank=round(size * share)), data, proved=seed == seeds[0])
            budget = parameter_count(made["tva"][0].module) if made else None
            ratio = share if budget is None else ratio_within(parts.model, budget)
            made["aware"] = cut(parts.model, LowRank(ratio=ratio), data, proved=seed == seeds[0])
            if seed == seeds[0]:
                made["plain"] = cut(parts.model, LowRank(ratio=ratio, aware=False), data, proved=True)
            for label, (model, proven) in made.items():
                said = {"low_rank_ratio": ratio} | ({} if proven is None else {"proven": proven})
                rows.append(row(name, label, share, seed, parts, model) | said)
    return rows


def head_size(model: UniversalModel) -> int:
    """Numbers per head, 0 where no attention can be converted."""
    from layerwise.native.dense import Dense, dense_attention

    found = (dense_attention(model.module, n, m) for n, m in model.module.named_modules())
    return next((a.size for a in found if isinstance(a, Dense)), 0)


def drawn(parts: Parts, seed: int) -> Data:
    """Half of the calibration batches, from another one on for each seed."""
    pool = [*parts.calibration, *parts.second]
    return Data.of([pool[(seed + i) % len(pool)] for i in range(len(pool) // 2)])


def cut(model: UniversalModel, method: CompressionMethod, data: Data, *, proved: bool) -> tuple[UniversalModel, bool | None]:
    """The compressed copy, and whether its equivalence is proved, if that is asked."""
    names = [layer.name for layer in model.layers]
    refused = untreated(method, model, names)
    supplies = Supplies(calibration=data)
    changed, step = apply_step_(model.clone(), step_of(method, [n for n in names if n not in refused]), supplies)
    return changed, bool(judged(model, changed, step, list(data)[:1], supplies).passed) if proved else None


def ratio_within(model: UniversalModel, budget: int) -> float:
    """The largest ratio, to 0.005, with which low rank leaves at most `budget` parameters."""
    whole = parameter_count(model.module)
    matrices = LowRank(ratio=1.0, aware=False)
    low, high = 0.0, 1.0
    while high - low > 0.005:
        middle = (low + high) / 2
        low, high = (middle, high) if whole - saved(model, middle, matrices) <= budget else (low, middle)
    return low


def saved(model: UniversalModel, ratio: float, method: LowRank) -> int:
    """How many parameters low rank takes away at this ratio."""
    from layerwise.factors import factorable, unfolded_matrix

    gone = 0
    for layer in model.layers:
        for module in factorable(layer.module).values():
            outputs, inputs = unfolded_matrix(module).shape
            rank = max(1, int(ratio * outputs * inputs / (outputs + inputs)))
            gone += max(0, outputs * inputs - rank * (outputs + inputs))
    return gone


def row(subject: str, method: str, share: float, seed: int, parts: Parts, model: UniversalModel) -> dict[str, Any]:
    found = evaluate(model, parts.evaluation, reference=parts.model)
    task = parts.model.task
    assert task is not None  # settled with the parts
    return {
        "subject": subject, "method": method, "setting": share, "seed": seed, "task": task.name,
        "ratio": parameter_count(model.module) / parameter_count(parts.model.module),
        "metrics": {k: round(v, 5) for k, v in found.means().items()},
        "stderr": {k: round(v, 5) for k, v in found.stderr().items()},
    }  # fmt: skip


SAID = """Every matrix of the blocks as two thin ones at equal numbers of parameters, nothing trained. The share is what
the conversion keeps of every head and of the width; the ratio of parameters (whole model, embeddings included) is what that
leaves, and low rank is cut to no more. Mean ± standard deviation over three windows of calibration samples; the plain SVD reads
none, so it has one value. Equivalence is proved for the first window. Loss in nats."""


def section(result: dict[str, Any]) -> str:
    """The part of docs/compression_results.md."""
    lines = [SAID, "", "| subject | share | method | parameters | loss | metric | proved |", "|---|---|---|---|---|---|---|"]
    groups: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for found in result["rows"]:
        groups.setdefault((found["subject"], found["setting"], found["method"]), []).append(found)
    for (subject, share, method), rows in groups.items():
        other = next((k for k in rows[0]["metrics"] if k != "loss"), "")
        cells = [subject, f"{share:g}", LABELS.get(method, method), f"{mean(r['ratio'] for r in rows):.3f}x"]
        told = f" (standard error {rows[0]['stderr']['loss']:.3f})" if method not in LABELS else ""
        cells += [spread([r["metrics"]["loss"] for r in rows], 3) + told]
        cells += [f"{other} {spread([r['metrics'][other] for r in rows], 3)}" if other else "–"]
        proved = [r["proven"] for r in rows if "proven" in r]
        lines.append(f"| {' | '.join([*cells, f'{sum(proved)} of {len(proved)}' if proved else '–'])} |")
    missing = [name for name in CHOSEN if not any(subject == name for subject, _, _ in groups)]
    said = verdict(groups) + (f" Not measured, since the run was stopped before: {', '.join(missing)}." if missing else "")
    return "\n".join([*lines, "", said])


def spread(values: list[float], digits: int) -> str:
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def verdict(groups: dict[tuple[str, float, str], list[dict[str, Any]]]) -> str:
    """Who has the least loss in each cell, in words."""
    losses = {key: mean(r["metrics"]["loss"] for r in rows) for key, rows in groups.items() if key[2] in LABELS}
    cells = dict.fromkeys((subject, share) for subject, share, _ in losses)
    first = {cell: min((m for m in LABELS if (*cell, m) in losses), key=lambda m: losses[(*cell, m)]) for cell in cells}
    said = [f"{LABELS[m]} has the least loss in {list(first.values()).count(m)} of {len(cells)} cells" for m in LABELS]
    absent = sorted({s for s, _ in cells} - {s for s, _, m in losses if m == "tva"})
    text = "; ".join(said) + "."
    return text + (f" {', '.join(absent)}: no attention of a known form, so nothing there can be converted." if absent else "")


if __name__ == "__main__":
    main()
