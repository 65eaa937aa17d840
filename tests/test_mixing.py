"""Bits go where they are needed: against trying every assignment, and on a weight that was made vital."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from layerwise.compress.mixed_precision import MixedPrecision
from layerwise.data import Batch, Data
from layerwise.errors import UsageError
from layerwise.lowbit.grid import Grid
from layerwise.lowbit.mixing import PROBE, best_bits, lost, measured_damages, stored
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
    chosen = best_bits(found, damages, MENU, GRID, limit)
    assert chosen in fitting
    assert total(chosen) == pytest.approx(min(map(total, fitting)), rel=1e-6)


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


def test_the_damage_is_that_of_one_weight_alone() -> None:
    model, supplies = subject()
    up = model.module.blocks[1].up  # type: ignore[index, union-attr]
    m = Matrix("blocks.1.up.weight", up, up.weight)
    assert supplies.calibration is not None
    (found,) = measured_damages(model, {"x": m}, Grid(8, 32), supplies.calibration).values()
    batch = supplies.calibration[0]
    before = model.predict(batch).double().log_softmax(-1)
    copy = model.clone()
    grid = Grid(PROBE, 32)
    levels = grid.levels(up.weight)
    copy.module.blocks[1].up.weight.data = grid.values(grid.codes(up.weight, levels), levels)  # type: ignore[index, union-attr]
    after = copy.predict(batch).double().log_softmax(-1)
    assert found == pytest.approx(float((before.exp() * (before - after)).sum(-1).mean()), rel=1e-6)
