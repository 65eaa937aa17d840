"""`ModalityAdapter`: how raw rows become tensors, and how outputs become the one tensor that a task reads.

Structure (where the layers are) is not the adapter's business: see `layerwise.structure`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from layerwise import trees
from layerwise.data import Batch, Row
from layerwise.errors import UsageError, UserModelError
from layerwise.examples import example_of
from layerwise.registry import Registry
from layerwise.source import Source
from layerwise.task import Fidelity, Task, suited_task

PREFERRED = ("logits", "pred_logits", "text_embeds", "pooler_output", "last_hidden_state")


class ModalityAdapter(ABC):
    """Frozen dataclass of settings (tokenizer, transform, sizes); one instance belongs to one model."""

    modality: ClassVar[str]
    priority: ClassVar[int] = 0  # where several claim a module, the highest wins

    @classmethod
    @abstractmethod
    def claims(cls, module: nn.Module) -> bool:
        """Whether this adapter knows how to feed `module`, judged without importing anything heavy."""

    @classmethod
    def left_in(cls, folder: Path) -> bool:
        """Whether `folder` holds settings of this adapter, which then is the one for any module."""
        return False

    @classmethod
    @abstractmethod
    def of(cls, module: nn.Module, folder: Path | None = None) -> ModalityAdapter:
        """The adapter for `module`; `folder` may hold its tokenizer or preprocessing settings."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it reads by their own names; empty where it reads roles (text, image, x)."""
        return ()

    @abstractmethod
    def collate(self, rows: Sequence[Row]) -> Batch:
        """Raw rows (dicts of column → value) to one batch. Raises `DataError` naming the row."""

    def prepare(self, rows: Sequence[Row]) -> tuple[Sequence[Row], tuple[str, ...]]:
        """What is done once for all rows before they are cut into batches (tokenizing, checks), and notes on it in words.

        Raises `DataError` naming the row.
        """
        return rows, ()

    def example(self, module: nn.Module) -> Batch | None:
        """A small valid batch made from nothing, to trace the model with; None where that cannot be known.

        A model of transformers says what it reads (`layerwise.examples`), whatever the modality.
        """
        return example_of(module)

    def accept(self, batch: Batch) -> None:
        """Raises `DataError` for a ready batch of a form that could not be taken apart by samples."""

    def output(self, raw: Any) -> Tensor:
        """The tensor that tasks read. Raises `UserModelError` (LW-U78) when the forward gave none."""
        return main_tensor(raw)

    def default_task(self, module: nn.Module, batch: Batch, output: Tensor) -> Task:
        """What the labels are of (`suited_task`); without labels, fidelity to the model's own outputs."""
        suited = suited_task(batch.labels, output)
        return self.fidelity(module) if suited is None else suited

    def fidelity(self, module: nn.Module) -> Fidelity:
        """The divergence that suits the outputs of `module`: KL of logits, or the cosine where they are embeddings."""
        return Fidelity()

    @property
    def modalities(self) -> tuple[str, ...]:
        """What it reads, one name for each part of a row that may be missing (see `masked`)."""
        return (self.modality,)

    def masked(self, batch: Batch, missing: Collection[str]) -> Batch:
        """A copy of `batch` in which these modalities are missing in every row; shapes, labels and decoder tokens stay.

        Raises `UsageError` for a modality that the model does not read, or where it reads only one.
        """
        reads = f"The model reads {self.modality} only"
        raise UsageError(f"{reads}: nothing can be left out.", remedy="Give a model that reads several modalities.")

    def source(self, module: nn.Module) -> Source | None:
        """How the class of `module` can be built again in another process, where the module says so itself; else None."""
        return None

    def remarks(self, module: nn.Module, batch: Batch) -> tuple[str, ...]:
        """What the module can say of its own layers on a batch, in words, for the notes of a report; mostly nothing."""
        return ()

    def save(self, folder: Path) -> None:
        """Writes what `of(module, folder)` needs to come back (tokenizer, transform); nothing by default."""


ADAPTERS: Registry[ModalityAdapter] = Registry("modality adapter", "layerwise.adapters")


def adapter_for(module: nn.Module, folder: Path | None = None) -> ModalityAdapter:
    """The adapter whose settings are in `folder`, else the one that claims `module` with the highest priority.

    The plain tensor adapter claims everything.
    """
    left = [cls for cls in ADAPTERS.values() if folder is not None and cls.left_in(folder)]
    claiming = left or [cls for cls in ADAPTERS.values() if cls.claims(module)]
    return max(claiming, key=lambda cls: cls.priority).of(module, folder)


def main_tensor(raw: Any) -> Tensor:
    """A tensor itself; of a mapping the field that carries the result; else the first floating-point tensor."""
    if isinstance(raw, Tensor):
        return raw
    if isinstance(raw, Mapping):
        for key in PREFERRED:
            if isinstance(raw.get(key), Tensor):
                return raw[key]
    if isinstance(raw, list | tuple) and raw and all(isinstance(part, Mapping) for part in raw):
        raise UserModelError(
            "The forward gave a list of dicts, one per sample, as detectors do after suppression: no tensor holds all answers.",
            remedy="Give a wrapper whose forward returns one tensor, or (logits, boxes) for task='detection'.",
            code="LW-U78",
        )
    for _, tensor in trees.tensors(raw):
        if tensor.is_floating_point():
            return tensor
    raise UserModelError(
        f"The forward gave {type(raw).__name__} without a floating-point tensor.",
        remedy="Return a tensor, a tuple or a dict of tensors.",
        code="LW-U78",
    )


def library_of(module: nn.Module) -> set[str]:
    """The top-level packages of the module's classes: which library it comes from, without importing that library."""
    return {cls.__module__.partition(".")[0] for cls in type(module).__mro__} - {"torch", "builtins"}


__all__ = ["ADAPTERS", "ModalityAdapter", "adapter_for", "library_of", "main_tensor"]
