"""Weights in 4 and 3 bits on two real models: ``python benchmarks/compression_lowbit.py`` (``--quick``: one seed, stories260k).

Rounding to nearest, GPTQ and mixed bits in equal bytes, on the same evaluation rows; what needs calibration data gets three draws
of it. What is measured lies in ``runs/lowbit.jsonl`` and is not measured again (``--fresh``: all is; ``--collect``: write the
results that there are). The data lie where ``LAYERWISE_DATA`` points: ``stories260k``, ``tinystories_sample``, ``sst2``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from layerwise.benchmark.subjects import SUBJECTS, data_folder
from layerwise.compress.gptq import Gptq
from layerwise.compress.mixed_precision import MixedPrecision
from layerwise.compress.weight_only import WeightOnly
from layerwise.data import Batch, Data
from layerwise.evaluation import Evaluation
from layerwise.files import write_atomic
from layerwise.loading import load_data
from layerwise.measure import describe
from layerwise.method import CompressionMethod, apply_plan, method_of, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.saved import save_model
from layerwise.supplies import Supplies
from layerwise.task import Fidelity
from layerwise.tensors import byte_size

DONE = Path(__file__).resolve().parents[1] / "runs" / "lowbit.jsonl"
RESULTS = Path(__file__).resolve().parent / "results" / "compression_lowbit.json"
COMMAND = "python benchmarks/compression_lowbit.py"
SEEDS = (0, 1, 2)
BITS = (4, 3)
CALIBRATION = 64  # samples that roundings are corrected on
WEIGHED = {"stories260k": 128, "MiniLM + SST-2": 512}  # samples that mixed bits are weighed on, the first 64 of which are those


@dataclass(frozen=True)
class Subject:
    """A model, the rows that it is judged on, and calibration data by seed."""

    name: str
    model: UniversalModel
    evaluation: Data
    calibration: Callable[[int], Data]

    @property
    def weighed(self) -> int:
        """A sample of stories260k has 47 outputs that diverge, one of MiniLM a single one."""
        return WEIGHED[self.name]


def stories260k() -> Subject:
    """Calibrated on text that the model writes itself, judged on windows of 48 tokens of five real stories."""
    parts = SUBJECTS["stories260k"].open()
    start = parts.model.adapter.tokenizer.bos_token_id  # type: ignore[attr-defined]  # the text adapter has one

    def calibration(seed: int) -> Data:
        ids = torch.cat([written(100 + seed + 1000 * part) for part in range(WEIGHED["stories260k"] // CALIBRATION)])
        return Data.of([Batch((), {"input_ids": x, "attention_mask": torch.ones_like(x)}) for x in ids.split(32)])

    def written(seed: int) -> torch.Tensor:
        ids, g = torch.full((CALIBRATION, 1), start), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            while ids.shape[1] < 48:
                last = parts.model.module(input_ids=ids).logits[:, -1].softmax(-1)
                ids = torch.cat([ids, torch.multinomial(last, 1, generator=g)], 1)
        return ids

    return Subject("stories260k", parts.model, parts.evaluation, calibration)


def minilm_sst2() -> Subject:
    """MiniLM with a linear head for sentiment: calibrated on training sentences, judged on 600 test sentences."""
    model, place = SUBJECTS["minilm_sst2"].open().model, data_folder("sst2")

    def rows(part: str, count: int, seed: int) -> Data:
        table = pd.read_parquet(place / f"{part}.parquet").sample(count, random_state=seed)
        listed = [{"text": t[:160], "label": int(y)} for t, y in zip(table["text"], table["label"], strict=True)]
        return load_data(listed, model, batch_size=32)

    return Subject("MiniLM + SST-2", model, rows("test", 600, 0), lambda seed: rows("train", WEIGHED["MiniLM + SST-2"], seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed and the small model; writes no results")
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured")
    parser.add_argument("--collect", action="store_true", help="measure nothing: write the results that there are")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.quick:
        print(section({"rows": list(judged(stories260k(), SEEDS[:1], set()))}))
        return
    if chosen.fresh:
        DONE.unlink(missing_ok=True)
    for open_ in () if chosen.collect else (stories260k, minilm_sst2):
        for row in judged(open_(), SEEDS, {key(known) for known in rows_done()}):
            DONE.parent.mkdir(exist_ok=True)
            with DONE.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    result = {
        "command": COMMAND,
        "device": describe(torch.device("cpu")),
        "threads": 1,
        "versions": {name: version(name) for name in ("torch", "transformers", "scipy")},
        "seeds": list(SEEDS),
        "rows": rows_done(),
    }
    write_atomic(RESULTS, json.dumps(result, indent=1) + "\n")
    print(section(result))


def rows_done() -> list[dict[str, Any]]:
    """What was measured so far."""
    return [json.loads(line) for line in DONE.read_text(encoding="utf-8").splitlines()] if DONE.exists() else []


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["subject"], row["method"], row["bits"], row.get("seed")


def judged(subject: Subject, seeds: tuple[int, ...], done: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """A row for the model as it was, and one for each method, number of bits and draw of calibration data not yet `done`."""
    names = [layer.name for layer in subject.model.layers if not WeightOnly().treats(layer)]
    wanted = list(subject.evaluation)
    references = [subject.model.predict(batch) for batch in wanted]
    if (subject.name, "none", 32, None) not in done:
        yield told({"subject": subject.name, "method": "none", "bits": 32} | figures(subject.model, wanted, references))
    for bits in BITS:
        if (subject.name, "to nearest", bits, None) not in done:
            yield told(made(subject, WeightOnly(bits), names, None, wanted, references))
        for seed in seeds:
            left = [m for m in contenders(bits, subject.weighed) if (subject.name, label(m), bits, seed) not in done]
            yield from (told(made(subject, method, names, seed, wanted, references)) for method in left)


def contenders(bits: int, weighed: int) -> list[CompressionMethod]:
    mixed = MixedPrecision(bits, corrected=False, samples=CALIBRATION, weighed=weighed)
    return [
        Gptq(bits, samples=CALIBRATION),
        Gptq(bits, order=False, samples=CALIBRATION),
        mixed,
        replace(mixed, corrected=True),
    ]


def made(
    subject: Subject, method: CompressionMethod, names: list[str], seed: int | None, wanted: list[Batch], references: list[Any]
) -> dict[str, Any]:
    supplies = Supplies(calibration=None if seed is None else subject.calibration(seed))
    began = time.perf_counter()
    method = method.fitted(subject.model, names, supplies)
    weighing, began = time.perf_counter() - began, time.perf_counter()
    applied = apply_plan(subject.model, CompressionPlan((step_of(method, names),)), supplies)
    seconds = time.perf_counter() - began
    step = applied.plan.steps[0]
    row = {"subject": subject.name, "method": label(method), "bits": step.settings["bits"], "seed": seed}
    check = method_of(step).check_on(subject.model, applied.model, names, supplies)
    assert check is not None
    row |= {"proven": check.passed, "worst": round(check.measured, 6), "seconds": round(seconds, 1)}
    chosen = step.settings.get("chosen")
    if isinstance(method, MixedPrecision):
        row |= {"chosen": dict(pd.Series(list(chosen.values())).value_counts().sort_index().items())}
        row |= {"weighed": {k: round(v, 6) for k, v in method.measured.items()}, "weighing_seconds": round(weighing, 1)}
    return row | figures(applied.model, wanted, references)


def label(method: CompressionMethod) -> str:
    if isinstance(method, Gptq):
        return "gptq" if method.order else "gptq, columns as they lie"
    if isinstance(method, MixedPrecision):
        return "mixed bits, gptq" if method.corrected else "mixed bits, to nearest"
    return "to nearest"


def figures(model: UniversalModel, batches: list[Batch], references: list[Any]) -> dict[str, Any]:
    """The task's metrics, the divergence from the original in nats, bytes in memory, of the file, and of the layers."""
    assert model.task is not None
    seen, apart = Evaluation(model.task), Evaluation(Fidelity())
    for batch, reference in zip(batches, references, strict=True):
        output = model.predict(batch)
        seen.add(output, batch, reference)
        apart.add(output, batch, reference)
    with tempfile.TemporaryDirectory() as place:
        save_model(model, Path(place) / "model")
        file = sum(path.stat().st_size for path in (Path(place) / "model").glob("*.safetensors"))
    layers = sum(byte_size(model.module.get_submodule(layer.name)) for layer in model.layers)
    means = {name: round(value, 6) for name, value in seen.means().items()}
    nats = round(apart.means()["divergence"], 7)
    return {"metrics": means, "divergence": nats, "bytes": byte_size(model.module), "file": file, "layer_bytes": layers}


def told(row: dict[str, Any]) -> dict[str, Any]:
    row = json.loads(json.dumps(row, default=int))
    print(row, flush=True)
    return row


def section(result: dict[str, Any]) -> str:
    """What was asked, the tables, and what lost."""
    parts = [
        "Does correcting the errors (`gptq`) do less damage than rounding to nearest, and do mixed bits do less than uniform "
        "ones, in as many bytes? All weights of the blocks are packed in groups of 32; embeddings and head stay in float32, so "
        "the bytes are those of the blocks. Divergence is KL from the unrounded model in nats, mean of the draws of "
        "calibration data (least … most). "
        f"Roundings are corrected on {CALIBRATION} samples; mixed bits are weighed on "
        f"{' and '.join(f'{n} of {name}' for name, n in WEIGHED.items())}: with 128 of MiniLM, tried first, the first draw at "
        "4 bits, to nearest, did more damage on test rows than uniform bits."
    ]
    for subject in dict.fromkeys(row["subject"] for row in result["rows"]):
        parts += [f"**{subject}**", *_table([r for r in result["rows"] if r["subject"] == subject])]
    return "\n\n".join([*parts, _verdict(result["rows"]), *_missing(result)])


def _missing(result: dict[str, Any]) -> Iterator[str]:
    """What was not measured, if anything."""
    done = {key(row) for row in result["rows"]}
    for name in dict.fromkeys(row["subject"] for row in result["rows"]):
        wanted = [
            (name, label(m), bits, seed)
            for bits in BITS
            for seed in result.get("seeds", ())
            for m in contenders(bits, WEIGHED[name])
        ]
        if left := [
            f"{bits} bits, {method}, draw {seed}" for _, method, bits, seed in wanted if (_, method, bits, seed) not in done
        ]:
            yield f"Not measured yet for {name}: {'; '.join(left)}. The command goes on there."


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    quality = "accuracy" if "accuracy" in rows[0]["metrics"] and "perplexity" not in rows[0]["metrics"] else "perplexity"
    lines = [
        f"| bits | rounded | draws | divergence | {quality} | bytes of the blocks | the file |",
        "|---|---|---|---|---|---|---|",
    ]
    whole = rows[0]
    for bits, method in dict.fromkeys((r["bits"], r["method"]) for r in rows):
        own = [r for r in rows if (r["bits"], r["method"]) == (bits, method)]
        damage, metric = (_spread(v, 4) for v in ([r["divergence"] for r in own], [r["metrics"][quality] for r in own]))
        sizes = f"{_share(own, whole, 'layer_bytes')} | {_share(own, whole, 'file')}"
        lines.append(f"| {bits} | {method} | {len(own)} | {damage} | {metric} | {sizes} |")
    yield "\n".join(lines)


def _spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} … {max(values):.{digits}f})"


def _share(own: list[dict[str, Any]], whole: dict[str, Any], key: str) -> str:
    size = max(r[key] for r in own)
    return f"{size:,} ({size / whole[key]:.3f}x)"


PAIRS = (
    ("gptq", "to nearest"), ("gptq, columns as they lie", "to nearest"),
    ("mixed bits, to nearest", "to nearest"), ("mixed bits, gptq", "gptq"),
)  # fmt: skip


def _verdict(rows: list[dict[str, Any]]) -> str:
    """In how many pairs of one draw each contender did less damage, and where it did more."""
    lines = []
    for ours, theirs in PAIRS:
        pairs = [(a, b) for a in rows for b in rows if a["method"] == ours and b["method"] == theirs and _alike(a, b)]
        lost = [a for a, b in pairs if a["divergence"] > b["divergence"]]
        where = "; ".join(f"{a['subject']}, {a['bits']} bits, draw {a['seed']}" for a in lost)
        lines.append(
            f"- {ours} against {theirs}: less damage in {len(pairs) - len(lost)} of {len(pairs)}"
            + (f"; more in {where}" if lost else "")
        )
    unproven = [r for r in rows if r.get("proven") is False]
    lines.append(f"- not proven: {len(unproven)} of {sum('proven' in r for r in rows)} results")
    return "\n".join(lines)


def _alike(a: dict[str, Any], b: dict[str, Any]) -> bool:
    same = a["subject"] == b["subject"] and a["bits"] == b["bits"]
    return same and (b["seed"] is None or a["seed"] == b["seed"])


if __name__ == "__main__":
    main()
