"""The arithmetic of cooperative games: players 0 … n−1, and a worth for every coalition (a frozenset of players).

A game is a mapping coalition → worth, where the worth is a float64 tensor of any shape (one value, or one per sample). Everything
here is linear in the worths, so that an index of the mean game is the mean of the samples' indices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

Coalition = frozenset[int]
Game = Mapping[Coalition, Tensor]
INDICES = ("shapley", "banzhaf")


def coalitions(players: int, missing: int) -> list[Coalition]:
    """Every coalition that lacks at most `missing` players, largest first."""
    sizes = range(players, players - min(missing, players) - 1, -1)
    return [frozenset(c) for size in sizes for c in itertools.combinations(range(players), size)]


def coalition_count(players: int, missing: int) -> int:
    """How many `coalitions` there are."""
    return sum(math.comb(players, n) for n in range(min(missing, players) + 1))


def marginal_weights(players: int, index: str, missing: int) -> list[float]:
    """Entry s: the weight of v(S + player) − v(S) for each coalition S of s others; over all S they sum to 1.

    ``shapley``: every size counts the same; ``banzhaf``: every coalition does. Sizes below players − `missing` count nothing.
    """
    sizes = range(max(players - missing, 0), players)
    others = [math.comb(players - 1, s) for s in range(players)]
    if index == "shapley":
        return [1 / (len(sizes) * others[s]) if s in sizes else 0.0 for s in range(players)]
    return [1 / sum(others[t] for t in sizes) if s in sizes else 0.0 for s in range(players)]


def values(game: Game, players: int, index: str = "shapley", missing: int | None = None) -> Tensor:
    """The index of every player, (players, *worth), from the worths of all `coalitions`."""
    missing = players if missing is None else missing
    known = coalitions(players, missing)
    weights = [*marginal_weights(players, index, missing), 0.0]
    rows = [
        [weights[len(s) - 1] if player in s else -weights[len(s)] for s in known]  # as S + player, or as S
        for player in range(players)
    ]
    worths = torch.stack([game[s] for s in known])
    factors = torch.tensor(rows, dtype=torch.float64, device=worths.device)
    return (factors @ worths.reshape(len(known), -1)).reshape(players, *worths.shape[1:])


def antithetic_orders(players: int, pairs: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """`pairs` random orders, each with its reverse: what joins early in one joins late in the other."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(players, generator=generator).tolist() for _ in range(pairs)]
    return [(order, order[::-1]) for order in drawn]


def coalitions_along(order: list[int]) -> list[Coalition]:
    """The coalitions that grow in this order, from none to all."""
    return [frozenset(order[:size]) for size in range(len(order) + 1)]


def sampled_values(game: Game, orders: list[tuple[list[int], list[int]]]) -> Tensor:
    """The Shapley value of every player estimated by each pair of orders, (pairs, players, *worth)."""
    return torch.stack([(_joining(game, order) + _joining(game, reverse)) / 2 for order, reverse in orders])


def _joining(game: Game, order: list[int]) -> Tensor:
    """What each player adds on joining, (players, *worth)."""
    worths = torch.stack([game[s] for s in coalitions_along(order)])
    return worths.diff(dim=0)[torch.tensor(order).argsort()]


def interactions(game: Game, players: int) -> dict[tuple[int, int], Tensor]:
    """The Shapley interaction index of every pair (Grabisch & Roubens 1999): worth that only comes when both are there.

    The mean over coalitions S without the pair of v(S + a + b) − v(S + a) − v(S + b) + v(S), every size of S weighing the same.
    """
    found = {}
    for a, b in itertools.combinations(range(players), 2):
        others = [p for p in range(players) if p not in (a, b)]
        total = torch.zeros_like(game[frozenset()])
        for size in range(len(others) + 1):
            for rest in map(frozenset, itertools.combinations(others, size)):
                joint = game[rest | {a, b}] - game[rest | {a}] - game[rest | {b}] + game[rest]
                total = total + joint / ((players - 1) * math.comb(players - 2, size))
        found[a, b] = total
    return found
