"""Several modalities at once: CLIP, SigLIP, CLAP, BLIP-2, LLaVA, and any module with a ``multimodal_cfg``.

Decision: every modality has the adapter it would have alone, and rows may lack some. What is missing is replaced by what says
nothing: an image that is 0 once scaled, silence, a text without words; a model with an argument for it is told so as well. So
shapes stay, and "without the image" is defined for models that were never trained without one: it is that stand-in, and the
analyses say so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layerwise.adapter import ADAPTERS, ModalityAdapter, library_of
from layerwise.adapters._labels import labels_of
from layerwise.adapters._parts import Parts, described, own_parts, sound_argument, takes, transformers_parts
from layerwise.adapters._tokens import padded
from layerwise.data import Batch, Row
from layerwise.errors import DataError, UsageError, nearest
from layerwise.heads import encoder_of
from layerwise.hugging import is_bare, modalities
from layerwise.rows import Record, place_of
from layerwise.task import Fidelity, LanguageModelling, Task

COLUMNS = {"text": ("text", "input_ids"), "image": ("image",), "audio": ("audio", "features")}
ARGUMENTS = {"text": "input_ids"}  # the others' adapters say it
EMBEDDINGS = ("text_embeds", "image_embeds", "audio_embeds")
TOKENS = 8  # of the example's texts


@ADAPTERS.register("multimodal")
@dataclass(frozen=True)
class MultiModalAdapter(ModalityAdapter):
    """Any subset of text, image and audio per row, as far as the model reads them; see `Parts`.

    `generates`: the output are logits of the next token.
    """

    parts: Parts
    generates: bool = False
    modality: ClassVar[str] = "multimodal"
    priority: ClassVar[int] = 20

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        inner: Any = encoder_of(module)
        if "transformers" not in library_of(inner):
            return bool(described(inner))
        sees = takes(inner, "pixel_values")
        hears = bool(sound_argument(inner)) and hasattr(inner.config, "audio_config")
        both = len(modalities(inner)) > 1 or getattr(inner, "main_input_name", "") == "pixel_values"
        return takes(inner, "input_ids") and (sees or hears) and both

    @classmethod
    def of(cls, module: nn.Module, folder: Path | None = None) -> MultiModalAdapter:
        inner: Any = encoder_of(module)
        if "transformers" not in library_of(inner):
            return cls(own_parts(inner, described(inner)))
        parts = transformers_parts(inner, folder)
        return cls(parts, generates=parts.placeholder is not None and not is_bare(inner))

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.parts.adapters)

    def prepare(self, rows: Sequence[Row]) -> tuple[Sequence[Row], tuple[str, ...]]:
        """Rows whose text and audio are ready; a note counts the rows that lack a modality.

        Raises `DataError` LW-D32 for a row that has none of them, and for a modality that no row has although the model cannot
        be told so.
        """
        self._check(rows)
        notes: list[str] = []
        ready = [dict(row) for row in rows]
        for name, adapter in self.parts.adapters:
            there = [i for i, row in enumerate(rows) if _has(row, name)]
            notes += self._missing(name, len(rows) - len(there), rows)
            found, said = adapter.prepare([rows[i] for i in there])
            notes += said
            for i, done in zip(there, found, strict=True):
                ready[i] |= done if adapter.modality != "vision" else {}
        return [Record(row, place_of(rows[i], i)) for i, row in enumerate(ready)], tuple(notes)

    def _check(self, rows: Sequence[Row]) -> None:
        for i, row in enumerate(rows):
            if not any(_has(row, name) for name in self.modalities):
                what = f"The row has none of {', '.join(self.modalities)}."
                raise DataError(what, place=place_of(row, i), remedy=f"Its columns: {', '.join(row)}.", code="LW-D32")

    def _missing(self, name: str, count: int, rows: Sequence[Row]) -> list[str]:
        if count == len(rows) and not self.parts.flag:
            place = place_of(rows[0], 0)
            remedy = f"Name its column (columns={{{name!r}: …}}), or leave it out on purpose with adapter.masked."
            raise DataError(f"No row has {name}, which the model reads.", place=place, remedy=remedy, code="LW-D32")
        return [f"{count} of {len(rows)} rows have no {name}"] if count else []

    def collate(self, rows: Sequence[Row]) -> Batch:
        """The arguments of every modality; what a row lacks is missing as in `masked`."""
        self._check(rows)
        plain = [{k: v for k, v in row.items() if k != "label"} for row in rows]
        kwargs: dict[str, Any] = {}
        labels = labels_of(rows)
        for name, adapter in self.parts.adapters:
            blank = self._blank_row(name, adapter)
            batch = adapter.collate([self._with_image(row, name) if _has(row, name) else blank for row in plain])
            kwargs |= batch.kwargs
            labels = batch.labels if labels is None else labels
        if self.generates and labels is None and self.parts.placeholder is not None:
            counted = kwargs["attention_mask"].bool() & (kwargs["input_ids"] != self.parts.placeholder[0])
            labels = kwargs["input_ids"].masked_fill(~counted, -100)  # neither padding nor images are to be predicted
        if self.parts.flag:
            kwargs[self.parts.flag] = torch.ones(len(rows), len(self.modalities), dtype=torch.bool)
        batch = Batch((), kwargs, labels)
        for name in self.modalities:
            batch = self._without(batch, name, torch.tensor([not _has(row, name) for row in rows]))
        return batch

    def _blank_row(self, name: str, adapter: Any) -> Row:
        """A row of the modality that can be collated; it is blanked afterwards."""
        if name == "text":
            return self._with_image({"input_ids": list(self.parts.blank) or [adapter.pad]}, name)
        if name == "image":
            return {"image": torch.zeros(adapter.transform.size)}
        return {"audio": torch.zeros(adapter.features.least), "sample_rate": adapter.features.rate}

    def _with_image(self, row: Row, name: str) -> Row:
        """A text with the ids that stand for its image: in front, or where it has one of them already."""
        if name != "text" or self.parts.placeholder is None:
            return row
        token, count = self.parts.placeholder
        (ready,), _ = dict(self.parts.adapters)["text"].prepare([row])
        ids = list(ready["input_ids"])
        at = ids.index(token) if token in ids else 0
        rest = [i for i in ids if i != token]
        return {**ready, "input_ids": [*rest[:at], *[token] * count, *rest[at:]]}

    def masked(self, batch: Batch, missing: Collection[str]) -> Batch:
        for name in missing:
            if name not in self.modalities:
                raise UsageError(f"The model reads no {name!r}.", remedy=nearest(name, self.modalities))
            batch = self._without(batch, name, torch.ones(batch.size, dtype=torch.bool))
        return batch

    def _without(self, batch: Batch, name: str, rows: Tensor) -> Batch:
        """The batch with one modality missing in the rows that are True."""
        if not bool(rows.any()):
            return batch
        adapter = dict(self.parts.adapters)[name]
        argument = ARGUMENTS.get(name) or adapter.argument
        if argument not in batch.kwargs:
            raise UsageError(f"The batch has no argument {argument!r}.", remedy="Make it with load_data or adapter.collate.")
        kwargs = dict(batch.kwargs)
        old = kwargs[argument]
        rows = rows.to(old.device)
        new = self._empty_text(old) if name == "text" else _nothing(name, adapter, old)
        kwargs[argument] = torch.where(rows.reshape(-1, *[1] * (old.dim() - 1)), new, old)
        if name == "text" and "attention_mask" in kwargs:
            empty = self._empty_mask(old).to(kwargs["attention_mask"])
            kwargs["attention_mask"] = torch.where(rows[:, None], empty, kwargs["attention_mask"])
        if self.parts.flag:
            there = kwargs[self.parts.flag].clone()
            there[:, self.modalities.index(name)] &= ~rows
            kwargs[self.parts.flag] = there
        return Batch(batch.args, kwargs, batch.labels)

    def _empty_text(self, ids: Tensor) -> Tensor:
        """(1, tokens): the image's ids, then those of an empty text, then padding."""
        empty = padded([self._empty_ids(ids.shape[1])], 0)
        pad = dict(self.parts.adapters)["text"].pad
        return nn.functional.pad(empty, (0, ids.shape[1] - empty.shape[1]), value=pad).to(ids)

    def _empty_mask(self, ids: Tensor) -> Tensor:
        return (torch.arange(ids.shape[1]) < len(self._empty_ids(ids.shape[1])))[None]

    def _empty_ids(self, width: int) -> list[int]:
        token, count = self.parts.placeholder or (0, 0)
        return [*[token] * count, *self.parts.blank][:width]

    def example(self, module: nn.Module) -> Batch:
        """Two samples of random tokens, noise and noise, the same each time."""
        generator = torch.Generator().manual_seed(0)
        rows: list[dict[str, Any]] = [{}, {}]
        for name, adapter in self.parts.adapters:
            for row in rows:
                row[name if name != "text" else "input_ids"] = self._random(name, adapter, generator)
                row["sample_rate"] = adapter.features.rate if name == "audio" else row.get("sample_rate")
        return self.collate(rows)

    def _random(self, name: str, adapter: Any, generator: torch.Generator) -> Any:
        if name == "image":
            return torch.rand(adapter.transform.size, generator=generator)
        if name == "audio":
            return torch.randn(max(adapter.features.rate // 2, adapter.features.least), generator=generator) / 10
        special = {adapter.pad, *self.parts.blank, *(self.parts.placeholder or ())[:1]}
        plain = [i for i in range(min(adapter.vocabulary, 4096)) if i not in special] or [0]
        drawn = torch.randint(len(plain), (min(TOKENS, (adapter.longest or TOKENS)) - 1,), generator=generator).tolist()
        return [*(plain[i] for i in drawn), *(self.parts.blank[-1:] or (plain[0],))]

    def output(self, raw: Any) -> Tensor:
        """Logits; of models with one half per modality the embeddings of all, (samples, modalities, width)."""
        if isinstance(raw, Mapping) and "logits" not in raw:
            found = [raw[key] for key in EMBEDDINGS if isinstance(raw.get(key), Tensor)]
            if len(found) > 1 and len({tensor.shape for tensor in found}) == 1:
                return torch.stack(found, 1)
        return super().output(raw)

    def default_task(self, module: nn.Module, batch: Batch, output: Tensor) -> Task:
        if self.generates and output.dim() == 3:
            return LanguageModelling()
        return super().default_task(module, batch, output)

    def fidelity(self, module: nn.Module) -> Fidelity:
        inner = encoder_of(module)
        bare = inner is module and "transformers" in library_of(inner) and is_bare(inner)
        return Fidelity(kind="cosine") if bare else Fidelity()

    def save(self, folder: Path) -> None:
        for _, adapter in self.parts.adapters:
            adapter.save(folder)


def _has(row: Row, name: str) -> bool:
    return any(row.get(column) is not None for column in COLUMNS[name])


def _nothing(name: str, adapter: Any, like: Tensor) -> Tensor:
    """The argument of a row that has none: an image of zeros (after scaling), the features of silence."""
    if name == "image" or adapter.features.kind == "waveform":
        return torch.zeros_like(like)
    silence = adapter.features(torch.zeros(max(adapter.features.least, adapter.features.window))).to(like)
    return silence[None].expand_as(like) if silence.shape == like.shape[1:] else silence.mean().expand_as(like)
