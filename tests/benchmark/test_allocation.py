"""The shared solver against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from layerwise.benchmark.allocation import allocate, weights_of
from layerwise.benchmark.protocol import BITS


@pytest.mark.parametrize("seed", range(8))
def test_the_solver_is_optimal(seed: int) -> None:
    rng = np.random.default_rng(seed)
    importance, sizes = rng.permutation(5) + 1.0, rng.integers(1, 50, 5)
    found = allocate(importance.tolist(), sizes.tolist())
    possible = [b for b in itertools.product(BITS, repeat=5) if sizes @ b <= 3 * sizes.sum()]
    best = min(float(importance @ (4.0 ** -np.array(b))) for b in possible)
    assert sizes @ found <= 3 * sizes.sum()
    assert float(importance @ (4.0 ** -np.array(found))) == pytest.approx(best, rel=1e-12)


def test_a_more_important_layer_of_the_same_size_never_gets_fewer_bits() -> None:
    bits = allocate([1, 2, 3, 4, 5, 6], [10] * 6)
    assert bits == sorted(bits)
    assert bits[0] < bits[-1]


def test_layers_without_a_score_share_the_mean_rank() -> None:
    assert weights_of({"a": 5.0, "c": 1.0, "d": 5.0}, ["a", "b", "c", "d"]) == [2.5, 2.0, 1.0, 2.5]
