"""Stacked recurrent nets: the twin computes what the net computes, and its layers can be ranked, skipped and saved."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import layerwise as lw
from layerwise import trees
from layerwise.data import Batch
from layerwise.model import UniversalModel
from layerwise.recurrent import Unstacked, stacked_names, unstacked
from layerwise.replay import Replay
from layerwise.saved import load_saved

KINDS: dict[str, tuple[type[nn.RNNBase], dict[str, Any]]] = {
    "lstm": (nn.LSTM, {}),
    "projected": (nn.LSTM, {"proj_size": 3}),
    "gru": (nn.GRU, {"bias": False}),
    "rnn": (nn.RNN, {"nonlinearity": "relu"}),
}
FORMS = list(itertools.product(KINDS, (False, True), (False, True)))


def net(kind: str, bidirectional: bool, batch_first: bool) -> nn.RNNBase:
    torch.manual_seed(0)
    cls, settings = KINDS[kind]
    return cls(4, 5, num_layers=3, bidirectional=bidirectional, batch_first=batch_first, dropout=0.5, **settings).eval()


def same(found: Any, wanted: Any, apart: float = 0.0) -> bool:
    pairs = list(zip(trees.tensors(found), trees.tensors(wanted), strict=True))
    return all(a == b and torch.allclose(x, y, rtol=0, atol=apart) for (a, x), (b, y) in pairs)


def initial(net: nn.RNNBase, samples: int) -> Any:
    rows = net.num_layers * (1 + net.bidirectional)
    hidden = torch.randn(rows, samples, net.proj_size or net.hidden_size)
    return (hidden, torch.randn(rows, samples, net.hidden_size)) if isinstance(net, nn.LSTM) else hidden


@pytest.mark.parametrize(("kind", "bidirectional", "batch_first"), FORMS)
def test_the_twin_computes_the_same_bits(kind: str, bidirectional: bool, batch_first: bool) -> None:
    stacked = net(kind, bidirectional, batch_first)
    twin = unstacked(stacked)
    x, state = torch.randn(6, 6, 4), initial(stacked, 6)
    assert isinstance(twin, Unstacked)
    assert len(twin.layers) == 3
    with torch.no_grad():
        assert same(twin(x), stacked(x))
        assert same(twin(x, state), stacked(x, state))
        assert same(twin(x[0]), stacked(x[0]))
        for lengths, ordered in (([6, 4, 4, 3, 2, 1], True), ([2, 6, 1, 4, 4, 3], False)):
            packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first=batch_first, enforce_sorted=ordered)
            # matrix products round by how their operands lie in memory, and those of a packed sequence lie elsewhere
            assert same(twin(packed, state), stacked(packed, state), apart=1e-6)
            assert isinstance(twin(packed)[0], PackedSequence)


class Sequences(nn.Module):
    """(samples, time, 6) → (samples, 3), from the last hidden state, which a skipped layer has to pass on too."""

    def __init__(self, kind: type[nn.RNNBase] = nn.GRU, layers: int = 3) -> None:
        super().__init__()
        self.net = kind(6, 6, num_layers=layers, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.net.flatten_parameters()
        last = self.net(x)[1]
        return self.head(last[0][-1] if isinstance(last, tuple) else last[-1])


def sequences(samples: int = 4) -> Batch:
    g = torch.Generator().manual_seed(samples)
    return Batch((torch.randn(samples, 5, 6, generator=g),), {}, torch.randint(0, 3, (samples,), generator=g))


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_a_model_with_a_stacked_net_is_read_as_its_layers(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    module = Sequences(kind).eval()
    model = UniversalModel(module, example=sequences(2))
    assert [(x.name, x.kind, x.skippable) for x in model.layers] == [(f"net.layers.{k}", "recurrent", True) for k in range(3)]
    assert {id(p) for p in model.module.parameters()} == {id(p) for p in module.parameters()}
    assert type(module.net) is kind  # the original is left alone
    assert "net: 3 stacked layers" in model.notes[0]
    with torch.no_grad():
        assert torch.equal(model.predict(sequences()), module(sequences().args[0]))


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_skipping_the_last_layer_changes_the_final_state_too(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    module = Sequences(kind).eval()
    replay = Replay(UniversalModel(module, example=sequences(2)), sequences())
    last = replay.model.layers[2]
    with torch.no_grad():
        expected = Sequences(kind, layers=2)
        expected.load_state_dict({k: v for k, v in module.state_dict().items() if "l2" not in k})
        assert torch.equal(replay.skipping([last]), expected.eval()(sequences().args[0]))
        assert torch.equal(replay.replacing({2: lambda f, a, k: f(*a, **k)}), replay.output)


def test_analyze_scores_each_layer_and_a_dropped_one_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Sequences().eval()
    report = lw.analyze(module, [sequences(), sequences(3)], ["gradient_based", "layer_ablation"])
    assert all(len(scores.usable()) == 3 for scores in report.scores.values())
    model = UniversalModel(module)
    plan = lw.CompressionPlan((lw.Step("drop_layers", ("net.layers.1",)),), model.fingerprint)
    result = lw.compress(model, plan, [sequences()])
    result.save(tmp_path / "small")
    again = load_saved(tmp_path / "small", module=module)
    assert torch.equal(again.predict(sequences()), result.model.predict(sequences()))
    assert sum(p.numel() for p in again.module.parameters()) == sum(p.numel() for p in module.parameters()) - 2 * (18 * 6 + 18)


def test_a_net_under_two_names_stays_one() -> None:
    module = nn.Module()
    module.first = module.second = nn.GRU(4, 4, num_layers=2)
    twin = unstacked(module)
    assert twin.first is twin.second
    assert isinstance(twin.first, Unstacked)


def test_what_may_compute_something_else_is_left_as_it_is() -> None:
    class Own(nn.LSTM):
        """A subclass may override anything."""

    for module in (Own(4, 4, num_layers=2), nn.LSTM(4, 4), weight_norm(nn.LSTM(4, 4, num_layers=2), "weight_hh_l0")):
        assert stacked_names(module) == []
        assert unstacked(module) is module


def test_dropout_between_layers_is_drawn_in_training_only() -> None:
    twin = unstacked(net("gru", False, True))
    x = torch.randn(2, 3, 4)
    packed = pack_padded_sequence(x, torch.tensor([3, 2]), batch_first=True)
    assert torch.equal(twin(x)[0], twin(x)[0])
    twin.train()
    assert not torch.equal(twin(x)[0], twin(x)[0])
    assert not torch.equal(twin(packed)[0].data, twin(packed)[0].data)


@pytest.mark.parametrize(("cls", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_multiply_accumulates_are_counted_per_step(cls: type[nn.RNNBase], gates: int) -> None:
    """Each step multiplies (gates × hidden) × (inputs + hidden); torch's own counter knows none of a fused LSTM's."""
    model = UniversalModel(cls(5, 7, num_layers=2, batch_first=True), example=Batch((torch.randn(2, 3, 5),)))
    assert [layer.macs for layer in model.layers] == [3 * gates * 7 * (5 + 7), 3 * gates * 7 * (7 + 7)]
