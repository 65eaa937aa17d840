"""Text for Hugging Face models: BERT, GPT, Llama, T5, …: what they read is taken from the module and its configuration."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layerwise.adapter import ADAPTERS, ModalityAdapter, library_of
from layerwise.adapters._answers import answer_labels, continued, located, within
from layerwise.adapters._labels import labels_of
from layerwise.adapters._tokens import ends, filler, longest, mask_of, padded, shifted, start, tokenizer_in
from layerwise.data import Batch, Row
from layerwise.errors import DataError
from layerwise.examples import table_of, tokens_of
from layerwise.heads import EncoderWithHead, PooledEncoder, encoder_of
from layerwise.hugging import is_bare, is_causal, is_sequence_to_sequence, reads_text_only
from layerwise.rows import Record, place_of
from layerwise.task import Fidelity, LanguageModelling, Task, task_named

EXAMPLE = (2, 16)  # samples, tokens
PREPARED = ("token_type_ids", "token_labels", "span", "offsets", "context", "answers")  # beside ids, what `prepare` adds to a row


@ADAPTERS.register("text")
@dataclass(frozen=True)
class TextModalityAdapter(ModalityAdapter):
    """Tokenizes, pads to the longest of a batch on the right, and cuts at the model's maximum (or refuses, `truncate`).

    A causal model goes on with ``target`` after ``text``, which is not judged; ``answer`` is a span of ``text_pair``.

    `vocabulary`: rows of the embedding table; `longest`: tokens, None for no maximum; `start`: the id a decoder begins with,
    None where the forward wants no decoder tokens; `fixed`: keyword arguments of every forward.
    """

    vocabulary: int
    longest: int | None = None
    pad: int = 0
    start: int | None = None
    causal: bool = False
    tokenizer: Any = None
    truncate: bool = True
    fixed: tuple[tuple[str, Any], ...] = ()
    modality: ClassVar[str] = "text"
    priority: ClassVar[int] = 10

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        inner = encoder_of(module)
        return "transformers" in library_of(inner) and reads_text_only(inner)

    @classmethod
    def of(cls, module: nn.Module, folder: Path | None = None) -> TextModalityAdapter:
        inner: Any = encoder_of(module)
        tokenizer = tokenizer_in(folder or Path(inner.config.name_or_path or "?"))
        vocabulary = tokens_of(inner)
        return cls(
            vocabulary=vocabulary,
            longest=_places(inner, longest(inner.config, tokenizer)),
            pad=filler(inner.config, tokenizer, vocabulary),
            start=start(inner.config, vocabulary) if is_sequence_to_sequence(inner) else None,
            causal=inner is module and is_causal(inner),
            tokenizer=tokenizer,
            fixed=(("use_cache", False),) if inner is module and _caches(inner) else (),
        )

    def prepare(self, rows: Sequence[Row]) -> tuple[Sequence[Row], tuple[str, ...]]:
        """Rows with ``input_ids`` (and ``target_ids``), every id inside the vocabulary and no sequence over the maximum.

        Raises `DataError` LW-D39 (id), LW-D40 (length, without `truncate`), LW-D32 (no text), LW-D29 (no token).
        """
        ready, lengths = [], []
        for i, row in enumerate(rows):
            done, tokens = self._tokenized(row, i)
            lengths.append(tokens)
            ready.append(done)
        cut = sum(self.longest is not None and n > self.longest for n in lengths)
        notes = []
        if cut:
            most = max(lengths)
            notes.append(f"{cut} of {len(rows)} texts were cut to the model's {self.longest} tokens (the longest has {most})")
        if self.causal and any(row.get("label") is not None for row in rows):
            notes.append("the labels are not used: a language model predicts the next token")
        return ready, tuple(notes)

    def _tokenized(self, row: Row, position: int) -> tuple[Record, int]:
        """The row with its token ids, and how many its longest part had before it was cut."""
        place = place_of(row, position)
        done: dict[str, Any] = {} if self.causal or row.get("label") is None else {"label": row["label"]}
        if row.get("input_ids") is not None:  # prepared before
            done |= {key: row[key] for key in PREPARED if row.get(key) is not None}
        elif "answer" in row:
            return self._located(row, place)
        tokens = 0
        for column, ids, pair in (("text", "input_ids", row.get("text_pair")), ("target", "target_ids", None)):
            if row.get(ids) is None and row.get(column) is None and ids == "target_ids":
                continue
            found = self._ids(row, column, ids, pair, place)
            tokens = max(tokens, len(found[ids]))
            done |= {key: self._within(values, place) for key, values in found.items()}
            self._in_vocabulary(done[ids], place)
        if self.causal and "target_ids" in done:
            done |= continued(done["input_ids"], done.pop("target_ids"), self._specials(), self.longest)
        return Record(done, place), tokens

    def _located(self, row: Row, place: str) -> tuple[Record, int]:
        """A question (``text``) about a context (``text_pair``) with its ``answer``."""
        question, context = row.get("text"), row.get("text_pair")
        if not isinstance(question, str) or not isinstance(context, str) or self.tokenizer is None:
            what = "An answer needs a question and a context as text, and a model with a tokenizer."
            remedy = "Name the columns: columns={'text': question, 'text_pair': context, 'answer': …}."
            raise DataError(what, place=place, remedy=remedy, code="LW-D32")
        found = located(self.tokenizer, question, context, row.get("answer"), place)
        tokens = len(found["input_ids"])
        for key in found.keys() & {"input_ids", "token_type_ids"}:
            found[key] = self._within(found[key], place)
        self._in_vocabulary(found["input_ids"], place)
        return Record(within(found, len(found["input_ids"])), place), tokens

    def _ids(self, row: Row, column: str, ids: str, pair: Any, place: str) -> dict[str, list[int]]:
        if row.get(ids) is not None:
            return {ids: [int(i) for i in row[ids]]}
        text = row.get(column)
        if not isinstance(text, str):
            what = f"has no {column!r}" if text is None else f"has {type(text).__name__} in {column!r}, not text"
            columns = f"Its columns: {', '.join(row)}."
            raise DataError(
                f"The row {what}.", place=place, remedy=f"Name the text column (columns={{'text': …}}). {columns}", code="LW-D32"
            )
        if self.tokenizer is None:
            remedy = "Load the model with hf:DIR, its tokenizer beside it, or give rows with input_ids."
            raise DataError("The model came without a tokenizer, so text cannot be read.", place=place, remedy=remedy)
        texts = (text,) if pair is None else (text, pair)
        goes_on = self.causal and column == "target"  # nothing opens what goes on where the prompt ends
        encoded = self.tokenizer(*texts, verbose=False, **({"add_special_tokens": False} if goes_on else {}))
        if pair is not None and "token_type_ids" in encoded:
            return {ids: encoded["input_ids"], "token_type_ids": encoded["token_type_ids"]}
        return {ids: encoded["input_ids"]}

    def _within(self, values: list[int], place: str) -> list[int]:
        if not values:
            raise DataError("The row has no token.", place=place, remedy="Leave empty texts out.", code="LW-D29")
        if self.longest is None or len(values) <= self.longest:
            return values
        if not self.truncate:
            what = f"The sequence has {len(values)} tokens, the model's maximum is {self.longest}."
            raise DataError(what, place=place, remedy="Shorten it, or let it be cut (truncate=True).", code="LW-D40")
        # what closes a sequence ([SEP], </s>) stays: an encoder has never seen a text without it
        closing = values[-1:] if values[-1] in self._specials() else []
        return values[: self.longest - len(closing)] + closing

    def _specials(self) -> set[int]:
        return set(self.tokenizer.all_special_ids) if self.tokenizer is not None else set()

    def _in_vocabulary(self, ids: list[int], place: str) -> None:
        if not 0 <= min(ids) <= max(ids) < self.vocabulary:
            wrong = next(i for i in ids if not 0 <= i < self.vocabulary)
            what = f"The token id {wrong} lies outside the model's vocabulary of {self.vocabulary}."
            raise DataError(what, place=place, remedy="The tokenizer belongs to another model.", code="LW-D39")

    def collate(self, rows: Sequence[Row]) -> Batch:
        """``input_ids`` and ``attention_mask`` (samples, tokens), the decoder's too where there is one; labels (samples,)."""
        ready, _ = self.prepare(rows)
        kwargs: dict[str, Any] = {"input_ids": padded([r["input_ids"] for r in ready], self.pad)}
        kwargs["attention_mask"] = mask_of([r["input_ids"] for r in ready])
        if all("token_type_ids" in r for r in ready):
            kwargs["token_type_ids"] = padded([r["token_type_ids"] for r in ready], 0)
        labels: Any = labels_of(ready)
        if all("span" in r for r in ready):
            labels = answer_labels(ready, kwargs["input_ids"].shape[1])
        elif all("token_labels" in r for r in ready):
            labels = padded([r["token_labels"] for r in ready], -100)
        if self.start is not None:  # the decoder sees the target, or without one the text itself, one step late
            targets = [r.get("target_ids", r["input_ids"])[: self.longest and self.longest - 1] for r in ready]
            kwargs["decoder_input_ids"], kwargs["decoder_attention_mask"], wanted = shifted(targets, self.start, self.pad)
            if labels is None and all("target_ids" in r for r in ready):
                labels = wanted
            kwargs = self._apart(kwargs)
        return Batch((), {**kwargs, **dict(self.fixed)}, labels)

    def _apart(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """One column of padding where both sequences are equally long: the length of a layer's stream then says whose it is.

        At the model's maximum there is no room for it, and the decoder's mask is taken for both.
        """
        width = kwargs["input_ids"].shape[1]
        if width != kwargs["decoder_input_ids"].shape[1] or width == self.longest:
            return kwargs
        fillers = {"input_ids": self.pad, "attention_mask": 0, "token_type_ids": 0}
        return kwargs | {n: nn.functional.pad(kwargs[n], (0, 1), value=v) for n, v in fillers.items() if n in kwargs}

    def example(self, module: nn.Module) -> Batch:
        """Two sequences of 16 random tokens, the same each time, each with one end token as some classifiers demand."""
        inner: Any = encoder_of(module)
        samples, tokens = EXAMPLE
        generator = torch.Generator().manual_seed(0)
        closing = ends(inner.config, self.vocabulary)
        special = {inner.config.pad_token_id, getattr(inner.config, "bos_token_id", None), *closing, self.start}
        plain = [i for i in range(min(self.vocabulary, 4096)) if i not in special] or [0]
        length = min(tokens, self.longest or tokens)
        drawn = torch.randint(len(plain), (samples, length), generator=generator)
        rows = [[plain[i] for i in row[: length - 1]] + (closing[:1] or [plain[0]]) for row in drawn.tolist()]
        return self.collate([{"input_ids": row} for row in rows])

    def default_task(self, module: nn.Module, batch: Batch, output: Tensor) -> Task:
        """Language modelling for causal models and translated targets; for embeddings never classification."""
        targets = isinstance(batch.labels, Tensor) and batch.labels.dim() == 2
        if isinstance(batch.labels, Mapping) and "span" in batch.labels:
            return task_named("question_answering")
        if output.dim() == 3 and (self.causal or (self.start is not None and targets)):
            return LanguageModelling()
        return self.fidelity(module) if _embeds(module) else super().default_task(module, batch, output)

    def fidelity(self, module: nn.Module) -> Fidelity:
        return Fidelity(kind="cosine") if _embeds(module) else Fidelity()

    def output(self, raw: Any) -> Tensor:
        """Logits, or the last hidden state: the pooler of a bare encoder was often never trained."""
        if isinstance(raw, Mapping) and "logits" not in raw and isinstance(raw.get("last_hidden_state"), Tensor):
            return raw["last_hidden_state"]
        return super().output(raw)

    def save(self, folder: Path) -> None:
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)


def _places(module: Any, most: int | None) -> int | None:
    """`most`, less the rows of a position table that are kept for padding: RoBERTa counts from behind its padding id."""
    table, tokens = getattr(module.config, "max_position_embeddings", None), table_of(module)
    kept = [m.padding_idx + 1 for m in module.modules() if _counts(m, table) and m is not tokens]
    return most if most is None or not kept else min(most, int(table or 0) - max(kept))


def _counts(module: nn.Module, rows: int | None) -> bool:
    return isinstance(module, nn.Embedding) and module.num_embeddings == rows and module.padding_idx is not None


def _caches(module: Any) -> bool:
    """Whether its forward would give a cache: one more output that grows, which neither replay nor export needs."""
    takes = "use_cache" in inspect.signature(type(module).forward).parameters
    return takes and getattr(module.config, "use_cache", None) is not False


def _embeds(module: nn.Module) -> bool:
    """Whether it gives hidden states and no logits."""
    return not isinstance(module, EncoderWithHead) and (isinstance(module, PooledEncoder) or is_bare(module))
