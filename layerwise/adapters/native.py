"""The native architecture (`layerwise.native`): what a `VFTModel` reads is written in its settings."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layerwise.adapter import ADAPTERS, ModalityAdapter, library_of
from layerwise.adapters._image import Transform
from layerwise.adapters._labels import labels_of
from layerwise.adapters._settings import json_file
from layerwise.data import Batch, Row
from layerwise.errors import DataError, UsageError, nearest
from layerwise.rows import place_of
from layerwise.source import Source
from layerwise.task import Fidelity, LanguageModelling, Task
from layerwise.trees import mapped

SETTINGS = "preprocessing.json"
ARGUMENTS = {"vision": "images", "audio": "frames", "text": "input_ids"}
COLUMNS = {"vision": "image", "audio": "frames", "text": "input_ids"}


@ADAPTERS.register("native")
@dataclass(frozen=True)
class NativeModalityAdapter(ModalityAdapter):
    """Rows with ``input_ids`` (numbers of tokens), ``image`` and ``frames`` ((time, features) of sound), as far as the model
    reads them; several together for a multimodal model. Padded on the right to the longest of a batch.

    `settings` are the model's; `transform` resizes and scales images.
    """

    settings: Any
    transform: Transform
    modality: ClassVar[str] = "native"
    priority: ClassVar[int] = 20

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        if "layerwise" not in library_of(module):
            return False
        from layerwise.native import VFTModel

        return isinstance(module, VFTModel)

    @classmethod
    def of(cls, module: Any, folder: Path | None = None) -> NativeModalityAdapter:
        s = module.settings
        saved = json_file(folder / SETTINGS) if folder else {}
        if saved:
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
            return cls(s, Transform(**values))
        size = s.image[:3] if s.image else (1, 1, 1)
        return cls(s, Transform(size, mean=(0.5,), std=(0.5,), crop=1.0, mode="squash"))

    def collate(self, rows: Sequence[Row]) -> Batch:
        """Keyword arguments of the forward, and labels (samples,). Raises `DataError` LW-D32 or LW-D39, naming the row."""
        kwargs: dict[str, Any] = {}
        masks: list[Tensor] = []
        for kind in self.settings.modalities:
            parts = [self._part(kind, row, place_of(row, i)) for i, row in enumerate(rows)]
            if all(part is None for part in parts):
                continue
            name, tensor, mask = self._together(kind, parts, rows)
            kwargs[name] = tensor
            masks += [] if mask is None else [mask]
        if not kwargs:
            self._refuse(rows[0], place_of(rows[0], 0))
        if masks:
            kwargs["attention_mask"] = torch.cat(masks, 1)
        return Batch((), kwargs, labels_of(rows))

    def _together(self, kind: str, parts: list[Any], rows: Sequence[Row]) -> tuple[str, Tensor, Tensor | None]:
        for i, part in enumerate(parts):
            if part is None:
                self._refuse(rows[i], place_of(rows[i], i))
        if kind == "vision":
            return ARGUMENTS[kind], torch.stack(parts), None
        lengths = torch.tensor([len(part) for part in parts])
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        padded = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        return ARGUMENTS[kind], padded, mask

    def _part(self, kind: str, row: Row, place: str) -> Tensor | None:
        value = row.get(COLUMNS[kind])
        if value is None:
            return None
        if kind == "vision":
            return self.transform(value, place)
        if kind == "text":
            return self._ids(value, place)
        frames = torch.as_tensor(value).float()
        if frames.dim() != 2 or frames.shape[1] != self.settings.frame or not bool(frames.isfinite().all()):
            what = f"'frames' is {tuple(frames.shape)}, not finite numbers (time, {self.settings.frame})."
            raise DataError(what, place=place, remedy="Give one row of features per frame.", code="LW-D32")
        return frames

    def _ids(self, value: Any, place: str) -> Tensor:
        ids = torch.as_tensor(value).long().reshape(-1)
        size = self.settings.vocab_size
        if not len(ids) or not 0 <= int(ids.min()) <= int(ids.max()) < size:
            what = f"'input_ids' is empty or goes outside the model's vocabulary of {size}."
            raise DataError(what, place=place, remedy="The token numbers belong to another model.", code="LW-D39")
        return ids

    def _refuse(self, row: Row, place: str) -> None:
        wanted = ", ".join(COLUMNS[kind] for kind in self.settings.modalities)
        what = f"The model reads {wanted}; the row has the columns {', '.join(map(str, row))}."
        remedy = "Name the columns (columns={'image': …}); text must come as numbers of tokens."
        raise DataError(what, place=place, remedy=remedy, code="LW-D32")

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.settings.modalities

    def masked(self, batch: Batch, missing: Collection[str]) -> Batch:
        """Padding instead of tokens and frames, grey instead of images."""
        if len(self.modalities) < 2:
            return super().masked(batch, missing)
        kwargs = dict(batch.kwargs)
        for name in missing:
            if name not in self.modalities:
                raise UsageError(f"The model reads no {name!r}.", remedy=nearest(name, self.modalities))
            kwargs[ARGUMENTS[name]] = torch.zeros_like(kwargs[ARGUMENTS[name]])
            if name != "vision":
                kwargs["attention_mask"] = self._unseen(kwargs, name)
        return Batch(batch.args, kwargs, batch.labels)

    def _unseen(self, kwargs: Mapping[str, Any], name: str) -> Tensor:
        """The mask with zeros for this part; frames stand before text."""
        lengths = {n: kwargs[ARGUMENTS[n]].shape[1] for n in ("audio", "text") if ARGUMENTS[n] in kwargs}
        ids = kwargs[ARGUMENTS[name]]
        mask = kwargs.get(
            "attention_mask", torch.ones(len(ids), sum(lengths.values()), dtype=torch.long, device=ids.device)
        ).clone()
        start = 0 if name == "audio" else lengths.get("audio", 0)
        mask[:, start : start + lengths[name]] = 0
        return mask

    def example(self, module: nn.Module) -> Batch:
        """Two samples of everything that it reads, the same each time."""
        s, generator = self.settings, torch.Generator().manual_seed(0)
        kwargs: dict[str, Any] = {}
        length = max(2, min(12, (s.max_positions - s.patches) // max(1, len(s.modalities) - bool(s.image))))
        if s.image:
            kwargs["images"] = torch.randn(2, *s.image[:3], generator=generator)
        if s.frame:
            kwargs["frames"] = torch.randn(2, length, s.frame, generator=generator)
        if s.vocab_size:
            kwargs["input_ids"] = torch.randint(s.vocab_size, (2, length), generator=generator)
        dtype = next(module.parameters()).dtype
        return Batch((), mapped(kwargs, lambda t: t.to(dtype) if t.is_floating_point() else t))

    def default_task(self, module: nn.Module, batch: Batch, output: Tensor) -> Task:
        """Language modelling for next-token logits, classification for classes with labels, else fidelity."""
        if self.settings.causal and self.settings.vocab_size and not self.settings.classes:
            return LanguageModelling()
        return super().default_task(module, batch, output)

    def fidelity(self, module: nn.Module) -> Fidelity:
        logits = self.settings.classes or (self.settings.causal and self.settings.vocab_size)
        return Fidelity() if logits else Fidelity(kind="cosine")

    def source(self, module: nn.Module) -> Source:
        """A plain class of an importable package and its settings: `layerwise.sources` builds it again in any process."""
        return Source("py", "layerwise.native:VFTModel", self.settings.to_dict())

    def remarks(self, module: Any, batch: Batch) -> tuple[str, ...]:
        """Off-plane rate and gate share of every block on the batch."""
        found = module.statistics(*batch.args, **batch.kwargs)
        parts = [f"{name} {float(s.mean):.2f} ({float(s.share):.0%})" for name, s in zip(module.stack(), found, strict=True)]
        return (f"off-plane rate ε, and the share of tokens past the gate, on the first batch: {', '.join(parts)}",)

    def save(self, folder: Path) -> None:
        (folder / SETTINGS).write_text(json.dumps(asdict(self.transform), indent=1) + "\n", encoding="utf-8")


__all__ = ["NativeModalityAdapter"]
