"""Texts in tensors, so that batches can be cut and moved as all tensors are; and SQuAD's way of comparing short answers."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

ARTICLES = re.compile(r"\b(a|an|the)\b")


def as_codes(texts: Sequence[str]) -> Tensor:
    """(texts, longest) code points, −1 after the end."""
    width = max((len(t) for t in texts), default=0)
    return torch.tensor([[*map(ord, t), *[-1] * (width - len(t))] for t in texts]).reshape(len(texts), width)


def as_text(codes: Tensor) -> str:
    """The text of one row of `as_codes`."""
    return "".join(map(chr, codes[codes >= 0].tolist()))


def normalised(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces (Rajpurkar et al., 2016)."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(ARTICLES.sub(" ", plain).split())


def exact_match(answer: str, truths: Sequence[str]) -> float:
    """1 where the normalised answer is one of the truths."""
    return float(normalised(answer) in {normalised(t) for t in truths})


def f1(answer: str, truths: Sequence[str]) -> float:
    """The best harmonic mean of precision and recall of words over the truths; two empty answers agree."""
    return max((_f1(normalised(answer).split(), normalised(t).split()) for t in truths), default=0.0)


def _f1(answer: Sequence[str], truth: Sequence[str]) -> float:
    if not answer or not truth:
        return float(answer == truth)
    both = sum((Counter(answer) & Counter(truth)).values())
    return 2 * both / (len(answer) + len(truth))
