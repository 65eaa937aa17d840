"""GPTQ in whole models: better than rounding on data, in the same bytes; wrong codes are found by the errors that they make."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from layerwise.compress.gptq import Gptq
from layerwise.compress.weight_only import WeightOnly
from layerwise.data import Batch, Data
from layerwise.errors import UsageError
from layerwise.hessians import hessians, rows_read
from layerwise.lowbit.packed import PackedWeight, place_
from layerwise.matrices import matrices
from layerwise.method import apply_plan, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.supplies import Supplies
from layerwise.tensors import byte_size
from tests.models import CASES, ResidualNet

METHOD = Gptq(bits=3, group=16)


def correlated(samples: int, width: int = 32) -> Data:
    g = torch.Generator().manual_seed(samples)
    mix = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
    return Data.of([torch.randn(samples, 4, generator=g) @ mix + 0.1 * torch.randn(samples, width, generator=g)])


def subject() -> tuple[UniversalModel, list[str]]:
    torch.manual_seed(0)
    model = UniversalModel(ResidualNet(depth=3, width=32).eval(), example=correlated(2)[0])
    return model, ["blocks.0", "blocks.1", "blocks.2"]


def applied(method: Gptq | WeightOnly) -> tuple[UniversalModel, UniversalModel]:
    model, names = subject()
    return model, apply_plan(model, CompressionPlan((step_of(method, names),)), Supplies(calibration=correlated(64))).model


def test_unseen_outputs_are_nearer_than_rounded_ones_in_the_same_bytes() -> None:
    model, ours = applied(METHOD)
    _, plain = applied(WeightOnly(bits=3, group=16))
    batch = correlated(50)[0]
    off = [float((m.predict(batch) - model.predict(batch)).square().mean()) for m in (ours, plain)]
    assert off[0] < 0.5 * off[1]
    assert byte_size(ours.module) == byte_size(plain.module)


def uncorrected_order(good: PackedWeight, grid_rows: Tensor) -> PackedWeight:
    return PackedWeight.of(good.unpacked().flip(1), good.levels(), good.grid, good)


def swapped_scales(good: PackedWeight, grid_rows: Tensor) -> PackedWeight:
    bad = good.clone()
    bad.scale[[0, 1]] = good.scale[[1, 0]]
    return bad


def one_code_off(good: PackedWeight, grid_rows: Tensor) -> PackedWeight:
    codes = good.unpacked()
    codes[:] = (codes.int() + 1).clamp_max(7).byte()
    return PackedWeight.of(codes, good.levels(), good.grid, good)


def zero_off(good: PackedWeight, grid_rows: Tensor) -> PackedWeight:
    bad = good.clone()
    assert bad.zeros is not None
    bad.zeros[0, 0] ^= 1
    return bad


@pytest.mark.parametrize("fault", [uncorrected_order, swapped_scales, one_code_off, zero_off])
def test_a_wrong_correction_is_found(fault) -> None:  # type: ignore[no-untyped-def]  # one of the four above
    model, after = applied(METHOD)
    names, supplies = ["blocks.0", "blocks.1", "blocks.2"], Supplies(calibration=correlated(64))
    assert METHOD.check_on(model, after, names, supplies).passed
    good = after.module.blocks[1].up.weight  # type: ignore[index, union-attr]
    place_(after.module, good, fault(good, good))
    check = METHOD.check_on(model, after, names, supplies)
    assert not check.passed
    assert check.place == "blocks.1.up.weight"


def test_later_layers_see_what_rounded_ones_give() -> None:
    """The first layer alone, then the second alone with the first rounded, is the same as both in one step."""
    model, names = subject()
    supplies = Supplies(calibration=correlated(64))
    steps = tuple(step_of(METHOD, [name]) for name in names)
    one_by_one = apply_plan(model, CompressionPlan(steps), supplies).model
    at_once = apply_plan(model, CompressionPlan((step_of(METHOD, names[::-1]),)), supplies).model
    assert one_by_one.fingerprint == at_once.fingerprint


def test_padding_does_not_count_and_the_rest_does_not_run() -> None:
    model = CASES["bert"].model()
    layer = model.layers[0]
    chosen = {m.name: m for m in matrices(layer.module)}
    batch = CASES["bert"].batch(4)
    ran: list[str] = []
    handle = model.layers[1].module.register_forward_hook(lambda *_: ran.append("later"))
    found = hessians(model, layer.name, chosen, [batch])
    handle.remove()
    assert not ran
    with model.capture([layer.name]) as seen:
        model.predict(batch)
    rows = seen[layer.name][0][batch.kwargs["attention_mask"].bool()].double()
    torch.testing.assert_close(found["attention.self.query.weight"], rows.T @ rows, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": (2, 0)}])
def test_a_convolution_reads_its_patches(settings: dict[str, int]) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(3, 5, 3, bias=False, **settings), torch.randn(2, 3, 9, 8)  # type: ignore[arg-type]
    found = rows_read(conv, x, Batch((x,))) @ conv.weight.flatten(1).T
    torch.testing.assert_close(found, conv(x).flatten(2).transpose(1, 2).flatten(0, 1))


def test_without_calibration_data_it_says_so() -> None:
    model, names = subject()
    with pytest.raises(UsageError, match="calibration"):
        apply_plan(model, CompressionPlan((step_of(METHOD, names),)))
    with pytest.raises(UsageError, match="damping"):
        replace(METHOD, damping=0.0)
