"""Velocities of streams are those of central differences, and nothing of the forward mode stays behind."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from layerwise.counts import Counts
from layerwise.data import Batch
from layerwise.errors import UserModelError
from layerwise.model import UniversalModel
from layerwise.tangents import forward_mode, moving, velocity
from layerwise.walk import Walk
from tests.models import CASES


def walk_in_double(name: str) -> Walk:
    case = CASES[name]
    batch = case.batch(2).map(lambda t: t.double() if t.is_floating_point() else t)
    model = UniversalModel(case.model().module.double(), example=batch)
    return Walk(model, batch, 0, torch.arange(2), Counts())


@pytest.mark.parametrize("name", ["residual", "vit"])
def test_velocities_are_those_of_central_differences(name: str) -> None:
    walk = walk_in_double(name)
    x, step = walk.batch.args[0], 1e-5

    def at(shift: float) -> Batch:
        return Batch((x * (0.5 + shift),), {}, walk.batch.labels)

    with forward_mode():
        seen = walk.forward(Batch((moving(0.5 * x, x),), {}, walk.batch.labels), keep=velocity)
    above, below = walk.forward(at(step)), walk.forward(at(-step))
    for layer in walk.model.layers:
        for found, up, down in zip(
            *((s.entering[layer.index], s.leaving[layer.index]) for s in (seen, above, below)), strict=True
        ):
            assert found is not None
            assert up is not None
            assert down is not None
            torch.testing.assert_close(found, (up - down) / (2 * step), rtol=1e-6, atol=1e-8)


def test_what_does_not_move_has_no_velocity() -> None:
    with forward_mode():
        assert torch.equal(velocity(torch.ones(3)), torch.zeros(3))


def test_the_forward_mode_ends_with_an_error_too() -> None:
    with pytest.raises(UserModelError, match="LW-U73"), forward_mode():
        raise UserModelError("The forward raised.", code="LW-U73")
    with pytest.raises(RuntimeError, match="no level exists"):
        forward_ad.make_dual(torch.ones(1), torch.ones(1))
