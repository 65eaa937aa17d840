"""`ArchitectureDetector`: what kind of network a model is, in words, and which adapter feeds it.

Decision: the kind is read from what ran (the operators inside the layers, who took what from whom), never from class names, so
a model of your own is told apart as well as one of a library. It is a description: nothing else in the library depends on it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from torch import nn

from layerwise.adapter import ModalityAdapter, adapter_for
from layerwise.loading import load
from layerwise.model import UniversalModel
from layerwise.stacks import stack_of
from layerwise.structure import Layer
from layerwise.trace import Call, traced

DOMINANT = 0.5  # share of the layers from which on one kind gives the network its name


class Architecture(StrEnum):
    """What most layers compute, and how their stacks hang together."""

    ENCODER_DECODER = "encoder-decoder"
    TRANSFORMER = "transformer"
    CNN = "cnn"
    RNN = "rnn"
    GNN = "gnn"
    MLP = "mlp"
    MIXED = "mixed"


OF_KIND = {
    "attention": Architecture.TRANSFORMER,
    "convolution": Architecture.CNN,
    "recurrent": Architecture.RNN,
    "mlp": Architecture.MLP,
    "linear": Architecture.MLP,
}
NAMES = {
    "attention": "attention",
    "convolution": "convolution",
    "recurrent": "recurrent",
    "mlp": "feed-forward",
    "linear": "linear",
}


@dataclass(frozen=True)
class Detection:
    """`words`: the architecture in a sentence; `stacks`: the dotted path of each stack → how many layers it has, as they run."""

    architecture: Architecture
    words: str
    modality: str
    adapter: ModalityAdapter
    stacks: Mapping[str, int]
    kinds: Mapping[str, int]


@dataclass(frozen=True)
class ArchitectureDetector:
    """Chooses the adapter and says what was found; `folder` may hold a tokenizer or preprocessing settings."""

    folder: str | Path | None = None

    def detect_and_adapt(self, model: str | nn.Module | UniversalModel, example: Any = None) -> Detection:
        """The kind of `model`, its stacks and its adapter. `example`: a batch, for modules that do not say what they read.

        Raises `UsageError` where how to call it is not known, `UserModelError` where its forward fails, naming file and line.
        """
        opened = load(model, example=example)
        if self.folder is not None:
            opened.adapter = adapter_for(opened.module, Path(self.folder))
        layers = opened.layers
        kinds = Counter(layer.kind for layer in layers)
        readers = reading_stacks(layers, traced(opened.module, opened.example))
        architecture = _architecture(kinds, readers, opened.domain)
        stacks = dict(Counter(stack_of(layer) for layer in layers))
        words = _words(architecture, kinds, stacks, readers)
        return Detection(architecture, words, opened.domain, opened.adapter, stacks, dict(kinds))


def _architecture(kinds: Mapping[str, int], readers: Mapping[str, str], modality: str) -> Architecture:
    if readers:
        return Architecture.ENCODER_DECODER
    if modality == "graph":
        return Architecture.GNN
    kind = max(kinds, key=lambda name: kinds[name])
    return OF_KIND.get(kind, Architecture.MIXED) if kinds[kind] > DOMINANT * sum(kinds.values()) else Architecture.MIXED


def _words(architecture: Architecture, kinds: Mapping[str, int], stacks: Mapping[str, int], readers: Mapping[str, str]) -> str:
    counted = ", ".join(f"{count} {NAMES.get(kind, kind)}" for kind, count in kinds.items())
    total = sum(kinds.values())
    found = f"{architecture}: {total} layer{'s' if total > 1 else ''} ({counted})"
    if len(stacks) > 1:
        found += " in " + ", ".join(f"{name or 'the model itself'} ({count})" for name, count in stacks.items())
    return found + "".join(f"; every layer of {reader} reads what {read} gave" for reader, read in readers.items())


def reading_stacks(layers: Sequence[Layer], root: Call) -> dict[str, str]:
    """Stacks of which every layer takes, beside its stream, one tensor that came out of an earlier stack: reader → read.

    That is how a decoder reads its encoder, whatever either is made of. A tensor that no module with parameters gave (a mask, a
    table of positions) does not count.
    """
    first = {call.name: call for call in reversed(list(root.walk()))}
    calls: dict[str, list[Call]] = {}
    for layer in layers:
        calls.setdefault(stack_of(layer), []).append(first[layer.name])
    found = {}
    for (earlier, before), (later, after) in itertools.combinations(calls.items(), 2):
        given = _given_after(root, before)
        shared = frozenset.intersection(*(call.takes for call in after))
        if shared & given and len(after) > 1:
            found[later] = earlier
    return found


def _given_after(root: Call, stack: Sequence[Call]) -> frozenset[int]:
    """What the stack's last layer gave, or a module with parameters around or after it, up to the next stack's start."""
    last = max(stack, key=lambda call: call.order)
    givers = [call for call in root.walk() if call is not root and call.parameters and _follows(call, last)]
    return frozenset().union(*(call.gives for call in givers))


def _follows(call: Call, last: Call) -> bool:
    return call.order >= last.order or any(inner is last for inner in call.walk())


__all__ = ["Architecture", "ArchitectureDetector", "Detection", "reading_stacks"]
