"""Batches of graphs: what belongs to a sample, cut out, padded, saved and made up again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from layerwise.adapter import ADAPTERS
from layerwise.adapters.graph import GraphModalityAdapter
from layerwise.data import Batch, Data
from layerwise.layout import Graphs, Nodes, restored
from layerwise.packing import outline, pack, stand_in, unpack
from tests.graphs import Convolutions, rows

ADAPTER = ADAPTERS["graph"].of(Convolutions())
NAMES = ("x", "edge_index", "edge_attr", "batch", "num_graphs")
EVERYTHING = GraphModalityAdapter(arguments=tuple((n, "count" if n == "num_graphs" else n) for n in NAMES))


def same(a: Batch, b: Batch) -> bool:
    pairs = [(a.kwargs[n], b.kwargs[n]) for n in a.kwargs]
    equal = all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)
    return equal and a.kwargs.keys() == b.kwargs.keys() and a.layout == b.layout


@pytest.mark.parametrize(("start", "stop"), [(0, 8), (0, 3), (2, 5), (2, 3), (5, 8)])
def test_a_part_is_the_batch_of_these_rows_alone(start: int, stop: int) -> None:
    whole, part = EVERYTHING.collate(rows()), EVERYTHING.collate(rows()[start:stop])
    cut = whole.narrow(start, stop)
    assert cut.size == stop - start
    assert same(cut, part)
    assert cut.labels.tolist() == part.labels.tolist()


def test_the_head_of_data_is_whole_graphs() -> None:
    data = Data.of([ADAPTER.collate(rows()), ADAPTER.collate(rows())])
    assert data.samples == 16
    first = data.head(11)
    assert [batch.size for batch in first] == [8, 3]
    assert same(first[1], ADAPTER.collate(rows()[:3]))


def test_nodes_are_positions_of_their_graph_and_padding_is_left_out() -> None:
    layout = Graphs((2, 1, 3), (0, 0, 0))
    x = torch.arange(12.0).reshape(6, 2)
    padded = layout.by_sample(x)
    assert padded.shape == (3, 3, 2)
    assert padded[0].tolist() == [[0, 1], [2, 3], [0, 0]]
    assert padded[2].tolist() == [[6, 7], [8, 9], [10, 11]]
    keep = layout.keep(padded[..., 0])
    assert keep is not None
    assert keep.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    assert torch.equal(padded[keep], x)
    heads = x.reshape(6, 1, 2)
    assert torch.equal(layout.by_sample(heads), padded)
    for other in (torch.zeros(3, 5), torch.zeros(7, 2), torch.tensor(1.0)):  # of graphs, of something else
        assert layout.by_sample(other) is other
    assert layout.keep(torch.zeros(3, 5)) is None


def test_single_nodes_are_picked_out_and_their_graph_stays_whole() -> None:
    layout = Nodes(Graphs((4,), (2,), {"x": "node", "edge_index": "ends"}), torch.tensor([3, 0, 2]))
    x = torch.arange(8.0).reshape(4, 2)
    batch = Batch((), {"x": x, "edge_index": torch.tensor([[0, 1], [1, 2]])}, torch.tensor([7, 8, 9]), layout)
    assert layout.by_sample(x).tolist() == [[6, 7], [0, 1], [4, 5]]
    part = batch.narrow(1, 3)
    assert part.size == 2
    assert part.answers == 4
    assert part.labels.tolist() == [8, 9]
    assert torch.equal(part.kwargs["x"], x)
    assert part.by_sample(x).tolist() == [[0, 1], [4, 5]]


def test_a_batch_survives_being_packed_and_its_outline_holds_nobodys_molecule() -> None:
    batch = EVERYTHING.collate(rows())
    described, tensors = pack(batch)
    assert same(unpack(described, tensors), batch)
    made = stand_in(outline(batch))
    assert made.layout == batch.layout
    assert made.kwargs["batch"].tolist() == batch.kwargs["batch"].tolist()
    ends = made.kwargs["edge_index"]
    assert ends.shape == batch.kwargs["edge_index"].shape
    assert not torch.equal(ends, batch.kwargs["edge_index"])
    assert torch.equal(made.kwargs["batch"][ends[0]], made.kwargs["batch"][ends[1]]), "an edge between two graphs"
    nodes = replace(batch, layout=Nodes(batch.layout, torch.tensor([2, 5])))  # type: ignore[arg-type]  # it is Graphs
    again = restored(outline(nodes)["layout"])
    assert isinstance(again, Nodes)
    assert again.targets.tolist() == [2, 5]
    assert again.graphs == batch.layout


def test_the_fingerprint_tells_molecules_apart() -> None:
    one, other = (Data.of([ADAPTER.collate([{"smiles": s}])]).fingerprint for s in ("CCO", "CCN"))
    assert one != other
