"""The tree of states: the same sums to the bit however the batches are shared out."""

from __future__ import annotations

import functools
import operator
import random

import pytest
import torch

from layerwise.merging import MergeTree

SIZES = [1, 2, 3, 7, 8, 13, 100]


def leaves(count: int) -> list[float]:
    generator = torch.Generator().manual_seed(count)
    return (
        torch.randn(count, generator=generator, dtype=torch.float64) * 10.0 ** torch.randint(-8, 8, (count,), generator=generator)
    ).tolist()


def whole(values: list[float]) -> float:
    tree: MergeTree[float] = MergeTree(operator.add)
    for index, value in enumerate(values):
        tree.add(index, value)
    return tree.total()


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_any_sharding_gives_the_same_bits(count: int, parts: int) -> None:
    values = leaves(count)
    shards: list[MergeTree[float]] = [MergeTree(operator.add) for _ in range(parts)]
    for index, value in enumerate(values):
        shards[index * parts // count].add(index, value)
    random.Random(0).shuffle(shards)
    merged: MergeTree[float] = MergeTree(operator.add)
    for shard in shards:
        merged.absorb(shard.nodes)
    assert merged.total() == whole(values)


def test_any_order_gives_the_same_bits() -> None:
    values = leaves(37)
    order = list(range(37))
    random.Random(1).shuffle(order)
    tree: MergeTree[float] = MergeTree(operator.add)
    for index in order:
        tree.add(index, values[index])
    assert tree.total() == whole(values)


def test_adding_one_after_the_other_would_not_have_done() -> None:
    values = leaves(100)
    shards = [functools.reduce(operator.add, values[a:b]) for a, b in ((0, 30), (30, 60), (60, 100))]
    assert functools.reduce(operator.add, values) != functools.reduce(operator.add, shards)


def test_left_comes_before_right() -> None:
    tree: MergeTree[str] = MergeTree(operator.add)
    for index in (3, 0, 2, 4, 1):
        tree.add(index, "abcde"[index])
    assert tree.total() == "abcde"


def test_little_is_kept_meanwhile() -> None:
    tree: MergeTree[int] = MergeTree(operator.add)
    most = 0
    for index in range(1000):
        tree.add(index, 1)
        most = max(most, len(tree.nodes))
    assert most <= 10
    assert tree.total() == 1000


def test_nothing_has_no_total() -> None:
    with pytest.raises(ValueError, match="nothing was added"):
        MergeTree(operator.add).total()
