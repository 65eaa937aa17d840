"""PyTorch Geometric: its own models where it has one, else the plain stack that its documentation shows, on random graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.adapter import adapter_for
from layerwise.benchmark.architectures.made import Group, Made, first_that_runs, noise
from layerwise.data import Batch

NODES, EDGES, FEATURES, WIDTH, DEPTH, CLASSES = 24, 72, 16, 32, 4, 4


class Stack(nn.Module):
    """`DEPTH` convolutions of one kind with a nonlinearity between, and a linear head for every node."""

    def __init__(self, layer: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.enter = nn.Linear(FEATURES, WIDTH)
        self.layers = nn.ModuleList(layer(WIDTH) for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = torch.relu(layer(x, edge_index))
        return self.head(x)


def _model(name: str, **settings: Any) -> nn.Module:
    from torch_geometric.nn import models

    return vars(models)[name](FEATURES, WIDTH, DEPTH, CLASSES, **settings)


def _convolutions(name: str, **settings: Any) -> nn.Module:
    from torch_geometric import nn as geometric

    return Stack(lambda width: vars(geometric)[name](width, width, **settings))


class DynamicEdges(nn.Module):
    """EdgeConv over each node's `neighbours` nearest in the features of the moment, as in DGCNN (Wang et al. 2019)."""

    def __init__(self, width: int, neighbours: int = 4) -> None:
        super().__init__()
        from torch_geometric.nn import EdgeConv

        self.neighbours = neighbours
        self.convolution = EdgeConv(nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width)))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        nearest = torch.cdist(x, x).topk(self.neighbours + 1, largest=False).indices[:, 1:]
        nodes = torch.arange(len(x)).repeat_interleave(self.neighbours)
        return self.convolution(x, torch.stack([nearest.flatten(), nodes]))


def _transformer() -> nn.Module:
    from torch_geometric.nn import TransformerConv

    return Stack(lambda width: TransformerConv(width, width // 4, heads=4, beta=True))


def _gps() -> nn.Module:
    from torch_geometric.nn import GINConv, GPSConv

    def layer(width: int) -> nn.Module:
        mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        return GPSConv(width, GINConv(mlp), heads=4)

    return Stack(layer)


def _pna() -> nn.Module:
    degrees = torch.tensor([1, 2, 6, 8, 5, 2])
    return _model("PNA", aggregators=["mean", "max", "std"], scalers=["identity", "amplification"], deg=degrees)


SUBJECTS: Mapping[str, Callable[[], nn.Module]] = {
    "GCN": lambda: _model("GCN"),
    "GAT": lambda: _model("GAT", heads=4),
    "GATv2": lambda: _model("GAT", heads=4, v2=True),
    "GIN": lambda: _model("GIN"),
    "GraphSAGE": lambda: _model("GraphSAGE"),
    "PNA": _pna,
    "EdgeConv": lambda: _model("EdgeCNN"),
    "DGCNN": lambda: Stack(DynamicEdges),
    "TransformerConv": _transformer,
    "GraphConv": lambda: _convolutions("GraphConv"),
    "ARMA": lambda: _convolutions("ARMAConv"),
    "ChebConv": lambda: _convolutions("ChebConv", K=2),
    "GPS": _gps,
}


def make(name: str) -> Made:
    return first_that_runs([("two graphs with a class for every node", lambda: _fed(SUBJECTS[name]()))])


def _fed(module: nn.Module) -> tuple[nn.Module, Batch]:
    return module, adapter_for(module).collate([_graph(0), _graph(1)])


def _graph(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    edges = torch.randint(0, NODES, (2, EDGES), generator=generator)
    classes = torch.randint(0, CLASSES, (NODES,), generator=generator)
    return {"x": noise(NODES, FEATURES, seed=seed), "edge_index": edges, "node_label": classes}


GROUP = Group("graph networks", lambda: list(SUBJECTS), make, lambda name: ("PyTorch Geometric",))
