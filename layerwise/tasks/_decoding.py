"""Texts that a model writes, by greedy decoding, beside those it should have written; and how they are compared.

Decision: decoding runs the whole forward for every token, without a cache, so that it works for every architecture and also while
layers are skipped. That is slow, so a task decodes a few samples only; it says how many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from layerwise.data import Batch, Data
from layerwise.errors import DataError, missing_dependency
from layerwise.jackknife import jackknifed
from layerwise.model import UniversalModel
from layerwise.tasks._contract import Acted, token_mask

BY_CHARACTER = ("zh", "char", "ja-mecab", "ko-mecab")  # languages without spaces: ROUGE counts characters


@dataclass(frozen=True)
class Pair:
    """What was written and what should have been, as text."""

    written: str
    wanted: str


def written_metrics(model: UniversalModel, data: Data, metrics: Sequence[str], settings: Decoding) -> Acted:
    """The `metrics` over the texts of the first samples, with jackknife standard errors."""
    pairs = settings.pairs(model, data)
    whole = compared(pairs, metrics, settings.tokenize)
    errors = jackknifed(
        torch.arange(len(pairs)),
        lambda kept: compared([p for p, k in zip(pairs, kept.tolist(), strict=True) if k], metrics, settings.tokenize),
    )
    return {name: (whole[name], errors[name]) for name in metrics}


@dataclass(frozen=True)
class Decoding:
    """How many samples are decoded, the most tokens of each, and sacrebleu's way of cutting texts into words."""

    samples: int
    tokens: int
    tokenize: str

    def pairs(self, model: UniversalModel, data: Data) -> list[Pair]:
        """One per sample. Raises `DataError` where there is nothing to continue or to translate."""
        tokenizer = getattr(model.adapter, "tokenizer", None)
        say = _speaker(tokenizer)
        ends = end_tokens(model)
        found: list[Pair] = []
        for batch in data:
            few = batch.narrow(0, min(batch.size, self.samples - len(found))).to(model.device)
            found += [Pair(say(w), say(t)) for w, t in self._decoded(model, few, ends)]
            if len(found) >= self.samples:
                break
        return found

    def _decoded(self, model: UniversalModel, batch: Batch, ends: frozenset[int]) -> list[tuple[list[int], list[int]]]:
        if "decoder_input_ids" in batch.kwargs:
            return self._translated(model, batch, ends)
        return [self._continued(model, batch.narrow(i, i + 1), ends) for i in range(batch.size)]

    def _translated(self, model: UniversalModel, batch: Batch, ends: frozenset[int]) -> list[tuple[list[int], list[int]]]:
        """All samples at once: each begins with the one token that its decoder is given first."""
        labels = batch.labels
        if not isinstance(labels, Tensor) or labels.dim() != 2:
            raise DataError("A text that is translated or summarized needs a target.", remedy="Name it: columns={'target': …}.")
        wanted = [[t for t in row if t >= 0 and t not in ends] for row in labels[:, 1:].tolist()]
        kwargs = {k: v for k, v in batch.kwargs.items() if k != "decoder_attention_mask"}

        def with_tokens(ids: Tensor) -> Batch:
            return replace(batch, kwargs={**kwargs, "decoder_input_ids": ids})

        ids = greedy(model, with_tokens, batch.kwargs["decoder_input_ids"][:, :1], self.tokens, ends)
        return [(_ended(row, ends, None if ends else len(w)), w) for row, w in zip(ids.tolist(), wanted, strict=True)]

    def _continued(self, model: UniversalModel, row: Batch, ends: frozenset[int]) -> tuple[list[int], list[int]]:
        """One sample: its prompt is continued by as many tokens as its own text goes on, at most `tokens`."""
        prompt, wanted = prompted(row)
        name = "input_ids" if "input_ids" in row.kwargs else ""
        fixed = {k: v for k, v in row.kwargs.items() if not isinstance(v, Tensor)}

        def with_tokens(ids: Tensor) -> Batch:
            return Batch((), {**fixed, name: ids}) if name else Batch((ids,), fixed)

        wanted = wanted[: self.tokens]
        ids = greedy(model, with_tokens, prompt[None], len(wanted), frozenset())
        return _ended(ids[0].tolist(), ends, None), [t for t in wanted if t not in ends]


def greedy(
    model: UniversalModel, with_tokens: Callable[[Tensor], Batch], first: Tensor, most: int, ends: frozenset[int]
) -> Tensor:
    """(samples, ≤ most): the likeliest next tokens after `first` (samples, given), until all have ended."""
    ids = first
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for _ in range(most):
        following = model.predict(with_tokens(ids))[:, -1].argmax(-1)
        ids = torch.cat([ids, following[:, None]], 1)
        ended |= torch.isin(following, torch.tensor(sorted(ends), device=ids.device, dtype=ids.dtype))
        if bool(ended.all()):
            break
    return ids[:, first.shape[1] :]


def prompted(row: Batch) -> tuple[Tensor, list[int]]:
    """Of one sample what is given and what should follow: the tokens labelled −100 at its start, or else its first half."""
    ids = row.kwargs.get("input_ids", row.args[0] if row.args else None)
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        raise DataError("Generation continues token ids (samples, tokens), and there are none.")
    real = ids[0][token_mask(row, ids)[0]]
    given = len(real) // 2
    if isinstance(row.labels, Tensor) and row.labels.shape == ids.shape and bool((row.labels[0] < 0).any()):
        given = int((row.labels[0] >= 0).long().argmax())
    if not 0 < given < len(real):
        raise DataError(f"A text of {len(real)} tokens has no prompt and continuation.", remedy="Leave out the shortest texts.")
    return real[:given], real[given:].tolist()


def end_tokens(model: UniversalModel) -> frozenset[int]:
    """The ids that end a text by the module's own generation settings; none where it has no such settings."""
    found: set[int] = set()
    for holder in ("generation_config", "config"):
        ends = getattr(getattr(model.module, holder, None), "eos_token_id", None)
        found |= {int(e) for e in (ends if isinstance(ends, list | tuple) else [ends]) if e is not None}
    return frozenset(found)


def compared(pairs: Sequence[Pair], metrics: Sequence[str], tokenize: str) -> dict[str, float]:
    """The named metrics of these texts. Raises `MissingDependency` without sacrebleu or rouge-score."""
    return {name: METRICS[name]([p.written for p in pairs], [p.wanted for p in pairs], tokenize) for name in metrics}


def _ended(ids: list[int], ends: frozenset[int], most: int | None) -> list[int]:
    stop = next((i for i, t in enumerate(ids) if t in ends), len(ids))
    return ids[:stop][:most]


def _speaker(tokenizer: Any) -> Callable[[list[int]], str]:
    if tokenizer is None:
        return lambda ids: " ".join(map(str, ids))  # a model without a tokenizer writes numbers, compared as words
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))


def _sacrebleu() -> Any:
    try:
        import sacrebleu
    except ImportError as error:
        raise missing_dependency("sacrebleu", "metrics", "Comparing texts") from error
    return sacrebleu


def _bleu(written: list[str], wanted: list[str], tokenize: str) -> float:
    return float(_sacrebleu().corpus_bleu(written, [wanted], tokenize=tokenize).score)


def _chrf(written: list[str], wanted: list[str], tokenize: str) -> float:
    return float(_sacrebleu().corpus_chrf(written, [wanted]).score)


def _ter(written: list[str], wanted: list[str], tokenize: str) -> float:
    asian = tokenize in BY_CHARACTER
    return float(_sacrebleu().corpus_ter(written, [wanted], asian_support=asian, normalized=asian).score)


class _Characters:
    """rouge-score drops everything that is not a–z or a digit; a text without spaces is counted by its characters."""

    def tokenize(self, text: str) -> list[str]:
        return [c for c in text.lower() if not c.isspace()]


def _rouge(kind: str) -> Callable[[list[str], list[str], str], float]:
    def score(written: list[str], wanted: list[str], tokenize: str) -> float:
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError as error:
            raise missing_dependency("rouge-score", "metrics", "ROUGE") from error
        scorer = RougeScorer([kind], tokenizer=_Characters() if tokenize in BY_CHARACTER else None)
        values = [scorer.score(target, text)[kind].fmeasure for text, target in zip(written, wanted, strict=True)]
        return sum(values) / len(values)

    return score


METRICS: Mapping[str, Callable[[list[str], list[str], str], float]] = {
    "bleu": _bleu,
    "chrf": _chrf,
    "ter": _ter,
    "rouge": _rouge("rougeL"),
    "rouge_1": _rouge("rouge1"),
    "rouge_2": _rouge("rouge2"),
}
