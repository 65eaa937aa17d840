"""Carrying out plans: on a copy, step by step, with what fails undone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from layerwise.compress.drop_layers import DropLayers
from layerwise.compress.half_precision import HalfPrecision
from layerwise.compress.magnitude_pruning import MagnitudePruning
from layerwise.errors import ProofFailed, UsageError
from layerwise.method import METHODS, apply_plan, method_of, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan, Step
from layerwise.supplies import NOTHING, Supplies
from tests.models import CASES

BROKEN = "blocks.2"


def test_steps_follow_each_other_and_the_source_knows_them() -> None:
    model = CASES["residual"].model()
    plan = CompressionPlan(
        (
            step_of(DropLayers(), ["blocks.1", "blocks.3"]),
            step_of(MagnitudePruning(0.5), ["blocks.0", "blocks.2"]),
            step_of(HalfPrecision("bfloat16"), ["blocks.0", "blocks.2"]),
        )
    )
    applied = apply_plan(model, plan)
    assert applied.plan == plan
    assert [layer.name for layer in applied.model.layers] == ["blocks.0", "blocks.2"]
    assert applied.model.source is not None
    assert [s["method"] for s in applied.model.source.settings["steps"]] == [s.method for s in plan.steps]
    assert model.source is None


def test_step_and_method_are_one() -> None:
    method = MagnitudePruning(0.25, "global")
    step = step_of(method, ["a"])
    assert Step.from_dict(step.to_dict()) == step
    assert method_of(step) == method


def test_unknown_names_have_their_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'drop_layers'"):
        method_of(Step("drop_layer", ("a",)))
    with pytest.raises(UsageError, match="Did you mean 'amount'"):
        method_of(Step("magnitude_pruning", ("a",), {"amout": 0.5}))


def test_every_method_says_its_own_name() -> None:
    assert {cls.name for cls in METHODS.values()} == set(METHODS)


@pytest.fixture
def nan_at_one_layer(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """F5: pruning makes NaN of one layer."""
    fired: list[str] = []
    original = MagnitudePruning.apply_

    def apply_(self: MagnitudePruning, model: UniversalModel, layers: Sequence[str], supplies: Supplies = NOTHING) -> None:
        original(self, model, layers)
        if BROKEN in layers:
            with torch.no_grad():
                model.layer(BROKEN).module.up.weight[0, 0] = torch.nan
            fired.append(BROKEN)

    monkeypatch.setattr(MagnitudePruning, "apply_", apply_)
    return fired


def test_nan_during_compression_stops(nan_at_one_layer: list[str]) -> None:
    model = CASES["residual"].model()
    fingerprint = model.fingerprint
    plan = CompressionPlan((step_of(MagnitudePruning(), ["blocks.1", BROKEN]),))
    with pytest.raises(ProofFailed, match=r"made the tensor blocks\.2\.up\.weight not finite") as caught:
        apply_plan(model, plan)
    assert caught.value.code == "LW-V05"
    assert nan_at_one_layer == [BROKEN]
    assert model.fingerprint == fingerprint


def test_nan_during_compression_leaves_that_layer_out(nan_at_one_layer: list[str]) -> None:
    model = CASES["residual"].model()
    names = ["blocks.0", "blocks.1", BROKEN]
    applied = apply_plan(model, CompressionPlan((step_of(MagnitudePruning(), names),)), skip_failures=True)
    assert nan_at_one_layer == [BROKEN, BROKEN]  # all together, then alone
    assert applied.plan.steps == (step_of(MagnitudePruning(), names[:-1]),)
    assert list(applied.failed) == [BROKEN]
    assert "not finite" in applied.failed[BROKEN]
    weights = dict(model.module.named_parameters())
    for name, weight in applied.model.module.named_parameters():
        touched = name.startswith(("blocks.0.", "blocks.1.")) and weight.dim() > 1
        assert torch.equal(weight, weights[name]) != touched, name
