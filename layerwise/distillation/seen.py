"""`Seen`: what one forward shows of a model: its output, the features of some layers, their attention maps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layerwise.attention_maps import AttentionCall, attention_watched
from layerwise.data import Batch
from layerwise.model import UniversalModel
from layerwise.training import training_output


@dataclass(frozen=True)
class Maps:
    """One attention call: weights (rows, heads, queries, keys), and which queries count (rows, queries).

    `cross`: another call of its layer came before, or queries and keys differ in number; the first call of a decoder's layer is
    the sequence's attention to itself.
    """

    weights: Tensor
    keep: Tensor
    cross: bool


@dataclass(frozen=True)
class Seen:
    """`features`: layer → main output; `attention`: layer → its calls in order."""

    output: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)
    attention: Mapping[str, Sequence[Maps]] = field(default_factory=dict)

    def renamed(self, names: Mapping[str, str]) -> Seen:
        """With the layers called as `names` (new → own) says; others are left out."""
        features = {new: self.features[own] for new, own in names.items() if own in self.features}
        return Seen(self.output, features, {new: self.attention[own] for new, own in names.items() if own in self.attention})

    def flat(self) -> dict[str, Tensor]:
        """As plain named tensors."""
        tensors = {"output": self.output} | {f"features|{name}": t for name, t in self.features.items()}
        for name, calls in self.attention.items():
            for number, call in enumerate(calls):
                kind = "cross" if call.cross else "self"
                tensors[f"attention|{name}|{number}|{kind}"] = call.weights
                tensors[f"keep|{name}|{number}"] = call.keep
        return tensors

    @classmethod
    def unflat(cls, tensors: Mapping[str, Tensor]) -> Seen:
        """The inverse of `flat`."""
        features, attention = dict[str, Tensor](), dict[str, list[Maps]]()
        for key in sorted(tensors):
            kind, _, rest = key.partition("|")
            if kind == "features":
                features[rest] = tensors[key]
            elif kind == "attention":
                name, number, sort = rest.rsplit("|", 2)
                attention.setdefault(name, []).append(Maps(tensors[key], tensors[f"keep|{name}|{number}"], sort == "cross"))
        return cls(tensors["output"], features, attention)

    def to(self, device: torch.device) -> Seen:
        return Seen.unflat({name: tensor.to(device) for name, tensor in self.flat().items()})


def look(model: UniversalModel, batch: Batch, features: Sequence[str] = (), attention: Sequence[str] = ()) -> Seen:
    """One forward of `model` as it stands: train flags and gradients are the caller's. `features` and `attention` name layers."""
    layers = [model.layer(name) for name in attention]
    names = {layer.index: layer.name for layer in layers}
    maps: dict[str, list[Maps]] = {layer.name: [] for layer in layers}

    def note(index: int, call: AttentionCall) -> None:
        weights = torch.cat([call.weights(rows)[0] for rows in call.blocks()], 2).float()
        cross = not call.first or call.shape[2] != call.shape[3]
        maps[names[index]].append(Maps(weights, call.keep.expand(call.shape[0], call.shape[2]), cross))

    with ExitStack() as stack:
        if layers:
            stack.enter_context(attention_watched(layers, batch.size, note, None, live=torch.is_grad_enabled()))
        caught = stack.enter_context(model.capture(features))
        output = training_output(model, batch)
    return Seen(output, {name: caught[name][1] for name in features if name in caught}, maps)


def paired(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Layer, the student's and the teacher's tensor, where both have one."""
    return ((name, student[name], teacher[name]) for name in student if name in teacher)


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
