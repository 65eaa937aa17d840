"""The sample does not depend on the order of the data, and what it holds is drawn fairly."""

from __future__ import annotations

import pytest
import torch

from layerwise.landmarks import Landmarks, hashed


def reference(x: int) -> int:
    """SplitMix64 as published, on Python's integers; signed."""
    top = 2**64
    x = (x + 0x9E3779B97F4A7C15) % top
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % top
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % top
    x ^= x >> 31
    return x - top if x >= top // 2 else x


@pytest.mark.parametrize("seed", [0, 7])
def test_the_hash_is_splitmix64(seed: int) -> None:
    ids = torch.tensor([0, 1, 2**20, 2**62])
    assert hashed(ids, seed).tolist() == [reference((i + reference(seed)) % 2**64) for i in ids.tolist()]


def filled(order: torch.Tensor, *sizes: int, capacity: int = 20, seed: int = 3) -> Landmarks:
    found = Landmarks(capacity, seed)
    for ids in order.split(list(sizes)):
        found.add_(ids, ids[:, None] * torch.tensor([1.0, 2.0]))
    return found


def same(a: Landmarks, b: Landmarks) -> bool:
    return torch.equal(a.hashes, b.hashes) and torch.equal(a.rows(), b.rows())


def test_any_order_split_and_merge_gives_the_same_rows() -> None:
    order = torch.arange(100)
    whole = filled(order, 100)
    mixed = order[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    assert same(whole, filled(mixed, 1, 9, 30, 60))
    for left, right in ((mixed[:5], mixed[5:]), (mixed[95:], mixed[:95])):
        merged = filled(left, len(left))
        merged.merge_(filled(right, len(right)))
        assert same(whole, merged)
    assert whole.rows().shape == (20, 2)
    assert torch.equal(hashed((whole.rows()[:, 0]).long(), 3), whole.hashes), "rows have come apart from their numbers"
    assert not same(whole, filled(order, 100, seed=4))


def test_a_blank_sample_is_neutral_and_the_state_comes_back() -> None:
    whole, blank = filled(torch.arange(9), 9), Landmarks(20, 3)
    before = whole.rows().clone()
    whole.merge_(blank)
    blank.merge_(whole)
    loaded = Landmarks(20, 3)
    loaded.load_(blank.state())
    assert same(whole, loaded)
    assert torch.equal(before, loaded.rows())
    loaded.add_(torch.tensor([50]), torch.ones(1, 2))
    assert len(blank.rows()) == 9, "load_ and add_ wrote into the tensors they were given"


def test_every_sample_has_the_same_chance() -> None:
    counts = torch.zeros(10)
    for seed in range(1000):
        counts[filled(torch.arange(10), 10, capacity=3, seed=seed).rows()[:, 0].long()] += 1
    assert counts.sum() == 3000
    assert float((counts - 300).abs().max()) < 4.5 * (1000 * 0.3 * 0.7) ** 0.5
