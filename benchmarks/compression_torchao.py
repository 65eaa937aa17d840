"""What torchao gives on a CPU: ``python benchmarks/compression_torchao.py`` (``--quick``: one seed, no results written).

8-bit weights and activations on MiniLM + SST-2: ranges of activations per token, the same after SmoothQuant, and fixed
beforehand (three draws of 64 calibration sentences, 600 test sentences, speed against float32 in processor time). Training with
the rounding to 4 bits in place on stories260k: trained on text that the model wrote itself, against rounding to nearest, GPTQ on
the same text, and the same training without the rounding; each then packed in the same bytes (three seeds of text and order,
judged on five real stories).
The data lie where ``LAYERWISE_DATA`` points: ``sst2``, ``stories260k``, ``tinystories_sample``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import compression_lowbit as lowbit
from timing import paired

from layerwise.compress.fine_tune import FineTune
from layerwise.compress.gptq import Gptq
from layerwise.compress.int8_dynamic import Int8Dynamic
from layerwise.compress.int8_static import Int8Static
from layerwise.compress.quantization_aware_training import QuantizationAwareTraining
from layerwise.compress.smooth_quant import SmoothQuant
from layerwise.compress.weight_only import WeightOnly
from layerwise.data import Batch, Data
from layerwise.files import write_atomic
from layerwise.measure import describe
from layerwise.method import CompressionMethod, apply_plan, method_of, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.supplies import Supplies

RESULTS = Path(__file__).resolve().parent / "results" / "compression_torchao.json"
COMMAND = "python benchmarks/compression_torchao.py"
SEEDS = (0, 1, 2)
SEQUENCES = 512  # of 48 tokens, to train on
RECIPE: dict[str, Any] = {"epochs": 3, "learning_rate": 3e-4}
PACKED = WeightOnly(4, symmetric=True)  # the grid that torchao trains for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, writes no results")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    seeds = SEEDS[:1] if chosen.quick else SEEDS
    rows = [*eight_bits(lowbit.minilm_sst2(), seeds), *four_bits(lowbit.stories260k(), seeds)]
    result = {
        "command": COMMAND,
        "device": describe(torch.device("cpu")),
        "threads": 1,
        "versions": {name: version(name) for name in ("torch", "transformers", "torchao")},
        "seeds": list(seeds),
        "recipe": asdict(QuantizationAwareTraining(**RECIPE)),
        "rows": rows,
    }
    if not chosen.quick:
        write_atomic(RESULTS, json.dumps(result, indent=1) + "\n")
    print(section(result))


def eight_bits(subject: lowbit.Subject, seeds: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """The model as it was, then per token, after SmoothQuant, and with fixed ranges."""
    evaluation = list(subject.evaluation)
    references = [subject.model.predict(batch) for batch in evaluation]
    whole = {"subject": subject.name, "method": "none", "seed": None}
    yield lowbit.told(whole | lowbit.figures(subject.model, evaluation, references))
    timed = evaluation[0], evaluation[0].narrow(0, 1)
    for method, draws in ((Int8Dynamic(), (None,)), (SmoothQuant(samples=64), seeds), (Int8Static(samples=64), seeds)):
        for seed in draws:
            supplies = Supplies(calibration=None if seed is None else subject.calibration(seed))
            row, made = carried_out(subject.model, (method,), supplies)
            row |= {"subject": subject.name, "method": method.name, "seed": seed}
            row |= lowbit.figures(made, evaluation, references)
            if seed in (None, seeds[0]):
                row["speed"] = {batch.size: faster(subject.model, made, batch) for batch in timed}
            yield lowbit.told(row)


def faster(model: UniversalModel, made: UniversalModel, batch: Batch) -> dict[str, float]:
    """How many times as fast as the float model: processor time, in turn."""
    return paired(lambda: model.predict(batch), lambda: made.predict(batch)).to_dict()


def four_bits(subject: lowbit.Subject, seeds: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """The model as it was, rounded to nearest on both grids, by GPTQ, and trained before with and without the rounding."""
    evaluation = list(subject.evaluation)
    references = [subject.model.predict(batch) for batch in evaluation]
    whole = {"subject": subject.name, "method": "none", "seed": None}
    yield lowbit.told(whole | lowbit.figures(subject.model, evaluation, references))
    contenders: list[tuple[str, tuple[CompressionMethod, ...], tuple[int | None, ...]]] = [
        ("weight_only", (WeightOnly(4),), (None,)),
        ("weight_only, symmetric", (PACKED,), (None,)),
        ("gptq", (Gptq(4, samples=SEQUENCES),), seeds),
        ("gptq, symmetric", (Gptq(4, symmetric=True, samples=SEQUENCES),), seeds),
    ]
    for label, methods, draws in contenders:
        for seed in draws:
            yield trained_on(subject, label, methods, seed, evaluation, references)
    for seed in seeds:
        for label, method in (
            ("fine_tune, then weight_only, symmetric", FineTune(seed=seed, **RECIPE)),
            ("quantization_aware_training, then weight_only, symmetric", QuantizationAwareTraining(bits=4, seed=seed, **RECIPE)),
        ):
            yield trained_on(subject, label, (method, PACKED), seed, evaluation, references)


def trained_on(
    subject: lowbit.Subject,
    label: str,
    methods: tuple[CompressionMethod, ...],
    seed: int | None,
    evaluation: list[Batch],
    references: list[Any],
) -> dict[str, Any]:
    """The row of one contender with the text of that seed."""
    text = None if seed is None else written(subject.model, seed)
    row, made = carried_out(subject.model, methods, Supplies(calibration=text, training=text))
    row |= {"subject": subject.name, "method": label, "seed": seed}
    return lowbit.told(row | lowbit.figures(made, evaluation, references))


def written(model: UniversalModel, seed: int) -> Data:
    """Sequences that the model draws from itself at temperature 1."""
    start = model.adapter.tokenizer.bos_token_id  # type: ignore[attr-defined]  # the text adapter has one
    ids, g = torch.full((SEQUENCES, 1), start), torch.Generator().manual_seed(500 + seed)
    with torch.no_grad():
        while ids.shape[1] < 48:
            last = model.module(input_ids=ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(last, 1, generator=g)], 1)
    return Data.of([Batch((), {"input_ids": x, "attention_mask": torch.ones_like(x)}) for x in ids.split(32)])


def carried_out(
    model: UniversalModel, methods: tuple[CompressionMethod, ...], supplies: Supplies
) -> tuple[dict[str, Any], UniversalModel]:
    """Seconds and the proof of each step, and the model that came out."""
    names = [layer.name for layer in model.layers if not methods[-1].treats(layer)]
    proven = list[bool]()

    def watch(before: UniversalModel, after: UniversalModel, step: Any) -> None:
        check = method_of(step).check_on(before, after, step.layers, supplies)
        proven.append(check is None or check.passed)

    began = time.perf_counter()
    applied = apply_plan(model, CompressionPlan(tuple(step_of(m, names) for m in methods)), supplies, watch=watch)
    seconds = round(time.perf_counter() - began, 1)
    return {"proven": all(proven), "seconds": seconds, "remarks": list(applied.remarks)[:2]}, applied.model


def section(result: dict[str, Any]) -> str:
    """What was asked, both tables, and what lost."""
    rows, texts = result["rows"], list[str]()
    for subject in dict.fromkeys(row["subject"] for row in rows):
        own = [row for row in rows if row["subject"] == subject]
        eight = any(row["method"] == "smooth_quant" for row in own)
        texts += [_asked(subject, result, eight=eight), _table(own, eight=eight)]
        base = "int8_dynamic" if eight else "gptq"
        texts.append("\n".join(_against(own, method, base) for method in _methods(own) if method not in ("none", base)))
    unproven = [r for r in rows if r.get("proven") is False]
    return "\n\n".join([*texts, f"Not proven: {len(unproven)} of {sum('proven' in r for r in rows)} results."])


def _asked(subject: str, result: dict[str, Any], *, eight: bool) -> str:
    if eight:
        return (
            f"**{subject}**: 8-bit weights and activations. Does moving the range of wide channels first (`smooth_quant`) do "
            "less damage than `int8_dynamic` alone, and what do fixed ranges (`int8_static`) cost? Divergence is KL from the "
            "float model in nats; speed is processor time of the float model / of the 8-bit one, median of 5 alternating rounds."
        )
    recipe = result["recipe"]
    return (
        f"**{subject}**: weights in 4 bits. Is it worth training with the rounding in place ({SEQUENCES} sequences that the "
        f"model wrote, {recipe['epochs']} epochs, learning rate {recipe['learning_rate']:g}) instead of `gptq` on the same text? "
        "The same training without the rounding is the control. Groups of 32; symmetric ones are those that torchao trains for."
    )


def _methods(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))


def _table(rows: list[dict[str, Any]], *, eight: bool) -> str:
    quality = "accuracy" if eight else "loss"
    head = ["method", "draws", "divergence", quality, "bytes of the blocks", *(["speed"] if eight else [])]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for method in _methods(rows):
        own = [row for row in rows if row["method"] == method]
        cells = [method, str(len(own)), lowbit._spread([r["divergence"] for r in own], 5)]
        cells += [lowbit._spread([r["metrics"][quality] for r in own], 4), lowbit._share(own, rows[0], "layer_bytes")]
        if eight:
            speed = next((r["speed"] for r in own if "speed" in r), {})
            cells.append(", ".join(f"{p['ratio']:.2f}x with {size} samples" for size, p in speed.items()) or "1")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _against(rows: list[dict[str, Any]], ours: str, theirs: str) -> str:
    """In how many pairs of one draw `ours` is nearer to the float model, and in the task's loss."""
    pairs = [
        (a, b) for a in rows for b in rows
        if a["method"] == ours and b["method"] == theirs and (None in (a["seed"], b["seed"]) or a["seed"] == b["seed"])
    ]  # fmt: skip
    nearer = sum(a["divergence"] < b["divergence"] for a, b in pairs)
    lower = sum(a["metrics"]["loss"] < b["metrics"]["loss"] for a, b in pairs)
    return f"- {ours} against {theirs}: less divergence in {nearer} of {len(pairs)}, lower loss in {lower} of {len(pairs)}"


if __name__ == "__main__":
    main()
