"""The conversion as a step of a plan: chosen once, replayed without data, and judged against the dense model projected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from layerwise.compress.tva_conversion import TVAConversion
from layerwise.errors import UsageError
from layerwise.method import Applied, apply_plan, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.proofs import judged, relative_error
from layerwise.result import Proof
from layerwise.saved import load_saved, save_model
from layerwise.supplies import Supplies
from tests.models import CASES


def model_of(family: str) -> UniversalModel:
    """Weights as large as trained ones, so that attention is not the mean."""
    model = CASES[family].model()
    with torch.no_grad():
        for name, p in model.module.named_parameters():
            if p.dim() == 2 and "embed" not in name and "wte" not in name:
                p.mul_(6)
            elif p.dim() == 1 and "norm" not in name.lower() and "ln" not in name:
                p.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
    return model


def supplies(family: str) -> Supplies:
    return Supplies(calibration=CASES[family].data(6, 4))


def converted(model: UniversalModel, method: TVAConversion, family: str, *layers: str) -> Applied:
    names = layers or tuple(layer.name for layer in model.layers)
    return apply_plan(model, CompressionPlan((step_of(method, names),)), supplies(family))


def proof(model: UniversalModel, result: Applied, family: str) -> Proof:
    return judged(model, result.model, result.plan.steps[0], list(CASES[family].data(3, 2)), supplies(family))


def test_the_plan_names_every_rank_and_needs_no_data_afterwards(tmp_path: Path) -> None:
    model = model_of("llama")
    result = converted(model, TVAConversion(rank=4), "llama", "model.layers.1")
    settings = result.plan.steps[0].settings
    assert settings["heads"] == {"model.layers.1.self_attn": 4}
    assert settings["matrices"] == {f"model.layers.1.mlp.{n}_proj": 16 for n in ("gate", "up", "down")}
    save_model(result.model, tmp_path / "model")
    again = load_saved(tmp_path / "model", module=CASES["llama"].model().module)
    assert again.fingerprint == result.model.fingerprint
    assert torch.equal(again.predict(CASES["llama"].batch(3)), result.model.predict(CASES["llama"].batch(3)))
    assert proof(model, result, "llama").passed


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_heads_that_need_all_their_numbers_stay(family: str) -> None:
    model = model_of(family)
    with pytest.raises(UsageError, match="nothing would shrink"):
        converted(model, TVAConversion(energy=1.0), family)
    result = converted(model, TVAConversion(rank=4, feed_forward=False), family)
    assert proof(model, result, family).passed
    assert relative_error(result.model.predict(CASES[family].batch(3)), model.predict(CASES[family].batch(3))) > 1e-3


def attention(result: Applied) -> Any:
    (path,) = result.plan.steps[0].settings["heads"]
    found: Any = result.model.module.get_submodule(path)
    return found


def both_louder(a: Any) -> None:
    """Queries and keys twice as long: the directions are the same, and no longer orthonormal."""
    for module in (a.query, a.key):
        module.weight.mul_(2)
        module.bias.mul_(2)


def value_bias(a: Any) -> None:
    a.value.bias.add_(0.1)


def heads_swapped(a: Any) -> None:
    a.query.weight[:] = a.query.weight.roll(4, 0)


@pytest.mark.parametrize("fault", [both_louder, value_bias, heads_swapped])
def test_a_slip_is_found(fault: Callable[[Any], None]) -> None:
    model = model_of("bert")
    layer = model.layers[1].name
    result = converted(model, TVAConversion(rank=4, feed_forward=False), "bert", layer)
    with torch.no_grad():
        fault(attention(result))
    assert proof(model, result, "bert").passed is False


def test_directions_that_are_not_the_best_are_found() -> None:
    model = model_of("bert")
    layer = model.layers[1].name
    result = converted(model, TVAConversion(rank=4, feed_forward=False), "bert", layer)
    dense, thin = model.module.get_submodule(f"{layer}.attention.self"), attention(result)
    with torch.no_grad():  # of each head of 8 the first four features
        for name in ("query", "key"):
            old, new = getattr(dense, name), getattr(thin, name)
            new.weight.copy_(old.weight.unflatten(0, (4, 8))[:, :4].flatten(0, 1))
            new.bias.copy_(old.bias.unflatten(0, (4, 8))[:, :4].flatten())
    found = proof(model, result, "bert")
    assert found.passed is False
    assert "lost beyond the least" in found.detail


def test_what_it_cannot_read_it_refuses() -> None:
    model = CASES["t5"].model()
    assert "no attention of a known form" in TVAConversion().treats(model.layers[0])
    assert "16-bit" in TVAConversion().treats(
        UniversalModel(CASES["bert"].build().half(), example=CASES["bert"].batch(2)).blocks[0]
    )
    with pytest.raises(UsageError, match="energy"):
        TVAConversion(energy=0.0)
    with pytest.raises(UsageError, match="needs calibration data"):
        apply_plan(CASES["bert"].model(), CompressionPlan((step_of(TVAConversion(), ["bert.encoder.layer.0"]),)))
