"""Bits go where they are needed: against trying every assignment, and on a weight that was made vital."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from layerwise.compress.gptq import Gptq
from layerwise.compress.mixed_precision import MixedPrecision
from layerwise.data import Batch, Data
from layerwise.errors import UsageError
from layerwise.lowbit.candidates import candidates
from layerwise.lowbit.effects import effect_products
from layerwise.lowbit.grid import Grid
from layerwise.lowbit.mixing import PROBE, Knapsack, best_bits, cross_validated, divergence, lost, stored
from layerwise.lowbit.rounding import chosen
from layerwise.lowbit.weighing import FOLDS
from layerwise.matrices import Matrix
from layerwise.method import apply_plan, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.supplies import Supplies
from layerwise.tensors import dense
from tests.models import ResidualNet

GRID, MENU = Grid(8, 32), (2, 3, 4, 6)


def weights(count: int = 4) -> dict[str, Matrix]:
    g, owner = torch.Generator().manual_seed(0), nn.Identity()
    return {f"w{i}": Matrix(f"w{i}", owner, torch.randn(8 * (i + 1), 32, generator=g)) for i in range(count)}


@pytest.mark.parametrize("bits", [3, 3.5, 4])
def test_no_assignment_of_all_does_less_damage(bits: float) -> None:
    found, damages = weights(), {"w0": 0.3, "w1": 0.001, "w2": 0.1, "w3": 0.02}
    limit = sum(stored(m, bits, GRID) for m in found.values())

    def total(choice: dict[str, int]) -> float:
        parts = ((n, Grid(b, 32)) for n, b in choice.items())
        return sum(damages[n] * lost(found[n], g) / lost(found[n], Grid(PROBE, 32)) for n, g in parts)

    every = (dict(zip(found, bits, strict=True)) for bits in itertools.product(MENU, repeat=len(found)))
    fitting = [c for c in every if sum(stored(found[n], b, GRID) for n, b in c.items()) <= limit]
    best = best_bits(found, damages, MENU, GRID, limit)
    assert best in fitting
    assert total(best) == pytest.approx(min(map(total, fitting)), rel=1e-6)


def test_too_few_bytes_are_refused() -> None:
    with pytest.raises(UsageError, match="too few"):
        best_bits(weights(), dict.fromkeys(weights(), 1.0), MENU, GRID, 10.0)


def subject() -> tuple[UniversalModel, Supplies]:
    """The second block's weights matter much, the third's not at all."""
    torch.manual_seed(0)
    net = ResidualNet(depth=4, width=32).eval()
    with torch.no_grad():
        net.blocks[1].down.weight.mul_(8)  # type: ignore[union-attr, operator]
        net.blocks[2].down.weight.zero_()  # type: ignore[union-attr, operator]
        net.blocks[2].down.weight[:, 0] = 1e-3  # type: ignore[union-attr, index]
    data = Data.of([Batch((torch.randn(32, 32, generator=torch.Generator().manual_seed(1)),))])
    return UniversalModel(net, example=data[0]), Supplies(calibration=data)


def test_vital_weights_get_more_bits_and_the_model_is_left_as_it_was() -> None:
    model, supplies = subject()
    names, before = [f"blocks.{i}" for i in range(4)], model.fingerprint
    method = MixedPrecision(bits=4, menu=(2, 4, 8)).fitted(model, names, supplies)
    assert model.fingerprint == before
    bits = method.chosen
    assert bits["blocks.1.up.weight"] == max(bits.values()) > 4
    assert bits["blocks.2.up.weight"] == min(bits.values()) == 2
    assert method.measured["divergence"] < method.measured["uniform"]


def test_it_does_less_damage_than_uniform_bits_in_as_many_bytes() -> None:
    model, supplies = subject()
    names, batch = [f"blocks.{i}" for i in range(4)], Batch((torch.randn(50, 32),))
    off = []
    for menu in ((2, 3, 4, 5, 6, 8), (4,)):
        method = MixedPrecision(bits=4, menu=menu, corrected=False)
        after = apply_plan(model, CompressionPlan((step_of(method, names),)), supplies)
        off.append(float((after.model.predict(batch) - model.predict(batch)).square().mean()))
    assert off[0] < 0.6 * off[1]


def test_scores_of_layers_can_take_the_place_of_measuring() -> None:
    model, supplies = subject()
    names = [f"blocks.{i}" for i in range(4)]
    scores = {name: 100.0 if name == "blocks.3" else 0.01 for name in names}
    bits = MixedPrecision(bits=4, scores=scores).fitted(model, names, supplies).chosen
    assert min(bits["blocks.3.up.weight"], bits["blocks.3.down.weight"]) > max(
        bits["blocks.0.up.weight"], bits["blocks.1.up.weight"]
    )
    with pytest.raises(UsageError, match="no score"):
        MixedPrecision(scores={"blocks.3": 1.0}).fitted(model, names, supplies)


def test_a_vital_weight_in_two_bits_and_a_byte_too_many_are_found() -> None:
    model, supplies = subject()
    names = ["blocks.0", "blocks.1"]
    method = MixedPrecision(bits=4, corrected=False).fitted(model, names, supplies)
    after = apply_plan(model, CompressionPlan((step_of(method, names),)), supplies).model
    assert method.check(model, after, names).passed
    more = MixedPrecision(bits=4, corrected=False, chosen=dict.fromkeys(method.chosen, 5))
    assert "bytes" in more.check(model, after, names).detail
    other = MixedPrecision(bits=4, corrected=False, chosen=dict.fromkeys(method.chosen, 4))
    assert not other.check(model, after, names).passed
    assert dense(after.module.blocks[0].up.weight).isfinite().all()  # type: ignore[index, union-attr]


def weighed(model: UniversalModel, data: Data) -> tuple[list[tuple[str, int]], np.ndarray]:
    """The keys and the sum of the folds' products, around the model rounded to 6 bits."""
    names = [f"blocks.{i}" for i in range(4)]
    stage, found = candidates(model, names, lambda m: chosen(m, names, Grid(6, 32)), (5, 6, 7), None)
    keys, folds = effect_products(stage, found, data, FOLDS)
    return keys, sum(folds[1:], start=folds[0])


@pytest.mark.parametrize("classes", [3, 32])
def test_the_products_foretell_the_divergence_of_every_combination(classes: int) -> None:
    """Against the divergence in float64 of the model with these roundings: exactly three classes, in expectation many."""
    model, supplies = subject()
    assert supplies.calibration is not None
    with torch.no_grad():
        model.module.head = nn.Linear(32, classes)  # type: ignore[assignment]
    model = UniversalModel(model.module, example=supplies.calibration[0])
    keys, products = weighed(model, supplies.calibration)
    wanted = model.predict(supplies.calibration[0]).double().log_softmax(-1)
    for choice in ((5,) * 8, (7, 6) * 4, (5, 7, 7, 5) * 2):
        bits = dict(zip(dict.fromkeys(name for name, _ in keys), choice, strict=True))
        copy = model.clone()
        with torch.no_grad():
            for name, b in bits.items():
                weight = copy.module.get_parameter(name)
                grid = Grid(b, 32)
                levels = grid.levels(weight)
                weight.copy_(grid.values(grid.codes(weight, levels), levels))
        found = copy.predict(supplies.calibration[0]).double().log_softmax(-1)
        measured = float((wanted.exp() * (wanted - found)).sum())
        foretold = divergence(np.array([keys.index(k) for k in bits.items()]), products)
        assert foretold == pytest.approx(measured, rel=0.1 if classes == 3 else 0.5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_trading_finds_what_trying_every_assignment_does(seed: int) -> None:
    """With effects that share a direction and a sign by weight, so that they add up or cancel, which no sum over weights sees."""
    g = np.random.default_rng(seed)
    keys = [(f"w{i}", bits) for i in range(5) for bits in (3, 4, 5)]
    shared = g.normal(size=(40, 15)) / 2, g.normal(size=(40, 1)) * np.repeat(g.choice([-1.0, 1.0], 5), 3)
    effects = sum(shared) * np.tile([2.0, 1.0, 0.5], 5)
    products, sizes = effects.T @ effects, np.array([float(bits) for _, bits in keys])
    knapsack, uniform = Knapsack(keys, sizes, 20.0), np.arange(1, 15, 3)
    every = [np.array(c) + np.arange(0, 15, 3) for c in itertools.product(range(3), repeat=5)]
    least = min(divergence(c, products) for c in every if sizes[c].sum() <= 20)
    found = knapsack.best(uniform, products, 1.0)
    assert sizes[found].sum() <= 20
    assert divergence(found, products) == pytest.approx(least)
    alone = knapsack.least_sum(products.diagonal().copy())
    assert alone is not None
    assert divergence(alone, products) > 1.4 * least


def test_what_only_cancels_by_chance_is_not_taken() -> None:
    """Bits that do the same damage, seen on too few samples: whatever looks better there is not so on others."""
    g = np.random.default_rng(1)
    keys = [(f"w{i}", bits) for i in range(12) for bits in (3, 4, 5)]
    knapsack = Knapsack(keys, np.array([float(bits) for _, bits in keys]), 48.0)
    folds = [e.T @ e for e in g.normal(size=(4, 2, 36))]
    uniform = np.arange(1, 36, 3)
    whole = sum(folds[1:], start=folds[0])
    assert divergence(knapsack.best(uniform, whole, 1.0), whole) < 0.3 * divergence(uniform, whole)
    assert not [ratio for ratio, _ in cross_validated(knapsack, uniform, folds) if ratio < 0.5]


def test_uniform_bits_are_kept_and_said_so_where_nothing_is_better() -> None:
    model, supplies = subject()
    with torch.no_grad():
        model.module.head.weight.zero_()  # type: ignore[union-attr, operator]
    result = apply_plan(model, CompressionPlan((step_of(MixedPrecision(bits=4), ["blocks.0"]),)), supplies)
    assert {*result.plan.steps[0].settings["chosen"].values()} == {4}
    assert result.remarks[0].startswith("mixed_precision keeps 4 bits in blocks.0: ")
    uniform = apply_plan(model, CompressionPlan((step_of(Gptq(4, samples=128), ["blocks.0"]),)), supplies)
    assert result.model.fingerprint == uniform.model.fingerprint
