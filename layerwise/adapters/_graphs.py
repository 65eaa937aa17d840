"""Rows to graphs: molecules from SMILES, or node features and edges as they are, checked for what would break later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerwise.data import Row
from layerwise.errors import DataError, missing_dependency
from layerwise.layout import EDGE, ENDS, NODE

# field of a row → what its rows are
ROLES: Mapping[str, str] = {
    "x": NODE, "pos": NODE, "z": NODE, "edge_index": ENDS, "edge_attr": EDGE, "edge_weight": EDGE,
}  # fmt: skip
MEND = "Mend the row or leave it out."


@dataclass(frozen=True)
class Graph:
    """One graph's tensors by field, and how many nodes and edges it has."""

    fields: Mapping[str, Tensor]
    nodes: int
    edges: int


def graph_of(row: Row, place: str, codes: bool) -> Graph:
    """The row's graph; features are int64 with `codes`, else float32. Raises `DataError` LW-D32 or LW-D33 (NaN)."""
    if row.get("edge_index") is None:
        row = molecule(row, place)
    fields = {name: _tensor(row[name], name, place, codes) for name in ROLES if row.get(name) is not None}
    nodes = _rows(fields, NODE, place)
    ends = fields["edge_index"] = _checked_ends(fields["edge_index"], nodes, place)
    if _rows(fields, EDGE, place, ends.shape[1]) != ends.shape[1]:
        what = f"The edges' attributes have {_rows(fields, EDGE, place)} rows, edge_index {ends.shape[1]} columns."
        raise DataError(what, place=place, remedy=MEND, code="LW-D32")
    return Graph(fields, nodes, int(ends.shape[1]))


def molecule(row: Row, place: str) -> dict[str, Any]:
    """The row with the graph of its ``smiles``: 9 whole numbers per atom, 3 per bond, each bond as two edges.

    The numbers are PyTorch Geometric's (`torch_geometric.utils.from_smiles`). Raises `DataError` LW-D32.
    """
    text = row.get("smiles")
    if not isinstance(text, str):
        what = f"The row has no graph. Its columns: {', '.join(map(str, row))}."
        remedy = "Give SMILES (columns={'smiles': …}), or x and edge_index."
        raise DataError(what, place=place, remedy=remedy, code="LW-D32")
    try:
        from rdkit.rdBase import BlockLogs
        from torch_geometric.utils import from_smiles
    except ImportError as error:
        raise missing_dependency(error.name or "rdkit", "graph", "Reading molecules") from error
    with BlockLogs():  # rdkit writes its complaints to the terminal; ours names the row
        graph = from_smiles(text)
    if not graph.num_nodes:
        raise DataError(f"{text[:80]!r} is no SMILES of a molecule.", place=place, remedy=MEND, code="LW-D32")
    return {**row, "x": graph.x, "edge_index": graph.edge_index, "edge_attr": graph.edge_attr}


def _tensor(value: Any, name: str, place: str, codes: bool) -> Tensor:
    try:
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(np.array([*value]))
    except (TypeError, ValueError) as error:
        what = f"{name!r} holds no array of numbers: {str(error).splitlines()[0]}."
        raise DataError(what, place=place, remedy=MEND, code="LW-D32") from error
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise DataError(f"{name!r} holds NaN or infinity.", place=place, remedy=MEND, code="LW-D33")
    whole = name in ("edge_index", "z") or (codes and name in ("x", "edge_attr"))
    return tensor.long() if whole else tensor.float()


def _rows(fields: Mapping[str, Tensor], role: str, place: str, default: int = 0) -> int:
    """How many rows the fields with this role have: all the same number."""
    found = {name: len(t) if t.dim() else 0 for name, t in fields.items() if ROLES[name] == role}
    counts = set(found.values()) or {default}
    if len(counts) > 1 or (role == NODE and not min(counts)):
        what = f"The graph has no nodes, or not the same number everywhere: {found or 'no x'}."
        raise DataError(what, place=place, remedy=MEND, code="LW-D32")
    return counts.pop()


def _checked_ends(ends: Tensor, nodes: int, place: str) -> Tensor:
    if not ends.numel():
        return ends.reshape(2, 0)  # a single atom
    if ends.dim() != 2 or ends.shape[0] != 2:
        what = f"edge_index has the shape {tuple(ends.shape)}, not (2, edges)."
        raise DataError(what, place=place, remedy="Give the edges' first ends and their second ends.", code="LW-D32")
    low, high = int(ends.min()), int(ends.max())
    if low < 0 or high >= nodes:
        what = f"edge_index names the node {low if low < 0 else high}; the graph has the nodes 0 … {nodes - 1}."
        raise DataError(what, place=place, remedy=MEND, code="LW-D32")
    return ends
