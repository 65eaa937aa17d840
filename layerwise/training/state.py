"""The state of a training on disk: whole or not at all, read back only into the same work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.counts import Counts
from layerwise.errors import CorruptRun
from layerwise.files import newest_intact, staged_folder
from layerwise.tensors import flattened, state
from layerwise.training.record import Epoch
from layerwise.weights import read_weights, save_weights

KEPT = 2  # states: one that is damaged leaves the one before


@dataclass
class Progress:
    """How far the training is. `loss` sums the objective over the steps of the epoch that runs."""

    step: int = 0
    loss: float = 0.0
    epochs: list[Epoch] = field(default_factory=list)
    best: int | None = None
    worse: int = 0  # epochs in a row that were no better than the best
    stopped: str = ""
    counts: Counts = field(default_factory=Counts)
    best_weights: dict[str, Tensor] = field(default_factory=dict, repr=False)  # on the CPU

    def plain(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "best_weights"}

    def load_(self, plain: Mapping[str, Any]) -> None:
        for name, value in plain.items():
            setattr(self, name, value)
        self.epochs = [Epoch(**epoch) for epoch in plain["epochs"]]
        self.counts = Counts(**plain["counts"])


@dataclass(frozen=True)
class State:
    """What a step changes: the module, what is trained along, the optimizer and the progress."""

    module: nn.Module
    companion: nn.Module | None
    optimizer: torch.optim.Optimizer
    progress: Progress

    def save(self, folder: Path, key: str) -> None:
        """Writes ``step-<n>`` beside the older ones, then removes all but the last two."""
        folder.mkdir(parents=True, exist_ok=True)
        with staged_folder(folder / f"step-{self.progress.step:09d}", force=True) as stage:
            for name, tensors in self._files().items():
                if tensors:
                    save_weights(stage / f"{name}.safetensors", tensors)
            about = {"key": key, "files": [n for n, t in self._files().items() if t], "progress": self.progress.plain()}
            (stage / "progress.json").write_text(json.dumps(about), encoding="utf-8")
        for old in sorted(folder.glob("step-*"))[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    def resume_(self, folder: Path, key: str) -> list[str]:
        """Takes over the newest intact state, if there is one; what was skipped, in words.

        Raises `CorruptRun` (LW-R11) when it belongs to another model, data set, objective or recipe.
        """
        newest, skipped = newest_intact(sorted(folder.glob("step-*"))) if folder.is_dir() else (None, [])
        notes = [f"A damaged checkpoint was skipped: {path.name}: {why}" for path, why in skipped]
        if newest is None:
            return notes
        about = json.loads((newest / "progress.json").read_text(encoding="utf-8"))
        if about["key"] != key:
            raise CorruptRun(
                "The checkpoint belongs to another model, data set, objective or recipe.",
                place=str(newest),
                remedy="Remove the folder to start afresh.",
            )
        files = {name: read_weights(newest / f"{name}.safetensors") for name in about["files"]}
        put_(self.module, files["model"])
        if self.companion is not None:
            put_(self.companion, files.get("companion", {}))
        self._put_optimizer(files.get("optimizer", {}))
        self.progress.load_(about["progress"])
        self.progress.best_weights = dict(files.get("best", {}))
        return notes

    def _files(self) -> dict[str, dict[str, Tensor]]:
        companion = {} if self.companion is None else values_of(self.companion)
        return {
            "model": values_of(self.module),
            "companion": companion,
            "optimizer": self._optimizer(),
            "best": self.progress.best_weights,
        }

    def _optimizer(self) -> dict[str, Tensor]:
        """``parameter.name`` → tensor of the optimizer's memory."""
        memory = self.optimizer.state_dict()["state"]
        return {f"{number}.{name}": t for number, own in memory.items() for name, t in own.items() if isinstance(t, Tensor)}

    def _put_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        memory: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            number, _, name = key.partition(".")
            memory.setdefault(int(number), {})[name] = tensor
        self.optimizer.load_state_dict({"state": memory, "param_groups": self.optimizer.state_dict()["param_groups"]})


def values_of(module: nn.Module) -> dict[str, Tensor]:
    """Name → plain tensor, live, of everything that is saved of a module."""
    return {key: plain.detach() for name, t in state(module).items() for key, plain in flattened(name, t).items()}


def copied(module: nn.Module) -> dict[str, Tensor]:
    """The same as copies on the CPU."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in values_of(module).items()}


def put_(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Writes the values into the module's own tensors."""
    with torch.no_grad():
        for name, live in values_of(module).items():
            live.copy_(tensors[name])
