"""Token ids: the folder's tokenizer, the ids that begin and fill sequences, padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import DataError

FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "spiece.model")
UNBOUNDED = 10**6  # tokenizers write 1e30 for "no maximum"


def tokenizer_in(folder: Path) -> Any:
    """The folder's tokenizer, or None where it has none. Raises `DataError` for a damaged one."""
    if not any((folder / name).is_file() for name in FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # damaged files fail anywhere in the library, some in Rust
        raise DataError(f"The tokenizer cannot be read: {error}", place=str(folder), remedy="Copy its files again.") from error


def longest(config: Any, tokenizer: Any) -> int | None:
    """The most tokens that a text may have; None for no maximum."""
    known = [getattr(config.get_text_config(), "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None)]
    return min((int(n) for n in known if n and 0 < n < UNBOUNDED), default=None)


def filler(config: Any, tokenizer: Any, vocabulary: int) -> int:
    """The id to pad with; models without one are padded with any: the mask leaves it out."""
    known = (getattr(config, "pad_token_id", None), getattr(tokenizer, "pad_token_id", None), *ends(config, vocabulary), 0)
    return next(int(i) for i in known if i is not None and 0 <= i < vocabulary)


def ends(config: Any, vocabulary: int) -> list[int]:
    """The ids that end a text: none, one, or a list in the configuration; a shrunk model may name one it does not have."""
    found = getattr(config, "eos_token_id", None)
    ids = list(found) if isinstance(found, Iterable) else [found]
    return [int(i) for i in ids if i is not None and 0 <= i < vocabulary]


def start(config: Any, vocabulary: int) -> int:
    """The id that a decoder begins with."""
    known = (getattr(config, name, None) for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"))
    return next((int(i) for i in known if i is not None and 0 <= i < vocabulary), 0)


def padded(sequences: Sequence[Sequence[int]], filler: int) -> Tensor:
    """(samples, tokens) int64, filled up on the right."""
    width = max(len(s) for s in sequences)
    return torch.tensor([[*s, *[filler] * (width - len(s))] for s in sequences])


def mask_of(sequences: Sequence[Sequence[int]]) -> Tensor:
    """(samples, tokens) int64: 1 for the tokens that count, 0 for what fills up."""
    return padded([[1] * len(s) for s in sequences], 0)


def shifted(sequences: Sequence[Sequence[int]], start: int, pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """A decoder's ids, one step late, their mask, and the labels it is to predict (-100 where nothing is)."""
    late = [[start, *ids] for ids in sequences]
    return padded(late, pad), mask_of(late), padded(late, -100)


class Words:
    """The tokenizer of a module that lists its words: split at spaces, lower case, 0 pads and 1 stands for any other word."""

    all_special_ids = (0,)

    def __init__(self, words: Sequence[str]) -> None:
        self.numbers = {word.lower(): i for i, word in enumerate(words, start=2)}

    def __call__(self, text: str, pair: str | None = None, verbose: bool = False) -> dict[str, list[int]]:
        """``input_ids``; the arguments are those of transformers' tokenizers, and there are no pairs."""
        return {"input_ids": [self.numbers.get(word, 1) for word in text.lower().split()]}

    def save_pretrained(self, folder: Path) -> None:
        """Nothing: the module itself has the words."""
