"""The three tasks of the VFT benchmark: digits (vision), spoken digits (audio), Shakespeare's characters (text)."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.benchmark.audio import log_mel
from layerwise.native import VFTModel, VFTSettings


@dataclass(frozen=True)
class TaskData:
    """Inputs by the name of the model's argument, and targets; `metric`: "accuracy" (higher is better) or "loss" in nats."""

    settings: VFTSettings
    argument: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    metric: str
    steps: int
    batch: int


def digits(data: Path) -> TaskData:
    """8 × 8 images, every fifth one a test image; 2 × 2 patches."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(found.target)
    test = torch.arange(len(labels)) % 5 == 0
    s = VFTSettings(d_model=64, n_layers=4, n_heads=4, rank=28, hidden=112, image=(1, 8, 8, 2), classes=10, max_positions=16)
    return TaskData(s, "images", (images[~test], labels[~test]), (images[test], labels[test]), "accuracy", 400, 64)


def spoken(data: Path) -> TaskData:
    """3,000 clips, log-mel frames two by two; the data set's own test split (300 clips, the same speakers)."""
    import pandas as pd
    import soundfile

    table = pd.read_parquet(data / "fsdd" / "fsdd.parquet")
    clips = [soundfile.read(io.BytesIO(b))[0] for b in table["flac"]]
    frames = log_mel(clips).transpose(1, 2)  # (clips, frames, mels)
    frames = frames.reshape(len(frames), frames.shape[1] // 2, -1)
    labels = torch.tensor(table["digit"].to_numpy(np.int64))
    test = torch.tensor((table["split"] == "test").to_numpy())
    s = VFTSettings(
        d_model=96, n_layers=3, n_heads=4, rank=32, hidden=128, frame=frames.shape[-1], classes=10, max_positions=frames.shape[1]
    )  # fmt: skip
    return TaskData(s, "frames", (frames[~test], labels[~test]), (frames[test], labels[test]), "accuracy", 250, 48)


def characters(data: Path) -> TaskData:
    """The last tenth is the test; 128 characters of context; the test loss is on 64 pieces."""
    text = (data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    names = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([names[c] for c in text])
    cut = len(ids) * 9 // 10
    s = VFTSettings(
        d_model=96, n_layers=3, n_heads=4, rank=36, hidden=144, vocab_size=len(names), causal=True, max_positions=128
    )  # fmt: skip
    train, test = ids[:cut].unfold(0, 129, 16), ids[cut:].unfold(0, 129, (len(ids) - cut - 129) // 64)[:64]
    return TaskData(s, "input_ids", (train[:, :-1], train[:, 1:]), (test[:, :-1], test[:, 1:]), "loss", 250, 12)


TASKS: dict[str, Callable[[Path], TaskData]] = {"digits": digits, "spoken digits": spoken, "characters": characters}


def trained(model: VFTModel, task: TaskData, seed: int, rate: float = 3e-3) -> VFTModel:
    """AdamW under a one-cycle schedule, the same for every net; the batches are drawn with `seed`."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=task.steps)
    model.train()
    for _ in range(task.steps):
        picked = torch.randint(len(task.train[0]), (task.batch,), generator=generator)
        out = model(**{task.argument: task.train[0][picked]})
        loss = F.cross_entropy(out.flatten(0, -2), task.train[1][picked].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def quality(model: VFTModel, task: TaskData) -> float:
    """Accuracy, or mean loss in nats per character, on the test part."""
    outputs = torch.cat([model(**{task.argument: part}) for part in task.test[0].split(64)])
    if task.metric == "accuracy":
        return float((outputs.argmax(-1) == task.test[1]).double().mean())
    return float(F.cross_entropy(outputs.flatten(0, -2).double(), task.test[1].flatten()))
