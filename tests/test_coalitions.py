"""The walk over sets of skipped layers equals skipping each set by itself, for fewer block calls."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import nn

from layerwise.coalitions import skipping_each
from layerwise.counts import Counts
from layerwise.data import Batch
from layerwise.errors import UserModelError
from layerwise.model import UniversalModel
from layerwise.replay import Replay
from tests.models import CASES, Case, Residual, ResidualNet, vectors
from tests.replicas import naive_skip


def subsets(model: UniversalModel, most: int = 4) -> list[frozenset[int]]:
    """All subsets of the first `most` skippable layers."""
    players = [x.index for x in model.layers if x.skippable][:most]
    return [frozenset(c) for n in range(len(players) + 1) for c in itertools.combinations(players, n)]


def edges(sets: list[frozenset[int]], layers: int) -> int:
    """Distinct (decisions before, layer kept) over the sets and the run that skips nothing."""
    paths = [tuple(i in s for i in range(layers)) for s in [*sets, frozenset()]]
    return len({path[:depth] for path in paths for depth in range(layers) if not path[depth]})


@pytest.mark.parametrize("name", CASES)
def test_every_set_equals_the_naive_skip_bit_for_bit(name: str) -> None:
    case: Case = CASES[name]
    model, batch = case.model(), case.batch(2)
    found = dict(skipping_each(Replay(model, batch), subsets(model)))
    assert set(found) == set(subsets(model))
    for skipped, output in found.items():
        assert torch.equal(output, naive_skip(model, batch, [model.layers[i] for i in skipped])), skipped


@pytest.mark.parametrize("name", ["vit", "bert", "gpt2", "t5", "residual", "encoder"])
def test_all_subsets_cost_a_block_call_per_inner_node_of_the_tree(name: str) -> None:
    case, counts = CASES[name], Counts()
    model = case.model()
    L = len(model.layers)
    outputs = dict(skipping_each(Replay(model, case.batch(2), counts), subsets(model, L)))
    assert len(outputs) == 2**L
    assert counts.block_calls == 2**L - 1
    assert counts.forwards == 2**L  # embeddings and heads run for each set


def test_any_sets_cost_the_distinct_edges_of_their_tree() -> None:
    torch.manual_seed(0)
    model = UniversalModel(ResidualNet(depth=9), example=vectors()(2))
    draw = random.Random(0)
    sets = [frozenset(draw.sample(range(9), draw.randint(0, 9))) for _ in range(40)]
    batch, counts = vectors()(3), Counts()
    for skipped, output in skipping_each(Replay(model, batch, counts), sets):
        assert torch.equal(output, naive_skip(model, batch, [model.layers[i] for i in skipped]))
    assert counts.block_calls == edges(sets, 9)


def test_blocks_that_work_in_place_spoil_neither_the_stack_nor_the_replay() -> None:
    class InPlace(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.add_(self.down(torch.relu(self.up(x))))

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), *[InPlace(8) for _ in range(4)])
    batch = Batch((torch.randn(3, 8),))
    model = UniversalModel(net, example=batch)
    replay = Replay(model, batch)
    for _ in range(2):  # a second walk starts from the replay's own cache
        for skipped, output in skipping_each(replay, subsets(model)):
            assert torch.equal(output, naive_skip(model, batch, [model.layers[i] for i in skipped])), skipped


def test_layers_that_change_from_call_to_call_are_refused() -> None:
    class Fickle(ResidualNet):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            for block in self.blocks[: 4 if self.calls < 3 else 3]:
                x = block(x)
            return x

    model = UniversalModel(Fickle(), example=vectors()(2))
    replay = Replay(model, vectors()(2))  # the second call; the trace was the first
    with pytest.raises(UserModelError, match=r"LW-U76 .*same layers"):
        list(skipping_each(replay, [frozenset({0})]))


@pytest.mark.parametrize("granularity", ["sublayer", ("block", "head")])
def test_sets_of_units_equal_the_replay_bit_for_bit(granularity: object) -> None:
    case = CASES["vit"]
    view, batch = case.model().at(granularity), case.batch(2)
    replay = Replay(view, batch)
    generator = torch.Generator().manual_seed(0)
    count = len(view.layers)
    sets = {frozenset(torch.randperm(count, generator=generator)[:n].tolist()) for n in (0, 1, 1, 1, 2, 2, 3, 3, 4)}
    for skipped, output in skipping_each(replay, sets):
        assert torch.equal(output, replay.skipping([view.layers[i] for i in skipped])), skipped
