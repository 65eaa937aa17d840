"""Changed blocks beside the model: what they share with it, what it costs, and what they compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from layerwise.compress.drop_layers import DropLayers
from layerwise.compress.magnitude_pruning import MagnitudePruning
from layerwise.errors import UsageError
from layerwise.method import CompressionMethod, apply_plan, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.planning.blocks import build, build_each, installed, shell
from layerwise.planning.effects import Meter
from layerwise.structure import Layer
from layerwise.supplies import NOTHING, Supplies
from layerwise.task import Classification
from layerwise.tensors import byte_size, distinct
from tests.models import CASES

FAMILIES = ("residual", "bert", "gpt2", "vit", "albert")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shell_owns_the_tensors_of_its_layers_only(family: str) -> None:
    model = CASES[family].model()
    copied = shell(model, [model.layers[0].name])
    inside = {name for name, _ in distinct(model.module) if name.startswith(model.layers[0].name + ".")}
    theirs = dict(distinct(copied.module))
    for name, tensor in distinct(model.module):
        assert (theirs[name] is tensor) == (name not in inside), name
    assert [x.name for x in copied.layers] == [x.name for x in model.layers]


@pytest.mark.parametrize("method", [DropLayers(), MagnitudePruning(0.5)], ids=lambda m: m.name)
@pytest.mark.parametrize("family", ["residual", "bert", "gpt2", "vit"])
def test_blocks_in_place_compute_what_the_plan_carried_out_does(family: str, method: CompressionMethod) -> None:
    case = CASES[family]
    model = case.model()
    fingerprint, names = model.fingerprint, [x.name for x in model.layers[1:3] if not method.treats(x)]
    wanted = apply_plan(model, CompressionPlan((step_of(method, names),))).model.predict(case.batch(3))
    with installed(model, build(model, [method], names)):
        found = model.predict(case.batch(3))
    assert torch.equal(found, wanted)
    assert not torch.equal(model.predict(case.batch(3)), wanted)
    assert model.fingerprint == fingerprint


@dataclass(frozen=True)
class Careless(CompressionMethod):
    """Writes into the head, and fails on the third block."""

    where: str = "head.weight"
    name: ClassVar[str] = "careless"

    def treats(self, layer: Layer) -> str:
        return ""

    def apply_(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies = NOTHING) -> None:
        if self.where:
            model.module.get_parameter(self.where).data.add_(0)
            torch.Tensor.add_(model.module.get_parameter(self.where).detach(), 0)
        if "blocks.2" in layers:
            raise UsageError("not this one")

    def reshape_(self, model: UniversalModel, layers: Sequence[str]) -> None:
        pass


def test_a_method_that_writes_elsewhere_is_refused_and_one_that_fails_is_tried_layer_by_layer() -> None:
    model = CASES["residual"].model()
    with pytest.raises(UsageError, match=r"LW-C16 careless wrote into head\.weight"):
        build(model, [Careless()], ["blocks.0"])
    built, failed = build_each(model, [Careless("")], ["blocks.1", "blocks.2", "blocks.3"])
    assert list(built) == ["blocks.1", "blocks.3"]
    assert failed == {"blocks.2": "not this one"}


def test_effects_on_top_of_changed_blocks_are_those_of_the_whole_and_only_what_follows_runs() -> None:
    """Fails where a run starts too early (the count) or answers a changed block from the cache (the damage)."""
    case = CASES["residual"]
    model, data = case.model(Classification()), case.data(5, 3)
    meter = Meter(model, data)
    base = build(model, [MagnitudePruning(0.7)], ["blocks.1"])
    more = build(model, [DropLayers()], ["blocks.2"])
    effects = meter.effects(base, [{}, more])
    assert meter.spent == pytest.approx(2 + 2 / 4)  # the reference, the base, and blocks 2 and 3
    for effect, blocks in zip(effects, (base, base | more), strict=True):
        damage, weight = 0.0, 0
        for batch in data:
            with torch.no_grad():
                p = model.predict(batch).double().log_softmax(-1)
                with installed(model, blocks):
                    q = model.predict(batch).double().log_softmax(-1)
            damage += float((p.exp() * (p - q)).sum())
            weight += batch.size
        assert effect.damage == pytest.approx(damage / weight, rel=1e-6)
        assert "accuracy" in effect.figures
    assert meter.effects({}, [{}])[0].damage == 0.0
    assert byte_size(base["blocks.1"]) == byte_size(model.layer("blocks.1").module)
