"""Graphs of PyTorch Geometric, one at a time or in its loaders: rows with the names that the graph adapter knows."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from layerwise.rows import Record

FIELDS = ("x", "edge_index", "edge_attr", "edge_weight", "pos", "z")


def is_graph(value: Any) -> bool:
    """Whether it is PyTorch Geometric's ``Data``, known without importing that library."""
    return any(cls.__module__.startswith("torch_geometric.data.") for cls in type(value).__mro__) and "edge_index" in value


def graphs_in(value: Any) -> list[Any]:
    """The graphs that `value` holds: one, a batch or a list of them, a data set or a loader; empty where it holds others."""
    if "torch_geometric" not in sys.modules:  # then there is no graph of it either, and no data set has to be asked
        return []
    if is_graph(value):
        return list(value.to_data_list()) if hasattr(value, "to_data_list") else [value]
    if isinstance(value, DataLoader):
        value = value.dataset  # whole graphs in order: how they were batched does not matter
    indexed = isinstance(value, Sequence | Dataset) and not isinstance(value, IterableDataset)
    if indexed and len(value) and is_graph(value[0]):
        return [graph for i in range(len(value)) for graph in graphs_in(value[i])]
    return []


def graph_record(graph: Any, place: str, split: str | None) -> Record:
    """Its tensors by name. ``y`` with a row per node is ``node_label``, of which ``{split}_mask`` may choose some.

    A vector of as many targets as there are nodes would be taken for node labels: PyTorch Geometric gives targets of a whole
    graph a first dimension of 1.
    """
    values = {name: value for name in FIELDS if isinstance(value := graph.get(name), Tensor)}
    y = graph.get("y")
    if not isinstance(y, Tensor):
        return Record(values | ({} if y is None else {"label": y}), place)
    if y.dim() and len(y) == graph.num_nodes > 1:
        mask = f"{split}_mask"
        chosen = {"node_mask": graph[mask]} if mask in graph else {}
        return Record({**values, "node_label": y.squeeze(-1) if y.dim() > 1 else y, **chosen}, place)
    flat = y.reshape(-1).tolist()
    return Record({**values, "label": flat[0] if len(flat) == 1 else flat}, place)
