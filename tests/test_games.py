"""Games whose values are known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from layerwise import games

Worth = Callable[[frozenset[int]], float]


def game(worth: Worth, players: int) -> dict[frozenset[int], Tensor]:
    return {s: torch.tensor(worth(s), dtype=torch.float64) for s in games.coalitions(players, players)}


def random_game(players: int, seed: int = 0) -> dict[frozenset[int], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {s: torch.randn((), generator=generator, dtype=torch.float64) for s in games.coalitions(players, players)}


def by_definition(known: dict[frozenset[int], Tensor], players: int) -> list[float]:
    """The mean over all orders of what a player adds on joining."""
    totals = [0.0] * players
    for order in itertools.permutations(range(players)):
        for place, player in enumerate(order):
            totals[player] += float(known[frozenset(order[: place + 1])] - known[frozenset(order[:place])])
    return [t / math.factorial(players) for t in totals]


def test_the_value_is_the_mean_over_all_orders() -> None:
    known = random_game(5)
    assert games.values(known, 5).tolist() == pytest.approx(by_definition(known, 5), abs=1e-12)


@pytest.mark.parametrize("index", games.INDICES)
def test_in_an_additive_game_everyone_gets_their_weight(index: str) -> None:
    weights = [3.0, -1.0, 0.5, 2.0, 0.0]
    found = games.values(game(lambda s: 7.0 + sum(weights[p] for p in s), 5), 5, index)
    assert found.tolist() == pytest.approx(weights, abs=1e-12)


def test_the_values_sum_to_the_worth_of_all_minus_that_of_none() -> None:
    known = random_game(12)
    total = known[frozenset(range(12))] - known[frozenset()]
    assert float(games.values(known, 12).sum()) == pytest.approx(float(total), abs=1e-10)


@pytest.mark.parametrize("index", games.INDICES)
def test_interchangeable_players_get_the_same_and_a_dummy_nothing(index: str) -> None:
    known = random_game(6)
    made = {s: known[frozenset(p for p in s if p not in (1, 3, 5)) | frozenset(range(2) if {1, 3} & s else ())] for s in known}
    found = games.values(made, 6, index)
    assert float(found[1]) == pytest.approx(float(found[3]), abs=1e-12)
    assert float(found[5]) == pytest.approx(0.0, abs=1e-12)
    assert abs(float(found[2])) > 1e-3


def test_the_glove_game() -> None:
    """One left glove (0) and two right ones (1, 2): a pair is worth 1. Shapley 2/3, 1/6, 1/6; Banzhaf 3/4, 1/4, 1/4."""
    known = game(lambda s: float(0 in s and bool({1, 2} & s)), 3)
    assert games.values(known, 3).tolist() == pytest.approx([2 / 3, 1 / 6, 1 / 6], abs=1e-12)
    assert games.values(known, 3, "banzhaf").tolist() == pytest.approx([3 / 4, 1 / 4, 1 / 4], abs=1e-12)


@pytest.mark.parametrize("index", games.INDICES)
@pytest.mark.parametrize("missing", [1, 2, 3, 5])
def test_a_truncated_value_reads_only_coalitions_that_lack_few(index: str, missing: int) -> None:
    known = random_game(5)
    few = {s: v for s, v in known.items() if len(s) >= 5 - missing}
    assert len(few) == games.coalition_count(5, missing)
    found = games.values(few, 5, index, missing)
    everyone = frozenset(range(5))
    if missing == 1:  # what the others lose without the player
        assert found.tolist() == pytest.approx([float(known[everyone] - known[everyone - {p}]) for p in range(5)], abs=1e-12)
    if missing == 5:
        assert torch.equal(found, games.values(known, 5, index))
    assert sum(w * math.comb(4, s) for s, w in enumerate(games.marginal_weights(5, index, missing))) == pytest.approx(1.0)


def test_sampled_values_lie_within_four_standard_errors_of_the_exact_ones() -> None:
    known = random_game(8)
    exact = games.values(known, 8)
    pairs = games.sampled_values(known, games.antithetic_orders(8, 200, 0))
    error = pairs.std(0) / 200**0.5
    assert ((pairs.mean(0) - exact).abs() < 4 * error).all()
    assert (error < 0.2).all()
    total = known[frozenset(range(8))] - known[frozenset()]
    assert torch.allclose(pairs.sum(1), total.expand(200), atol=1e-12)  # every pair shares out the whole


def test_orders_come_in_reversed_pairs_and_follow_the_seed() -> None:
    orders = games.antithetic_orders(9, 5, 3)
    assert all(reverse == order[::-1] and sorted(order) == list(range(9)) for order, reverse in orders)
    assert orders == games.antithetic_orders(9, 5, 3) != games.antithetic_orders(9, 5, 4)


def test_worths_may_be_one_per_sample() -> None:
    first, second = random_game(4, 1), random_game(4, 2)
    both = {s: torch.stack([first[s], second[s]]) for s in first}
    found = games.values(both, 4)
    assert torch.allclose(found, torch.stack([games.values(first, 4), games.values(second, 4)], 1), atol=1e-14)
    sampled = games.sampled_values(both, games.antithetic_orders(4, 3, 0))
    assert sampled.shape == (3, 4, 2)
