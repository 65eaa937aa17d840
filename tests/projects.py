"""A user's project in a folder: a small model in a Python file and its data in a CSV, for tests of whole commands."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

MODEL = '''
import os
import time

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self, depth=4, width=8, classes=3):
        super().__init__()
        self.stem = nn.Linear(4, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        time.sleep(float(os.environ.get("SLOW", "0")))
        return self.head(self.blocks(self.stem(x)))


def net():
    torch.manual_seed(0)
    return Net()


class Endless(Net):
    def forward(self, x):
        while True:
            pass


class Deaf(Net):
    """Does not stop for any exception."""

    def forward(self, x):
        while True:
            try:
                time.sleep(60)
            except BaseException:
                pass
'''


@dataclass(frozen=True)
class Project:
    """Where the files are, and the flags that name them."""

    folder: Path

    @property
    def model(self) -> str:
        return f"{self.folder / 'net.py'}:net"

    @property
    def data(self) -> Path:
        return self.folder / "rows.csv"

    def run(self, out: str = "out", *more: str) -> list[str]:
        """The arguments of a whole walk without an export."""
        flags = {
            "--model": self.model,
            "--data": str(self.data),
            "--batch-size": "4",
            "--methods": "layer_ablation,weight_norm",
            "--compress-methods": "drop_layers",
            "--targets": "params<=0.9x",
            "--out": str(self.folder / out),
        }
        return ["run", *(part for pair in flags.items() for part in pair), *more]


def make_project(folder: Path, rows: int = 40) -> Project:
    """Writes the model and `rows` random rows of four features and a label."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "net.py").write_text(MODEL, encoding="utf-8")
    draw = random.Random(0)
    lines = [",".join([*(f"{draw.gauss(0, 1):.4f}" for _ in range(4)), str(draw.randrange(3))]) for _ in range(rows)]
    (folder / "rows.csv").write_text("\n".join(["a,b,c,d,label", *lines]) + "\n", encoding="utf-8")
    return Project(folder)
