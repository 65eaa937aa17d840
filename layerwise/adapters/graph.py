"""Graphs for PyTorch Geometric networks, and for any module whose forward takes an ``edge_index``."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from layerwise.adapter import ADAPTERS, ModalityAdapter, library_of
from layerwise.adapters._graphs import MEND, ROLES, Graph, graph_of, molecule
from layerwise.adapters._labels import labels_of
from layerwise.data import Batch, Row
from layerwise.errors import DataError, UserModelError
from layerwise.heads import encoder_of
from layerwise.layout import COUNT, GRAPH_OF, Graphs, Nodes
from layerwise.rows import Record, place_of
from layerwise.task import Task
from layerwise.trace import evaluating, run

SETTINGS = "graph.json"
TOLERATED = 0.01  # share of molecules that may be left out
SHOWN = 5  # of them in a note
# what a forward may call each field
NAMES: Mapping[str, tuple[str, ...]] = {
    "x": ("x", "h", "feat", "feats", "features", "node_feats", "node_features"),
    "pos": ("pos", "positions", "coords"),
    "z": ("z", "atomic_numbers"),
    "edge_index": ("edge_index", "edges"),
    "edge_attr": ("edge_attr", "edge_feats", "edge_features", "edge_attrs"),
    "edge_weight": ("edge_weight", "edge_weights"),
    "batch": ("batch", "batch_index", "batch_idx", "graph_index"),
    "count": ("batch_size", "num_graphs"),
}
FIELD_OF = {name: field for field, names in NAMES.items() for name in names}
ALL_ROLES = {**ROLES, "batch": GRAPH_OF, "count": COUNT}


@ADAPTERS.register("graph")
@dataclass(frozen=True)
class GraphModalityAdapter(ModalityAdapter):
    """Many graphs as one big graph in several pieces; molecules come as SMILES.

    `codes`: features are whole numbers (int64), for networks that embed them; else float32. `arguments`: (name in the forward,
    field of the row); with `packed` the forward takes one object of PyTorch Geometric instead. Rows with ``node_label`` have one
    answer per node: then a sample is a node that has a label (not NaN, not negative) and is not left out by ``node_mask``.
    """

    codes: bool = False
    arguments: tuple[tuple[str, str], ...] = ()
    packed: bool = False
    modality: ClassVar[str] = "graph"
    priority: ClassVar[int] = 20

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        libraries = set().union(*(library_of(m) for m in module.modules()))
        return "torch_geometric" in libraries or any(FIELD_OF.get(name) == "edge_index" for name, _ in _parameters(module))

    @classmethod
    def of(cls, module: nn.Module, folder: Path | None = None) -> GraphModalityAdapter:
        saved = folder / SETTINGS if folder else None
        embeds = any(isinstance(m, nn.Embedding) for m in module.modules())
        codes = bool(json.loads(saved.read_text(encoding="utf-8"))["codes"]) if saved and saved.is_file() else embeds
        parameters = _parameters(module)
        known = tuple((name, FIELD_OF[name]) for name, _ in parameters if name in FIELD_OF)
        packed = not any(field in ROLES for _, field in known) and sum(required for _, required in parameters) == 1
        return cls(codes, () if packed else known, packed)

    def prepare(self, rows: Sequence[Row]) -> tuple[Sequence[Row], tuple[str, ...]]:
        """Molecules become graphs once.

        Public sets hold a few SMILES that rdkit refuses (impossible valences). Up to one row in a hundred is left out for that,
        and a note says which; more raise `DataError` LW-D32.
        """
        made, refused = [], []
        for i, row in enumerate(rows):
            place = place_of(row, i)
            try:
                made.append(Record(row if row.get("edge_index") is not None else molecule(row, place), place))
            except DataError as error:
                if not isinstance(row.get("smiles"), str):
                    raise
                refused.append(error)
        if len(refused) > TOLERATED * len(rows):
            raise refused[0]
        named = ", ".join(error.place.rpartition("/")[2] for error in refused[:SHOWN]) + (" …" if len(refused) > SHOWN else "")
        return made, (f"{len(refused)} rows left out, whose SMILES rdkit refuses: {named}",) if refused else ()

    def collate(self, rows: Sequence[Row]) -> Batch:
        """Node rows of all graphs one after the other, edges renumbered; labels (graphs,), (graphs, targets) or (nodes,)."""
        places = [place_of(row, i) for i, row in enumerate(rows)]
        graphs = [graph_of(row, place, self.codes) for row, place in zip(rows, places, strict=True)]
        kwargs = self._joined(graphs, places)
        layout = Graphs(tuple(g.nodes for g in graphs), tuple(g.edges for g in graphs), _roles(kwargs), self.packed)
        if any(row.get("node_label") is not None for row in rows):
            labels, targets = _node_labels(rows, graphs, places)
            return Batch((), kwargs, labels, Nodes(layout, targets))
        return Batch((), kwargs, labels_of(rows), layout)

    def _joined(self, graphs: Sequence[Graph], places: Sequence[str]) -> dict[str, Any]:
        """Argument → tensor. Raises `DataError` LW-D32 where a field is missing in some rows or has another width."""
        first, counts = graphs[0].fields, [g.nodes for g in graphs]
        for graph, place in zip(graphs, places, strict=True):
            shapes = [{n: t.shape[1:] for n, t in g.fields.items() if n != "edge_index"} for g in (graph, graphs[0])]
            if shapes[0] != shapes[1]:
                what = f"The features have the shapes {_words(shapes[0])}, those of the batch's first row {_words(shapes[1])}."
                raise DataError(what, place=place, remedy="Bring all rows to one form.", code="LW-D32")
        starts = np.cumsum([0, *counts[:-1]]).tolist()
        joined: dict[str, Any] = {n: torch.cat([g.fields[n] for g in graphs]) for n in first if n != "edge_index"}
        ends = [g.fields["edge_index"] + start for g, start in zip(graphs, starts, strict=True)]
        joined["edge_index"] = torch.cat(ends, 1)
        joined["batch"] = torch.arange(len(graphs)).repeat_interleave(torch.tensor(counts))
        joined["count"] = len(graphs)
        wanted = self.arguments or tuple((n, n) for n in (*ROLES, "batch"))
        return {name: joined[field] for name, field in wanted if field in joined}

    def example(self, module: nn.Module) -> Batch | None:
        """A path of three nodes and a ring of four; None where the width of the features cannot be read from the module."""
        width = next((w for m in module.modules() if (w := _width(m))), None)
        if width is None or self.codes:
            return None
        noise = torch.Generator().manual_seed(0)
        ends = {3: [[0, 1, 1, 2], [1, 0, 2, 1]], 4: [[0, 1, 2, 3], [1, 2, 3, 0]]}
        batch = self.collate([{"x": torch.randn(n, width, generator=noise), "edge_index": e} for n, e in ends.items()])
        try:
            with evaluating(module), torch.no_grad():
                run(module, batch)
        except (UserModelError, RuntimeError):  # it reads something else besides: only real rows can tell
            return None
        return batch

    def accept(self, batch: Batch) -> None:
        if batch.layout is None:
            raise DataError(
                "The batch holds graphs as plain tensors, which does not say which rows are whose.",
                remedy="Give the graphs, or a loader of PyTorch Geometric, to load_data(…, model).",
                code="LW-D32",
            )

    def default_task(self, module: nn.Module, batch: Batch, output: Tensor) -> Task:
        if batch.labels is not None and isinstance(batch.layout, Graphs) and output.dim() == 3:
            raise UserModelError(
                "The model gives one output per node, and the labels are one per graph.",
                remedy="Pool the nodes in the model's forward (global_mean_pool), or give node labels (node_label).",
                code="LW-U78",
            )
        return super().default_task(module, batch, output)

    def save(self, folder: Path) -> None:
        (folder / SETTINGS).write_text(json.dumps({"codes": self.codes}) + "\n", encoding="utf-8")


def _parameters(module: nn.Module) -> list[tuple[str, bool]]:
    """The parameters of the forward, below a fitted head that of the encoder, and whether each must be given."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = inspect.signature(encoder_of(module).forward).parameters.values()
    return [(p.name, p.default is inspect.Parameter.empty) for p in found if p.kind not in kinds]


def _width(module: nn.Module) -> int:
    """How many features the module itself says it takes; 0 where it does not."""
    given = getattr(module, "in_channels", getattr(module, "in_features", 0))
    return given if isinstance(given, int) and given > 0 else 0


def _node_labels(rows: Sequence[Row], graphs: Sequence[Graph], places: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The labels of the nodes that are samples, and these nodes' numbers in the big graph."""
    labels = torch.cat([_per_node(row, "node_label", g, p) for row, g, p in zip(rows, graphs, places, strict=True)])
    masks = [
        _per_node(row, "node_mask", g, p).bool() if row.get("node_mask") is not None else torch.ones(g.nodes, dtype=torch.bool)
        for row, g, p in zip(rows, graphs, places, strict=True)
    ]
    labels = labels if labels.is_floating_point() else labels.long()
    known = labels.isfinite() if labels.is_floating_point() else labels >= 0
    targets = (known & torch.cat(masks)).nonzero().flatten()
    return labels[targets], targets


def _per_node(row: Row, name: str, graph: Graph, place: str) -> Tensor:
    value = row.get(name)
    found = torch.as_tensor(np.asarray(value)) if value is not None else torch.empty(0)
    if found.shape[:1] != (graph.nodes,):
        what = f"{name} has the shape {tuple(found.shape)}; the graph has {graph.nodes} nodes."
        raise DataError(what, place=place, remedy=MEND, code="LW-D32")
    return found


def _roles(kwargs: Mapping[str, Any]) -> dict[str, str]:
    return {name: ALL_ROLES[FIELD_OF[name]] for name in kwargs}


def _words(shapes: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{name} (…{''.join(f', {n}' for n in shape)})" for name, shape in shapes.items())
