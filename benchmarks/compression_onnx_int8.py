"""8-bit ONNX against float32 ONNX, both in onnxruntime on this CPU: ``python benchmarks/compression_onnx_int8.py [--quick]``.

ResNet-20 (CIFAR-10, JPEG), MiniLM with a linear head (SST-2), a ViT-Tiny of timm trained here on scikit-learn's digits (17
tokens; no trained ViT-Tiny is among the data), and the same architecture at 224 pixels with random weights, for speed only.
Quality is that of whole test sets, for three calibration seeds of 256 training samples. Times are ratios of rounds that
alternate between both files in one run: processor time with one thread, which other programs on the machine disturb least,
elapsed time with two. ``--sensitivity SUBJECT`` quantizes one layer at a time and says how far each moves the outputs on
training samples: what `KEPT` names was chosen by it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import layerwise as lw
from layerwise.benchmark import subjects
from layerwise.data import Batch, Data
from layerwise.errors import ExportMismatch
from layerwise.model import UniversalModel

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "compression_onnx_int8.json"
WEIGHTS = ROOT / "runs" / "onnx_int8" / "vit_tiny_digits.safetensors"
COMMAND = "python benchmarks/compression_onnx_int8.py"
SEEDS, CALIBRATION, ROUNDS = (0, 1, 2), 256, 9
SETTINGS = ("1 thread, batch 1", "1 thread, larger", "2 threads, batch 1", "2 threads, larger")
FASTER, POINTS = 1.5, 0.5  # what is to be reached
KEEP = ", keep="  # between the mode and what stays float, in the name of a method
NOISE = 0.5  # a ratio whose quartiles lie further apart, as a share of it, says nothing
# what stays float in a variant of the dynamic mode, by --sensitivity
KEPT = {"minilm_sst2": r"layer\.0\.(intermediate|output)\.dense|layer\.[12]\.output\.dense"}


@dataclass(frozen=True)
class Subject:
    """A model, its calibration data by seed, its test set, and the ways of quantizing (the automatic first)."""

    model: UniversalModel
    calibration: Callable[[int], Data]
    test: Data
    modes: tuple[str, ...]
    batches: tuple[int, int]


def resnet20(quick: bool) -> Subject:
    place = subjects.data_folder("cifar10_jpeg")
    weights = subjects.data_folder("cifar10_resnets") / "resnet20_jpegft.safetensors"
    model = lw.load(f"{ROOT}/examples/cifar_resnet.py:resnet20", weights=weights)
    test = lw.load_data(place, model, "test", 500 if quick else None, 32)
    return Subject(
        model, lambda seed: lw.load_data(place, model, "train", CALIBRATION, 32, seed=seed), test, ("static",), (1, 32)
    )


def minilm_sst2(quick: bool) -> Subject:
    place = subjects.data_folder("sst2")
    encoder = subjects.minilm_encoder()
    model = lw.load(encoder, head=lw.load_data(place, encoder, "train", 2000, 32, seed=99))
    test = lw.load_data(place, model, "test", 200 if quick else None, 32)
    calibration = lambda seed: lw.load_data(place, model, "train", CALIBRATION, 32, seed=seed)  # noqa: E731
    return Subject(model, calibration, test, ("dynamic", "static"), (1, 16))


def vit_tiny_digits(quick: bool) -> Subject:
    x, y, rest, rest_y = _digits()
    model = UniversalModel(_vit_tiny(32, 8, 1), name="vit_tiny_digits")
    if WEIGHTS.exists():
        from layerwise.weights import load_into, read_weights

        load_into(model.module, read_weights(WEIGHTS), source=str(WEIGHTS))
    else:
        _train_(model.module, x, y, epochs=1 if quick else 5)
        if not quick:
            from layerwise.weights import save_weights

            WEIGHTS.parent.mkdir(parents=True, exist_ok=True)
            save_weights(WEIGHTS, dict(model.module.state_dict()))

    def calibration(seed: int) -> Data:
        picked = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:CALIBRATION].split(32)
        return Data.of([(x[i], y[i]) for i in picked])

    test = Data.of([(a, b) for a, b in zip(rest.split(32), rest_y.split(32), strict=True)])
    return Subject(model, calibration, test, ("dynamic", "static"), (1, 16))


def vit_tiny_224(quick: bool) -> Subject:
    """Random weights and pixels: its outputs mean nothing, and no quality is shown."""
    g = torch.Generator().manual_seed(0)
    batches = [torch.randn(4, 3, 224, 224, generator=g) for _ in range(4)]
    return Subject(
        UniversalModel(_vit_tiny(224, 16, 3), name="vit_tiny_224"), lambda seed: Data.of(batches), Data.of(batches[:1]),
        ("dynamic", "static"), (1, 16),
    )  # fmt: skip


SUBJECTS = {f.__name__: f for f in (resnet20, minilm_sst2, vit_tiny_digits, vit_tiny_224)}


def _vit_tiny(size: int, patch: int, channels: int) -> torch.nn.Module:
    import timm

    torch.manual_seed(0)
    name = "vit_tiny_patch16_224"
    return timm.create_model(name, img_size=size, patch_size=patch, in_chans=channels, num_classes=10).eval()


def _digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """scikit-learn's digits at 32 pixels: 1,200 to train and calibrate on, 597 to test."""
    x, y, rest, rest_y = subjects._digits()
    return (*(_large(x), y), *(_large(rest), rest_y))


def _large(images: torch.Tensor) -> torch.Tensor:
    return F.interpolate(images[:, None], scale_factor=4, mode="bilinear") * 2 - 1


def _train_(module: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int) -> None:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(module.parameters(), 5e-4, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=epochs * -(-len(x) // 32))
    module.train()
    for epoch in range(epochs):
        for i in torch.randperm(len(x)).split(32):
            loss = F.cross_entropy(module(x[i]), y[i])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"  trained {epoch + 1} of {epochs} epochs: loss {float(loss.detach()):.3f}", flush=True)
    module.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed and a part of the test sets; nothing is written")
    parser.add_argument("--subjects", nargs="*", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--sensitivity", choices=list(SUBJECTS), help="one layer of this model at a time in 8 bits; only printed")
    parser.add_argument("--modes", nargs="*", default=["dynamic", "static"], help="only these")
    parser.add_argument("--add", action="store_true", help="keep the other rows of the result")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.sensitivity:
        sensitivity(SUBJECTS[chosen.sensitivity](True))
        return
    rows = []
    for name in chosen.subjects:
        subject = SUBJECTS[name](chosen.quick)
        subject = replace(subject, modes=tuple(mode for mode in subject.modes if mode in chosen.modes))
        for row in measured(name, subject, (0,) if chosen.quick else SEEDS):
            print(json.dumps(row), flush=True)
            rows.append(row)
            if not chosen.quick:
                write(rows, keep=chosen.add)


def write(rows: list[dict[str, Any]], *, keep: bool) -> None:
    import onnxruntime
    from timing import machine

    from layerwise.files import write_atomic

    old = json.loads(RESULTS.read_text())["rows"] if keep and RESULTS.exists() else []
    done = {(row["subject"], row["method"]) for row in rows}
    rows = [row for row in old if (row["subject"], row["method"]) not in done] + rows
    rows.sort(key=lambda row: list(SUBJECTS).index(row["subject"]))
    about = {
        "command": COMMAND, "device": machine()["cpu"], "threads": "1 and 2", "load": machine()["load"],
        "versions": {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__},
        "seeds": list(SEEDS), "rounds": ROUNDS, "rows": rows,
    }  # fmt: skip
    write_atomic(RESULTS, json.dumps(about, indent=1) + "\n")


def measured(name: str, subject: Subject, seeds: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """One row per mode and seed; the speed is measured for the first seed, since it does not depend on the numbers."""
    ways = [(mode, "") for mode in subject.modes]
    ways[1:1] = [(mode, KEPT[name]) for mode in subject.modes[:1] if name in KEPT and mode == "dynamic"]
    with tempfile.TemporaryDirectory() as folder:
        floats = Path(folder) / "float.onnx"
        lw.export(subject.model, floats, subject.test)
        for mode, keep in ways:
            for seed in seeds if mode == "static" and name != "vit_tiny_224" else seeds[:1]:
                path = Path(folder) / f"{mode}{len(keep)}-{seed}.onnx"
                row = {"subject": name, "method": f"onnx_{mode}" + (KEEP + keep if keep else "")}
                try:
                    artifact = lw.export(
                        subject.model, path, subject.test, quantize=mode, keep=keep, calibration=subject.calibration(seed)
                    )
                except ExportMismatch as refused:
                    yield row | {"setting": "", "seed": seed, "refused": str(refused)}
                    continue
                figures = artifact.figures
                row |= {"setting": f"{len(figures['nodes'])} nodes", "seed": seed}
                row |= {"bytes": figures["int8"]["bytes"] / figures["float32"]["bytes"], "proof": figures["proof"]}
                if name != "vit_tiny_224":
                    row |= {f"accuracy_{k}": figures[k]["metrics"]["accuracy"] for k in ("float32", "int8")}
                    row |= {"samples": figures["int8"]["samples"]}
                yield row | ({"speed": speeds(floats, path, subject)} if seed == seeds[0] else {})


def sensitivity(subject: Subject, samples: int = 64) -> None:
    """Prints for each layer how far it alone in 8 bits (dynamic) moves the outputs: KL in nats, the most harmful first."""
    import onnxruntime.quantization as ort

    from layerwise.onnx_nodes import onnx_nodes, owner

    batches = list(subject.calibration(SEEDS[0]).head(samples))
    with tempfile.TemporaryDirectory() as folder:
        floats, path = Path(folder) / "float.onnx", Path(folder) / "one.onnx"
        lw.export(subject.model, floats, subject.test)
        nodes = [node for node in onnx_nodes({}, floats).exclude if node.endswith("MatMul")]
        wanted, found = outputs(floats, batches), dict[str, float]()
        for node in nodes:
            ort.quantize_dynamic(floats, path, nodes_to_quantize=[node], per_channel=True, weight_type=ort.QuantType.QInt8)
            moved = outputs(path, batches)
            found[node] = float((wanted.exp() * (wanted - moved)).sum(-1).mean())
    for node, divergence in sorted(found.items(), key=lambda item: -item[1]):
        print(f"{divergence:.2e}  {owner(node)}", flush=True)


def outputs(file: Path, batches: list[Batch]) -> torch.Tensor:
    """Logarithms of the classes' probabilities, one row a sample."""
    logits = [session(file, 1, fitted(batch, batch.size))()[0] for batch in batches]
    return torch.log_softmax(torch.from_numpy(np.concatenate(logits)).double(), -1)


def speeds(floats: Path, path: Path, subject: Subject) -> list[dict[str, Any]]:
    """How many times faster than the float file, for both numbers of threads and both sizes of batches."""
    batch = subject.test[0]
    return [
        {"threads": threads, "batch": size} | faster(floats, path, fitted(batch, size), threads)
        for threads in (1, 2)
        for size in subject.batches
    ]


def fitted(batch: Batch, size: int) -> dict[str, np.ndarray]:
    """`size` samples, repeated where there are not as many."""
    picked = torch.arange(size) % batch.size
    tensors = dict(batch.kwargs) or {"x": batch.args[0]}
    return {name: t[picked].numpy() for name, t in tensors.items()}


def faster(floats: Path, path: Path, inputs: dict[str, np.ndarray], threads: int) -> dict[str, Any]:
    """`ratio` is the median over rounds of float time / 8-bit time, `low` and `high` their quartiles."""
    runs = [session(file, threads, inputs) for file in (floats, path)]
    clock = time.process_time if threads == 1 else time.perf_counter
    repeats = max(1, int(0.05 / max(once(runs[0], clock), 1e-4)))
    ratios = []
    for round_ in range(ROUNDS):
        order = (0, 1) if round_ % 2 == 0 else (1, 0)
        spent = {}
        for i in order:
            start = clock()
            for _ in range(repeats):
                runs[i]()
            spent[i] = clock() - start
        ratios.append(spent[0] / spent[1])
    low, middle, high = (float(q) for q in np.percentile(ratios, [25, 50, 75]))
    return {"ratio": round(middle, 3), "low": round(low, 3), "high": round(high, 3), "rounds": ROUNDS}


def once(run: Callable[[], Any], clock: Callable[[], float]) -> float:
    run()
    start = clock()
    run()
    return clock() - start


def session(file: Path, threads: int, inputs: dict[str, np.ndarray]) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    opened = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    feed = {i.name: inputs[i.name] for i in opened.get_inputs()}
    return lambda: opened.run(None, feed)


def section(result: dict[str, Any]) -> str:
    """Asked, the table, and what did not reach it, in words."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["subject"], row["method"]), []).append(row)
    refused = list[str]()
    heads = [
        "model",
        "8-bit",
        "accuracy float32 → 8-bit, by calibration seed",
        "bytes",
        *SETTINGS,
        f"{FASTER}x and {POINTS} points",
    ]
    lines = [
        f"Asked: at least {FASTER}x as fast as the float32 file in onnxruntime at a loss of at most {POINTS} points. Ratios are "
        f"medians of {result['rounds']} alternating rounds, quartiles in brackets; processor time with one thread, elapsed time "
        f"with two. Where the quartiles are further apart than {NOISE:.0%} of the ratio, other programs on the machine decided "
        "it, and it is not shown and counts for nothing.",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    for (subject, method), tried in groups.items():
        if not (rows := [row for row in tried if "refused" not in row]):
            lines.append(f"| {subject} | {_way(method)} | refused{' | –' * 5} | no |")
            refused.append(f"{subject}, {_way(method)}, was refused by the export: {tried[0]['refused']}")
            continue
        speed = [_ratio(s) for s in rows[0]["speed"]]
        cells = [subject, _way(method), _quality(rows), f"{rows[0]['bytes']:.2f}x", *speed, _reached(rows)]
        lines.append(f"| {' | '.join(cells)} |")
    said = [
        "Larger batches: 32 images of ResNet-20, 16 samples of the others. vit_tiny_224 has random weights: its speed is that of "
        "the architecture, and it has no accuracy.",
        *(_kept(subject, method) for subject, method in groups if KEEP in method),
        *_missing(set(groups)),
        *dict.fromkeys(f"{s}, {_way(m)}: {r['note']}" for (s, m), tried in groups.items() for r in tried if "note" in r),
        *refused,
    ]
    return "\n\n".join(["\n".join(lines), *said])


def _missing(there: set[tuple[str, str]]) -> list[str]:
    wanted = [(subject, "onnx_static") for subject in SUBJECTS] + [(s, f"onnx_dynamic{KEEP}{keep}") for s, keep in KEPT.items()]
    absent = [f"{subject}, {_way(method)}" for subject, method in wanted if (subject, method) not in there]
    return [f"Not measured yet: {'; '.join(absent)}."] if absent else []


def _kept(subject: str, method: str) -> str:
    return (
        f"{subject} with keep: `{method.partition(KEEP)[2]}` also stays float. These layers are among those that moved the "
        f"outputs most when they alone were in 8 bits, on 64 training samples (`--sensitivity {subject}`); no test row did."
    )


def _way(method: str) -> str:
    way, kept, _ = method.removeprefix("onnx_").partition(KEEP)
    return way + (", keep" if kept else "")


def _noisy(speed: dict[str, Any]) -> bool:
    return speed["high"] - speed["low"] > NOISE * speed["ratio"]


def _ratio(speed: dict[str, Any]) -> str:
    spread = f"({speed['low']:.2f}–{speed['high']:.2f})"
    return f"not measurable {spread}" if _noisy(speed) else f"{speed['ratio']:.2f}x {spread}"


def _quality(rows: list[dict[str, Any]]) -> str:
    if "samples" not in rows[0]:
        return "–"
    after = ", ".join(f"{100 * r['accuracy_int8']:.2f}" for r in rows)
    return f"{100 * rows[0]['accuracy_float32']:.2f} → {after} % of {rows[0]['samples']:,}"


def _reached(rows: list[dict[str, Any]]) -> str:
    """yes, or what is missing: each setting of threads and batch counts, and the mean over seeds."""
    slow = [
        f"batch {s['batch']} with {s['threads']} thread(s)" for s in rows[0]["speed"] if not _noisy(s) and s["ratio"] < FASTER
    ]
    said = [f"slower than {FASTER}x at " + ", ".join(slow)] if slow else []
    if "samples" in rows[0]:
        lost = 100 * (rows[0]["accuracy_float32"] - statistics.mean(r["accuracy_int8"] for r in rows))
        said += [f"loses {lost:.2f} points"] if lost > POINTS else []
    return "; ".join(said) or ("yes, where measurable" if any(map(_noisy, rows[0]["speed"])) else "yes")


if __name__ == "__main__":
    main()
