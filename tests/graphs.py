"""Graph networks with fixed random weights, and molecules for them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import GCNConv, GINConv, global_add_pool, global_mean_pool

from layerwise.data import Data
from layerwise.loading import load, load_data
from layerwise.model import UniversalModel

SMILES = ("CCO", "c1ccccc1O", "C", "CC(=O)O", "CCN", "CCCCCC", "C1CC1", "OCCO")


class Convolutions(nn.Module):
    """Residual graph convolutions between a stem and a head on the mean of the nodes."""

    def __init__(self, classes: int = 3, depth: int = 2, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Linear(9, width)
        self.convs = nn.ModuleList(GCNConv(width, width) for _ in range(depth))
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        x = self.stem(x / 8)
        for conv in self.convs:
            x = x + F.relu(conv(x, edge_index))
        return self.head(global_mean_pool(self.norm(x), batch))


class Isomorphism(nn.Module):
    """Blocks with two weight matrices each, which take and give node features; the whole graph comes as one object."""

    def __init__(self, classes: int = 3, depth: int = 3, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Linear(9, width)
        steps = [nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(depth)]
        self.blocks = nn.ModuleList(GINConv(step) for step in steps)
        self.head = nn.Linear(width, classes)

    def forward(self, data: Any) -> Tensor:
        x = self.stem(data.x / 8)
        for block in self.blocks:
            x = torch.tanh(block(x, data.edge_index))
        return self.head(global_add_pool(x, data.batch, size=data.num_graphs))


def rows(count: int = len(SMILES), classes: int = 3) -> list[dict[str, Any]]:
    return [{"smiles": s, "label": i % classes} for i, s in enumerate(SMILES[:count])]


def subject(kind: type[nn.Module] = Convolutions, batch_size: int = 5) -> tuple[UniversalModel, Data]:
    torch.manual_seed(0)
    model = load(kind())
    return model, load_data(rows(), model, batch_size=batch_size)
