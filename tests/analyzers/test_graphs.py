"""Every method on graphs: each graph's own numbers whatever the batch, slow replicas, refusals where there is no answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.data import Data as Graph
from torch_geometric.nn import GCN
from torch_geometric.utils import from_smiles

from layerwise.analyzer import ANALYZERS
from layerwise.data import Data
from layerwise.engine import analyze, chosen_analyzers, compress, export
from layerwise.errors import DataError, UserModelError
from layerwise.loading import load, load_data
from layerwise.measure import measure
from layerwise.model import UniversalModel
from layerwise.observe import observe
from layerwise.plan import CompressionPlan, Step
from layerwise.saved import load_saved, save_model
from layerwise.scores import Scores, Status
from tests.graphs import SMILES, Convolutions, Isomorphism, subject

SETTINGS = [
    "gradient_based(form=activation)", "gradient_based(form=norm)", "gradient_flow(measure=log_ratio)",
    "gradient_flow(measure=update_ratio)", "layer_ablation(operation=zero)", "layer_ablation(metric=kl)",
    "neuron_activation(measure=magnitude)", "neuron_activation(measure=effective_rank)", "layer_correlation(measure=angular)",
    "fisher_information(weighting=quantization)", "layer_correlation(measure=cka)", "layer_ablation(operation=mean)",
]  # fmt: skip


def observed(model: UniversalModel, data: Data) -> tuple[dict[str, Scores], list[str]]:
    """Scores by every method, without the removal curve; and the notes on the pass."""
    analyzers = chosen_analyzers([*ANALYZERS, *SETTINGS], 0)
    model.see(data[0])
    statistics = {name: a.statistic(model) for name, a in analyzers.items()}
    seen = observe(model, data, {name: s for name, s in statistics.items() if s is not None})
    return {name: a.finish(model, statistics[name], 0.0) for name, a in analyzers.items()}, seen.notes


@pytest.mark.parametrize("kind", [Convolutions, Isomorphism])
def test_every_score_is_the_same_when_memory_is_enough_for_one_graph_only(kind: type[nn.Module]) -> None:
    """The batch is halved three times, to single graphs; what is each one's own does not change."""
    model, data = subject(kind, batch_size=8)
    want, _ = observed(model, data)
    forward = model.module.head.forward  # type: ignore[union-attr,operator]  # a linear layer

    def tight(x: Tensor) -> Tensor:
        if len(x) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(x)

    model.module.head.forward = tight  # type: ignore[union-attr]
    found, notes = observed(model, data)
    assert [note for note in notes if "halved" in note], notes
    compared = 0
    for name, scores in want.items():
        if name == "layer_ablation(operation=mean)":  # the mean is the batch's
            continue
        for layer, score in scores.entries.items():
            other = found[name].entries[layer]
            assert score.status is other.status, f"{name} {layer}"
            if score.status is Status.OK:
                assert other.value == pytest.approx(score.value, rel=2e-4, abs=1e-5), f"{name} {layer}"
                compared += 1
    assert compared > 60


def losses(module: nn.Module, label: Any, **tensors: Tensor) -> Tensor:
    return F.cross_entropy(module(**tensors), label)


def test_fisher_is_the_mean_over_graphs_of_each_ones_squared_gradient() -> None:
    model, data = subject()
    found = analyze(model, data, ["fisher_information"]).scores["fisher_information"]
    module, totals = model.module.eval().double(), dict.fromkeys(found, 0.0)
    for i, text in enumerate(SMILES):
        graph = from_smiles(text)
        batch = torch.zeros(graph.num_nodes, dtype=torch.int64)
        loss = losses(module, torch.tensor([i % 3]), x=graph.x.double(), edge_index=graph.edge_index, batch=batch)
        for name in totals:
            parameters = list(module.get_submodule(name).parameters())
            grads = torch.autograd.grad(loss, parameters, retain_graph=True)
            totals[name] += sum(float(g.square().sum()) for g in grads) / len(SMILES)
    assert {n: s.value for n, s in found.entries.items()} == pytest.approx(totals, rel=1e-4)


def test_graphs_of_one_size_in_the_first_batch_do_not_stand_for_the_others() -> None:
    """Six nodes of two graphs are three each in the first batch, and one and five in the second."""
    model, _ = subject()
    molecules = [{"smiles": s, "label": i % 3} for i, s in enumerate(("CCO", "CCN", "C", "CCCCC"))]
    two, one = (analyze(model, load_data(molecules, model, batch_size=n), "fisher_information") for n in (2, 1))
    want = {name: score.value for name, score in one.scores["fisher_information"].entries.items()}
    assert {n: s.value for n, s in two.scores["fisher_information"].entries.items()} == pytest.approx(want, rel=1e-4)


def test_contribution_is_over_nodes_without_padding() -> None:
    model, data = subject()
    found = analyze(model, data, ["neuron_activation"]).scores["neuron_activation"].entries
    layer = next(x for x in model.layers if x.skippable)
    added = entered = 0.0
    for text in SMILES:
        batch = model.adapter.collate([{"smiles": text}])
        with torch.no_grad(), model.capture([layer.name]) as seen:
            model.output(batch)
        enters, leaves = (t.double() for t in seen[layer.name])
        added, entered = added + float((leaves - enters).square().sum()), entered + float(enters.square().sum())
    assert found[layer.name].value == pytest.approx((added / entered) ** 0.5, rel=1e-5)


def test_what_has_no_answer_on_graphs_says_why() -> None:
    model, data = subject()
    walking = [name for name in ANALYZERS if getattr(ANALYZERS[name]().statistic(model), "walks", False)]
    assert set(walking) >= {"causal_analysis", "layer_conductance"}
    scores, _ = observed(model, data)
    for name in walking:
        assert {s.status for s in scores[name].entries.values()} == {Status.NOT_APPLICABLE}
        assert "rows of a tensor are nodes of graphs" in next(iter(scores[name].entries.values())).reason
    assert "no order" in scores["layer_correlation(measure=cka)"].entries["stem"].reason
    assert "rows are the samples" in scores["layer_ablation(operation=mean)"].entries["convs.0.lin"].reason


def ring(labelled: int = 6) -> tuple[UniversalModel, Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    ends = torch.stack([torch.arange(8), (torch.arange(8) + 1) % 8])
    y = torch.tensor([0, 1, 2, 0, 1, 2, -1, -1])
    y[labelled:] = -1
    model = load(GCN(4, 8, 3, out_channels=3))
    graph = Graph(x=torch.randn(8, 4), edge_index=torch.cat([ends, ends.flip(0)], 1), y=y)
    data = load_data(graph, model)
    return model, data, dict(data[0].kwargs)


def test_gradients_and_ablation_of_single_nodes_are_each_ones_own() -> None:
    model, data, tensors = ring()
    scores = analyze(model, data, ["fisher_information", "layer_ablation", "gradient_flow"]).scores
    module = model.module
    each = F.cross_entropy(module.eval()(**tensors)[:6], data[0].labels, reduction="none")
    for name, score in scores["fisher_information"].entries.items():
        parameters = list(module.get_submodule(name).parameters())
        squares = [sum(float(g.square().sum()) for g in torch.autograd.grad(x, parameters, retain_graph=True)) for x in each]
        assert score.value == pytest.approx(sum(squares) / 6, rel=1e-4)
        spread = torch.tensor(squares, dtype=torch.float64).std() / 6**0.5
        assert score.stderr == pytest.approx(float(spread), rel=1e-3)
    (name,) = [n for n, s in scores["layer_ablation"].entries.items() if s.status is Status.OK]
    with model.skipping([name]):
        without = F.cross_entropy(module(**tensors)[:6], data[0].labels).detach()
    assert scores["layer_ablation"].entries[name].value == pytest.approx(float(without - each.detach().mean()), rel=1e-4)
    assert "neighbours' losses" in scores["gradient_flow"].entries[name].reason


def test_costs_of_single_nodes_are_shares_of_the_whole_graph() -> None:
    model, data, _ = ring()
    fewer = ring(2)[1]
    found = measure(model, data, latency_batches=3)
    assert found.samples == 6
    assert found.macs == measure(model, fewer, latency_batches=3).macs, "the forward is the same, however many are asked for"
    assert found.macs == 4 * 8 + 8 * 8 + 8 * 3


def test_a_cut_graph_network_is_proved_saved_and_comes_back(tmp_path: Path) -> None:
    model, data = subject(Isomorphism)
    model.see(data[0])
    assert model.layers[1].skippable
    plan = CompressionPlan((Step("drop_layers", (model.layers[1].name,)),))
    result = compress(model, plan, data)
    assert [p.passed for p in result.proofs] == [True] * 3, result.proofs
    save_model(result, tmp_path / "small")
    again = load_saved(tmp_path / "small", module=Isomorphism())
    assert torch.equal(again.predict(data[0]), result.model.predict(data[0]))
    with pytest.raises(UserModelError, match=r"LW-U79 .*reads graphs"):
        export(result.model, tmp_path / "small.onnx", data)


def test_ready_tensors_that_hide_which_node_is_whose_are_refused() -> None:
    model, data = subject()
    plain = [{**batch.kwargs, "labels": batch.labels} for batch in data]
    with pytest.raises(DataError, match=r"LW-D32 .*does not say which rows are whose.*load_data"):
        analyze(model, plain, ["layer_ablation"])
