"""Graphs from SMILES, arrays and PyTorch Geometric, for forwards of every form."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch_geometric.data import Batch as Packed
from torch_geometric.data import Data as Graph
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GAT, global_mean_pool
from torch_geometric.utils import from_smiles

from layerwise.adapter import adapter_for
from layerwise.adapters.graph import GraphModalityAdapter
from layerwise.engine import analyze
from layerwise.errors import DataError, MissingDependency, UserModelError
from layerwise.heads import fit_head
from layerwise.layout import Nodes
from layerwise.loading import load, load_data
from layerwise.rows import Record
from tests.conftest import ROOT
from tests.graphs import SMILES, Convolutions, Isomorphism, rows


class Embedding(nn.Module):
    """Reads codes of atoms and bonds; no library's."""

    def __init__(self) -> None:
        super().__init__()
        self.atoms, self.bonds = nn.Embedding(120, 8), nn.Embedding(32, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, h: Tensor, edge_index: Tensor, edge_attr: Tensor, batch_index: Tensor, num_graphs: int) -> Tensor:
        h = self.atoms(h[:, 0])
        messages = h[edge_index[0]] + self.bonds(edge_attr[:, 0])
        h = h.index_add(0, edge_index[1], messages)
        return self.head(h.new_zeros(num_graphs, 8).index_add(0, batch_index, h))


def graphs() -> list[Graph]:
    made = [from_smiles(s) for s in SMILES]
    for i, graph in enumerate(made):
        graph.y = torch.tensor([i % 3])
    return made


def test_the_big_graph_is_pytorch_geometrics() -> None:
    batch = adapter_for(Convolutions()).collate(rows())
    theirs = Packed.from_data_list(graphs())
    assert torch.equal(batch.kwargs["x"], theirs.x.float())
    assert torch.equal(batch.kwargs["edge_index"], theirs.edge_index)
    assert torch.equal(batch.kwargs["batch"], theirs.batch)
    assert torch.equal(batch.labels, theirs.y)


def test_a_forward_that_takes_one_object_gets_pytorch_geometrics_batch() -> None:
    model = load(Isomorphism())
    batch = model.adapter.collate(rows())
    (packed,), rest = batch.arguments()
    theirs = Packed.from_data_list(graphs())
    assert rest == {}
    assert isinstance(packed, Packed)
    assert packed.num_graphs == 8
    assert torch.equal(packed.ptr, theirs.ptr)
    theirs.x = theirs.x.float()
    with torch.no_grad():
        torch.testing.assert_close(model.predict(batch), model.module(theirs))


def test_names_and_types_are_the_forwards_own() -> None:
    model = load(Embedding())
    assert isinstance(model.adapter, GraphModalityAdapter)
    batch = model.adapter.collate(rows(3))
    assert list(batch.kwargs) == ["h", "edge_index", "edge_attr", "batch_index", "num_graphs"]
    assert batch.kwargs["h"].dtype == batch.kwargs["edge_attr"].dtype == torch.int64
    assert batch.kwargs["num_graphs"] == 3
    assert model.predict(batch).shape == (3, 2)
    part = batch.narrow(1, 3)
    torch.testing.assert_close(model.predict(part), model.predict(batch)[1:])


@pytest.mark.parametrize("form", ["list", "loader", "one batch", "arrays"])
def test_graphs_of_every_source_give_the_same_batches(form: str) -> None:
    model = load(Convolutions())
    made = graphs()
    arrays = [{"x": g.x.tolist(), "edge_index": g.edge_index.tolist(), "label": int(g.y)} for g in made]
    sources = {"list": made, "loader": DataLoader(made, 3), "one batch": Packed.from_data_list(made), "arrays": arrays}
    data = load_data(sources[form], model)
    want = load_data(rows(), model)[0]
    assert torch.equal(data[0].kwargs["x"], want.kwargs["x"])
    assert torch.equal(data[0].kwargs["edge_index"], want.kwargs["edge_index"])
    assert torch.equal(data[0].labels, want.labels)


def test_molecules_of_a_table(tmp_path: Any) -> None:
    frame = pd.DataFrame({"name": list("abc"), "smiles": SMILES[:3], "weight": [1.0, 2.0, 3.0], "solubility": [-0.5, 1.0, 2.0]})
    frame.to_parquet(tmp_path / "m.parquet")
    data = load_data(tmp_path / "m.parquet", load(Convolutions(1)), columns={"label": "solubility"})
    assert data[0].size == 3
    assert data[0].labels.tolist() == [-0.5, 1.0, 2.0]
    assert data.notes == ("'solubility' holds real values: they are targets, not classes",)


def test_node_labels_make_nodes_the_samples() -> None:
    graph = Graph(x=torch.randn(5, 9), edge_index=torch.tensor([[0, 1, 3], [1, 2, 4]]), y=torch.tensor([0, 1, -1, 1, 0]))
    graph.train_mask = torch.tensor([True, True, True, False, False])
    model = load(GAT(9, 8, 2, out_channels=2))
    every, some = load_data(graph, model), load_data(graph, model, split="train")
    assert every[0].labels.tolist() == [0, 1, 1, 0], "the third has no label"
    assert isinstance(some[0].layout, Nodes)
    assert some[0].layout.targets.tolist() == [0, 1]
    torch.testing.assert_close(model.predict(some[0]), model.predict(every[0])[:2])
    two = load_data([graph, graph], model)[0]
    assert two.size == 8
    assert two.labels.tolist() == [0, 1, 1, 0] * 2
    torch.testing.assert_close(model.predict(two)[4:], model.predict(every[0]))


def test_an_output_per_node_does_not_take_a_label_per_graph() -> None:
    model = load(GAT(9, 8, 2, out_channels=3))
    with pytest.raises(UserModelError, match=r"LW-U78 .*one output per node.*global_mean_pool"):
        model.see(load_data(rows(), model)[0])
    unlabelled = load_data([{"smiles": s} for s in SMILES], model)
    model.see(unlabelled[0])
    assert model.task is not None
    assert model.task.name == "fidelity"
    assert model.output(unlabelled[0]).shape == (8, 7, 3), "nodes are the positions of their graph"


class Positions(nn.Module):
    """Needs what no molecule's row has."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, pos: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        return self.head(global_mean_pool(pos, batch))


GOOD = {"x": [[1.0] * 9] * 2, "edge_index": [[0], [1]]}
BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"smiles": "notasmiles("}, "LW-D32", "'notasmiles(' is no SMILES"),
    ({"smiles": ""}, "LW-D32", "is no SMILES"),
    ({"text": "a"}, "LW-D32", "The row has no graph. Its columns: text"),
    (GOOD | {"x": [[1.0] * 8] * 2}, "LW-D32", "x (…, 8), those of the batch's first row x (…, 9)"),
    (GOOD | {"x": [[float("nan")] * 9] * 2}, "LW-D33", "'x' holds NaN"),
    (GOOD | {"x": [[1.0], [1.0, 2.0]]}, "LW-D32", "'x' holds no array of numbers"),
    (GOOD | {"edge_index": [[0], [2]]}, "LW-D32", "names the node 2; the graph has the nodes 0 … 1"),
    (GOOD | {"edge_index": [[0], [-1]]}, "LW-D32", "names the node -1"),
    (GOOD | {"edge_index": [[0, 1, 0]]}, "LW-D32", "has the shape (1, 3), not (2, edges)"),
    (GOOD | {"edge_attr": [[1.0]] * 3}, "LW-D32", "have 3 rows, edge_index 1 columns"),
    (GOOD | {"pos": [[0.0] * 3] * 3}, "LW-D32", "not the same number everywhere"),
    ({"x": [], "edge_index": [[], []]}, "LW-D32", "no nodes"),
    (GOOD | {"node_label": [0, 1, 0]}, "LW-D32", "node_label has the shape (3,); the graph has 2 nodes"),
]


@pytest.mark.parametrize(("row", "code", "text"), BAD, ids=[text for _, _, text in BAD])
def test_bad_rows_are_named(row: dict[str, Any], code: str, text: str) -> None:
    first = GOOD | ({"node_label": [0, 1]} if "node_label" in row else {})
    with pytest.raises(DataError) as caught:
        adapter_for(Convolutions()).collate([first, Record(row, "m.parquet, row 7")])
    assert caught.value.code == code
    assert text in str(caught.value)
    assert "m.parquet, row 7" in str(caught.value)


def test_a_few_molecules_that_rdkit_refuses_are_left_out_and_said() -> None:
    model = load(Convolutions())
    many = [{"smiles": SMILES[i % 8], "label": 0} for i in range(199)]
    data = load_data([*many, {"smiles": "C(C)(C)(C)(C)C", "label": 1}], model, batch_size=200)
    assert data[0].size == 199
    assert data.notes == ("1 rows left out, whose SMILES rdkit refuses: list, row 199",)
    with pytest.raises(DataError, match=r"LW-D32 list, row 20: 'C\(C\)\(C\)\(C\)\(C\)C' is no SMILES"):
        load_data([*many[:20], {"smiles": "C(C)(C)(C)(C)C", "label": 1}], model)
    with pytest.raises(DataError, match=r"LW-D32 list, row 199: The row has no graph"):
        load_data([*many, {"smiles": None, "label": 1}], model)


def test_a_forward_that_wants_more_says_so() -> None:
    model = load(Positions())
    assert isinstance(model.adapter, GraphModalityAdapter)
    with pytest.raises(UserModelError, match="missing 1 required positional argument: 'pos'"):
        model.predict(model.adapter.collate(rows(2)))


def test_a_head_on_a_graph_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = load(Convolutions(6))
    model = fit_head(encoder, load_data(rows(), encoder))
    data = load_data(rows(), model)
    assert list(data[0].kwargs) == ["x", "edge_index", "batch"]
    assert model.predict(data[0]).shape == (8, 3)
    assert analyze(model, data, ["layer_ablation", "fisher_information"]).scores["fisher_information"].samples == 8


def test_the_pages_example_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "graphs.md").read_text(encoding="utf-8"), re.DOTALL)
    space: dict[str, Any] = {}
    exec(compile(block, "docs/graphs.md", "exec"), space)
    assert space["report"].metrics["rmse"] > 0


def test_molecules_without_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rdkit.rdBase", None)
    with pytest.raises(MissingDependency, match=r"pip install 'layerwise\[graph\]'"):
        adapter_for(Convolutions()).collate(rows(1))
