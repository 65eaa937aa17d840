"""`Teacher`: what a teacher shows of each batch, computed once and then answered from memory or disk.

The batches of a training are the same in every epoch, so a teacher needs one forward for each, however many epochs there are.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from layerwise.data import Batch
from layerwise.distillation.seen import Seen, look
from layerwise.errors import CorruptRun
from layerwise.files import staged_folder, verify_manifest
from layerwise.model import UniversalModel
from layerwise.trace import evaluating
from layerwise.training import Portion
from layerwise.weights import read_weights, save_weights


@dataclass
class Memory:
    """Named tensors per batch, kept on the CPU under a key that says of which teacher and data; shared by several trainings.

    `forwards` counts what the teachers computed, `answered` what came from here instead.
    """

    kept: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)
    forwards: int = 0
    answered: int = 0

    def find(self, key: str) -> Mapping[str, Tensor] | None:
        return self.kept.get(key)

    def keep(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        self.kept[key] = {name: tensor.detach().cpu() for name, tensor in tensors.items()}


@dataclass
class Disk:
    """The same in a folder: one folder of safetensors per batch, under a manifest that is checked before it is read."""

    folder: Path
    forwards: int = 0
    answered: int = 0

    def find(self, key: str) -> Mapping[str, Tensor] | None:
        """A damaged entry is removed, and computed again."""
        place = self.folder / key
        if not place.is_dir():
            return None
        try:
            verify_manifest(place)
        except (CorruptRun, OSError):
            shutil.rmtree(place, ignore_errors=True)
            return None
        return read_weights(place / "seen.safetensors")

    def keep(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        (self.folder / key).parent.mkdir(parents=True, exist_ok=True)
        with staged_folder(self.folder / key, force=True) as staged:
            save_weights(staged / "seen.safetensors", {n: t.detach().cpu().contiguous() for n, t in tensors.items()})


@dataclass
class Nothing:
    """Keeps nothing: the teacher runs in every epoch."""

    forwards: int = 0
    answered: int = 0

    def find(self, key: str) -> Mapping[str, Tensor] | None:
        return None

    def keep(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        pass


Store = Memory | Disk | Nothing


@dataclass(frozen=True)
class Teacher:
    """`model` seen at the layers `features` and `attention`; `about` tells its data and itself from others' in a shared store."""

    model: UniversalModel
    features: Sequence[str]
    attention: Sequence[str]
    store: Store
    about: str = ""

    def see(self, batch: Batch, portion: Portion) -> Seen:
        """Of these samples; they must be those of the data that `about` names."""
        key = f"{self._key}/{portion.index}-{portion.start}-{portion.stop}"
        kept = self.store.find(key)
        if kept is None:
            with evaluating(self.model.module), torch.no_grad():
                seen = look(self.model, batch.to(self.model.device), self.features, self.attention)
            self.store.forwards += 1
            self.store.keep(key, seen.flat())
            return seen
        self.store.answered += 1
        return Seen.unflat(kept)

    @property
    def _key(self) -> str:
        parts = (self.about, ",".join(self.features), ",".join(self.attention))
        return hashlib.sha256("|".join(parts).encode()).hexdigest()[:24]
