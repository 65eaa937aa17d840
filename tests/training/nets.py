"""A small net with all that makes resuming hard: dropout, batch normalization, a shared weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layerwise.data import Batch, Data
from layerwise.model import UniversalModel
from layerwise.supplies import Supplies
from layerwise.task import Classification


class Net(nn.Module):
    """`interrupt`: the number of the forward in which Ctrl-C comes, after batch normalization has written its statistics."""

    def __init__(self, dropout: float = 0.2, norm: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6) if norm else nn.Identity()
        self.drop = nn.Dropout(dropout)
        self.again = nn.Linear(6, 6)
        self.again.weight = self.first.weight
        self.head = nn.Linear(6, 3)
        self.calls, self.interrupt = 0, 0

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.again(self.drop(self.norm(self.first(x)).relu()))
        if self.training:
            self.calls += 1
            if self.calls == self.interrupt:
                raise KeyboardInterrupt
        return self.head(hidden)


def universal(**settings: float) -> UniversalModel:
    torch.manual_seed(0)
    model = UniversalModel(Net(**settings).eval(), task=Classification(), example=batches(1)[0])  # type: ignore[arg-type]
    assert model.layers
    return model


def batches(count: int, size: int = 6, seed: int = 0) -> list[Batch]:
    """Labels that follow from the inputs, so that there is something to learn."""
    g = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, size, 6, generator=g)
    return [Batch((x,), {}, x[:, :3].argmax(1)) for x in inputs]


def supplies(count: int = 4, **more: object) -> Supplies:
    data = Data.of(batches(count))
    return Supplies(training=data, validation=Data.of(batches(2, seed=1)), **more)  # type: ignore[arg-type]
