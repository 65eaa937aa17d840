"""Answers in rows of text: a span of the context that answers a question, and a target that goes on after a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from layerwise.data import Row
from layerwise.errors import DataError
from layerwise.tasks._texts import as_codes

NO_ANSWER = (0, 0)  # the first token, as transformers marks it


def located(tokenizer: Any, question: str, context: str, answer: Any, place: str) -> dict[str, Any]:
    """The pair's tokens with the answer's ``span`` of tokens, ``offsets`` of each token in the ``context`` and all ``answers``.

    `answer` is SQuAD's dict of ``text`` and ``answer_start`` (lists), a text, or a list of texts, of which the first is sought in
    the context. No text means: there is no answer. Raises `DataError` LW-D32 where the context does not hold it.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError("Spans need a fast tokenizer, which knows where its tokens come from.", place=place, code="LW-D32")
    texts, start = _texts(answer, context, place)
    encoded = tokenizer(question, context, return_offsets_mapping=True, verbose=False)
    inside = [part == 1 for part in encoded.sequence_ids()]
    offsets = [pair if own else (0, 0) for pair, own in zip(encoded["offset_mapping"], inside, strict=True)]
    found = {"input_ids": encoded["input_ids"], "offsets": offsets, "context": context, "answers": texts or [""]}
    if "token_type_ids" in encoded:
        found["token_type_ids"] = encoded["token_type_ids"]
    return found | {"span": _span(offsets, inside, start, start + len(texts[0])) if texts else NO_ANSWER}


def _texts(answer: Any, context: str, place: str) -> tuple[list[str], int]:
    """The accepted texts, and where in the context the first begins."""
    starts: Sequence[Any] = ()
    if isinstance(answer, Mapping):
        starts, answer = answer.get("answer_start", ()), answer.get("text", ())
    texts = [answer] if isinstance(answer, str) else [str(t) for t in (() if answer is None else answer)]
    if not any(texts):
        return [], 0
    start = int(starts[0]) if len(starts) else context.find(texts[0])
    if start < 0 or context[start : start + len(texts[0])] != texts[0]:
        what = f"The context does not hold the answer {texts[0]!r}" + (f" at {start}." if len(starts) else ".")
        raise DataError(what, place=place, remedy="Mend the answer column, or leave the row out.", code="LW-D32")
    return texts, start


def _span(offsets: Sequence[tuple[int, int]], inside: Sequence[bool], start: int, stop: int) -> tuple[int, int]:
    """The first and the last token that share a character with start … stop − 1."""
    touching = [i for i, (a, b) in enumerate(offsets) if inside[i] and a < stop and b > start]
    return (touching[0], touching[-1]) if touching else NO_ANSWER


def within(found: dict[str, Any], tokens: int) -> dict[str, Any]:
    """After the sequence was cut to `tokens`, the last one closing it: an answer that was cut off counts as none."""
    if len(found["offsets"]) <= tokens:
        return found
    offsets = [*found["offsets"][: tokens - 1], (0, 0)]
    return found | {"offsets": offsets, "span": found["span"] if found["span"][1] < tokens - 1 else NO_ANSWER}


def answer_labels(rows: Sequence[Row], tokens: int) -> dict[str, Tensor]:
    """What `QuestionAnswering` judges by: ``span``, ``context``, ``offsets`` (samples, tokens, 2) and ``answers``."""
    most = max(len(r["answers"]) for r in rows)
    flat = as_codes([text for r in rows for text in [*r["answers"], *[""] * (most - len(r["answers"]))]])
    offsets = [[*map(tuple, r["offsets"]), *[(0, 0)] * (tokens - len(r["offsets"]))] for r in rows]
    return {
        "span": torch.tensor([tuple(r["span"]) for r in rows]),
        "context": as_codes([r["context"] for r in rows]),
        "offsets": torch.tensor(offsets),
        "answers": flat.reshape(len(rows), most, -1),
    }


def continued(prompt: list[int], target: list[int], closing: set[int], most: int | None) -> dict[str, list[int]]:
    """One sequence of both, without what closes the prompt, and labels −100 over the prompt; cut at `most` tokens."""
    opened = prompt[:-1] if len(prompt) > 1 and prompt[-1] in closing else prompt
    return {"input_ids": [*opened, *target][:most], "token_labels": [*[-100] * len(opened), *target][:most]}
