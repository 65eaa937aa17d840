"""`Batch` and `Data`: what goes into a model. Ready batches pass through as they are; raw rows are collated by the adapter."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from layerwise import trees
from layerwise.errors import DataError
from layerwise.layout import Layout

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Batch:
    """The forward's arguments for some samples (first dimension of every tensor) and their labels, if there are any.

    Where rows are not samples, as in graphs, `layout` says what belongs to which; all tensors are keyword arguments then.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    labels: Any = None
    layout: Layout | None = None

    @classmethod
    def of(cls, value: Any) -> Batch:
        """Reads a tensor, ``(inputs,)``, ``(inputs, labels)``, or a dict of keyword arguments with optional ``labels``.

        Raises `DataError` naming what came instead.
        """
        if isinstance(value, Batch):
            return value
        if isinstance(value, torch.Tensor):
            return cls((value,))
        if isinstance(value, Mapping):
            return cls((), {k: v for k, v in value.items() if k != "labels"}, value.get("labels"))
        if isinstance(value, tuple | list) and len(value) in (1, 2):
            inputs = cls.of(value[0])
            return replace(inputs, labels=value[1]) if len(value) == 2 else inputs
        raise DataError(
            f"A batch came as {type(value).__name__}" + (f" of length {len(value)}" if isinstance(value, tuple | list) else ""),
            remedy="Give a tensor, (inputs,), (inputs, labels) or a dict of keyword arguments with optional 'labels'.",
        )

    @property
    def size(self) -> int:
        """The number of samples."""
        if self.layout is not None:
            return self.layout.size
        for _, tensor in trees.tensors((self.args, dict(self.kwargs))):
            if tensor.dim():
                return int(tensor.shape[0])
        raise DataError("A batch holds no tensor with a first dimension, so it holds no samples.")

    @property
    def answers(self) -> int:
        """How many answers one forward computes: the samples, or all nodes where single nodes are the samples."""
        return self.size if self.layout is None else self.layout.answers

    def to(self, device: str | torch.device) -> Batch:
        """A copy on `device`."""
        return self.map(lambda t: t.to(device, non_blocking=True))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """A copy with `function` applied to each tensor, the labels included."""
        return Batch(
            trees.mapped(self.args, function),
            trees.mapped(dict(self.kwargs), function),
            trees.mapped(self.labels, function),
            self.layout,
        )

    def narrow(self, start: int, stop: int) -> Batch:
        """The samples start … stop-1. Tensors whose first dimension is not the batch's (tables, scalars) are kept whole."""
        size = self.size
        if self.layout is not None:
            kwargs, layout = self.layout.narrow(self.kwargs, start, stop)
            return Batch((), kwargs, trees.mapped(self.labels, lambda t: t[start:stop]), layout)
        return self.map(lambda t: t[start:stop] if t.dim() and t.shape[0] == size else t)

    def by_sample(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor that the model gave on this batch with one row per sample, where its rows are something else (nodes)."""
        return tensor if self.layout is None else self.layout.by_sample(tensor)

    def arguments(self) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """The positional and the keyword arguments that the forward is called with."""
        return (self.args, self.kwargs) if self.layout is None else self.layout.arguments(self.kwargs)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor, the labels last."""
        for _, tensor in trees.tensors((self.args, dict(self.kwargs), self.labels)):
            yield tensor


@dataclass(frozen=True)
class Data:
    """Batches that can be gone through again and again, with a name for reports and a fingerprint of the content."""

    batches: Sequence[Any] = field(repr=False)  # raw rows may be megabytes of image bytes
    name: str = "data"
    collate: Callable[[Any], Batch] = field(default=Batch.of, repr=False)
    source_fingerprint: str = ""
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, value: Any, *, name: str = "batches", limit: int | None = None) -> Data:
        """Wraps ready batches: a list, a DataLoader or another iterable (a generator is kept in memory), or one batch.

        Raises `DataError` (LW-D29) when there is not a single one.
        """
        if isinstance(value, Data):
            return value if limit is None else value.head(limit)
        if isinstance(value, torch.Tensor | Mapping):
            value = [value]
        if not isinstance(value, Iterable):
            raise DataError(f"Data came as {type(value).__name__}.", remedy="Give an iterable of batches.")
        data = cls([Batch.of(b) for b in value], name)
        if not data.batches:
            raise DataError("The data set is empty.", place=name, remedy="Give at least one batch.", code="LW-D29")
        return data if limit is None else data.head(limit)

    def __iter__(self) -> Iterator[Batch]:
        return (self.collate(b) for b in self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        return self.collate(self.batches[index])

    def head(self, samples: int) -> Data:
        """The first `samples` samples."""
        kept: list[Batch] = []
        left = samples
        for batch in self:
            if left <= 0:
                break
            kept.append(batch if batch.size <= left else batch.narrow(0, left))
            left -= kept[-1].size
        return replace(self, batches=kept, collate=Batch.of, source_fingerprint="")

    @property
    def samples(self) -> int:
        """How many samples there are (goes through the data once)."""
        return sum(batch.size for batch in self)

    @property
    def labelled(self) -> bool:
        """Whether the first batch has labels."""
        return self[0].labels is not None

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the source where it came from a file, else of every tensor's bytes, shape and type."""
        if self.source_fingerprint:
            return self.source_fingerprint
        digest = hashlib.sha256()
        for batch in self:
            for tensor in batch.tensors():
                digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
