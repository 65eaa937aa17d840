"""`Supplies`: what a compression step may need besides the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from layerwise.data import Data
from layerwise.errors import UsageError

if TYPE_CHECKING:
    from layerwise.model import UniversalModel

Progress = Callable[[int, int], None]  # done, in all


@dataclass(frozen=True)
class Supplies:
    """`calibration`: inputs to watch activations and gradients on. `training`: batches with targets to learn from, `validation`
    those that training is judged by. `teacher`: the uncompressed model. `checkpoint`: a folder for the state of training.
    `executor`: who trains, this process (``local``) or those that a launcher started (``accelerate``); ``auto`` looks.
    """

    calibration: Data | None = None
    training: Data | None = None
    validation: Data | None = None
    teacher: UniversalModel | None = None
    checkpoint: Path | None = None
    progress: Progress | None = None
    executor: str = "auto"

    def at(self, name: str) -> Supplies:
        """The same with a checkpoint folder of that name inside the one here."""
        return self if self.checkpoint is None else replace(self, checkpoint=self.checkpoint / name)

    def check(self, method: str, needs: frozenset[str]) -> None:
        """Raises `UsageError` (LW-C15) naming what `method` needs and was not given."""
        missing = [f.name for f in fields(self) if f.name in needs and getattr(self, f.name) is None]
        if missing:
            what = " and ".join(f"{name} data" if name != "teacher" else "the teacher" for name in missing)
            remedy = f"Give {', '.join(f'{name}=...' for name in missing)}."
            raise UsageError(f"{method} needs {what}.", remedy=remedy, code="LW-C15")


NOTHING = Supplies()
