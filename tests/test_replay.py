"""The replay equals the naive loop bit for bit and costs what it says."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from layerwise.counts import Counts
from layerwise.data import Batch
from layerwise.errors import UserModelError
from layerwise.model import UniversalModel
from layerwise.patching import skip
from layerwise.replay import Replay
from tests.models import CASES, Case, Residual
from tests.replicas import naive_skip, same_state, state_of


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_a_replay_that_changes_nothing_is_the_forward(case: Case) -> None:
    model, batch = case.model(), case.batch(4)
    replay = Replay(model, batch)
    assert torch.equal(replay.output, model.predict(batch))
    assert torch.equal(replay.replacing({}), replay.output)


def test_each_skip_equals_the_naive_one_bit_for_bit(case: Case) -> None:
    model, batch = case.model(), case.batch(4)
    replay = Replay(model, batch)
    for layer in (x for x in model.layers if x.skippable):
        assert torch.equal(replay.skipping([layer]), naive_skip(model, batch, [layer])), layer.name


def test_pairs_of_skips_equal_the_naive_ones(case: Case) -> None:
    model, batch = case.model(), case.batch(3)
    replay = Replay(model, batch)
    pairs = itertools.combinations([x for x in model.layers if x.skippable], 2)
    for pair in itertools.islice(pairs, 12):
        assert torch.equal(replay.skipping(pair), naive_skip(model, batch, pair)), [x.name for x in pair]


@pytest.mark.parametrize("name", ["vit", "convnext", "bert", "gpt2", "llama", "t5", "residual", "encoder"])
def test_ablating_each_layer_costs_half_the_naive_block_calls(name: str) -> None:
    case = CASES[name]
    model, counts, naive = case.model(), Counts(), Counts()
    L = len(model.layers)
    replay = Replay(model, case.batch(3), counts)
    for layer in model.layers:
        replay.skipping([layer])
    naive_skip(model, case.batch(3), [], naive)
    for layer in model.layers:
        naive_skip(model, case.batch(3), [layer], naive)
    assert counts.block_calls == L + L * (L - 1) // 2
    assert naive.block_calls == L * (L + 1)


def test_the_cache_survives_blocks_that_work_in_place() -> None:
    class InPlace(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.add_(self.down(torch.relu(self.up(x))))

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), *[InPlace(8) for _ in range(4)])
    batch = Batch((torch.randn(3, 8),))
    model = UniversalModel(net, example=batch)
    replay = Replay(model, batch)
    blocks = [x for x in model.layers if x.name in {"1", "2", "3", "4"}]
    for _ in range(2):  # a second time: the first replay must not have spoilt the cache
        for layer in blocks:
            assert torch.equal(replay.skipping([layer]), naive_skip(model, batch, [layer]))


def test_layers_that_change_from_call_to_call_are_refused() -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Residual(4) for _ in range(3))
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            for block in self.blocks[: 3 if self.calls < 3 else 2]:
                x = block(x)
            return x

    batch = Batch((torch.randn(2, 4),))
    model = UniversalModel(Fickle(), example=batch)
    replay = Replay(model, batch)  # the second call; the trace was the first
    with pytest.raises(UserModelError, match=r"LW-U76 .*same layers"):
        replay.skipping([model.layers[0]])


def test_nothing_is_left_behind_even_after_an_error(case: Case) -> None:
    model = case.model()
    model.module.train()
    assert model.layers
    before = state_of(model)

    def explode(forward: object, args: object, kwargs: object) -> None:
        raise RuntimeError("in the middle")

    replay = Replay(model, case.batch(2))
    layer = model.layers[-1]
    with pytest.raises(UserModelError, match="in the middle"):
        replay.replacing({layer.index: explode})
    if layer.skippable:
        replay.replacing({layer.index: skip(layer)})
    assert same_state(before, state_of(model)) == []
