"""What every registered compression method keeps, on one model of each family."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from layerwise.errors import UsageError
from layerwise.method import METHODS, Applied, CompressionMethod, apply_plan, step_of, untreated
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.proofs import equivalence, relative_error
from layerwise.saved import load_saved, save_model
from layerwise.supplies import Supplies
from layerwise.tensors import flattened, state
from tests.models import CASES, timm_model

METHOD_VARIANTS = {f"{name}-{i}": m for name, cls in METHODS.items() for i, m in enumerate(cls.variants()[:2])}
METHOD_VARIANTS["magnitude_pruning-global"] = METHODS["magnitude_pruning"](scope="global")  # type: ignore[call-arg]
# the widths of a resnet18 would make these tests five times as long and show nothing more
SMALL = {"resnet": replace(CASES["resnet"], build=timm_model("resnet18", channels=(8, 8, 16, 16)))}
FAMILIES = {
    name: SMALL.get(name, CASES[name]) for name in ("vit", "resnet", "bert", "gpt2", "llama", "t5", "residual", "sequential")
}

FEW = ("bert", "resnet", "residual")
# they treat what weight_only or int8_dynamic do, which meet every family
FOLLOWING = {"gptq", "mixed_precision", "int8_static", "half_weights", "half_embeddings"}
# the first settings meet every family, others one; so does what trains, which is no matter of the architecture
PAIRS = [
    pytest.param(method, family, id=f"{label}-{family}")
    for label, method in METHOD_VARIANTS.items()
    for family in (["residual"] if not label.endswith("-0") or method.trains else FEW if method.name in FOLLOWING else FAMILIES)
]
NEAR = {"half_precision", "int8_dynamic", "int8_static"}  # those that promise outputs near those of before, whatever the weights

pytestmark = pytest.mark.parametrize(("method", "family"), PAIRS)


def chosen(method: CompressionMethod, model: UniversalModel) -> list[str]:
    """All layers it treats, or the last two of them where choosing is the point."""
    refused = untreated(method, model, [layer.name for layer in model.layers])
    names = [layer.name for layer in model.layers if layer.name not in refused]
    return names[-2:] if method.selective else names


def compressed(method: CompressionMethod, model: UniversalModel, family: str) -> Applied:
    names = chosen(method, model)
    if not names:
        assert all(untreated(method, model, [layer.name for layer in model.layers]).values())
        pytest.skip(f"{method.name} treats no layer here, and says why")
    return apply_plan(model, CompressionPlan((step_of(method, names),)), supplies(family))


def supplies(family: str) -> Supplies:
    data = FAMILIES[family].data(4, 2)
    return Supplies(calibration=data, training=data, validation=data)


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Fails if weights, flags, hooks, gradients or the random state are other afterwards."""

    def seen() -> dict[str, object]:
        return {
            "weights": {k: (v.data_ptr(), v._version) for k, v in state(module).items()},
            "flags": [m.training for m in module.modules()],
            "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in module.modules()],
            "types": [type(m) for m in module.modules()],
            "grads": [(p.grad is None, p.requires_grad) for p in module.parameters()],
            "random": torch.random.get_rng_state().tolist(),
        }

    before = seen()
    yield
    assert seen() == before


def test_the_original_is_left_alone(method: CompressionMethod, family: str) -> None:
    model = FAMILIES[family].model()
    next(m for m in model.module.modules() if not list(m.children())).train()  # a flag of one module alone
    fingerprint = model.fingerprint
    with untouched(model.module):
        compressed(method, model, family)
    assert model.fingerprint == fingerprint


def test_names_survive(method: CompressionMethod, family: str) -> None:
    model = FAMILIES[family].model()
    result = compressed(method, model, family)
    inside = tuple(f"{layer}." for layer in result.plan.steps[0].layers) if method.structural else ()
    for names in (state, lambda m: dict(m.named_modules())):
        before, after = ([n for n in names(m.module) if not n.startswith(inside)] for m in (model, result.model))
        assert before == after


def test_it_computes_what_it_says(method: CompressionMethod, family: str) -> None:
    model, data = FAMILIES[family].model(), FAMILIES[family].data(3, 2)
    result = compressed(method, model, family)
    (proof,) = equivalence(model, result.model, result.plan, list(data), supplies(family))
    assert proof.passed, proof
    wanted = "kept_structure" if method.trains else "masked_equivalence" if method.structural else "expected_values"
    assert proof.name == wanted


def test_a_changed_weight_is_found(method: CompressionMethod, family: str) -> None:
    if method.trains:
        pytest.skip("what is learned cannot be foretold")
    model, data = FAMILIES[family].model(), FAMILIES[family].data(3, 2)
    result = compressed(method, model, family)
    left = [x for x in result.model.layers if x.name not in result.plan.steps[0].layers or not method.structural]
    layer = (left or result.model.layers)[0]
    name, weight = max(flattened_weights(layer.module).items(), key=lambda item: item[1].numel())
    with torch.no_grad():
        weight.view(-1)[:] = weight.view(-1).roll(1)
    (proof,) = equivalence(model, result.model, result.plan, list(data), supplies(family))
    assert proof.passed is False, (layer.name, name)
    assert not proof.measured <= proof.bound
    assert proof.layer.startswith(layer.name)


def flattened_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    plain = {k: t for name, p in module.named_parameters() if p.dim() > 1 for k, t in flattened(name, p).items()}
    return {k: t for k, t in plain.items() if t.numel() > 8 and t.unique().numel() > 1}


def test_twice_is_refused_or_changes_nothing(method: CompressionMethod, family: str) -> None:
    model = FAMILIES[family].model()
    once = compressed(method, model, family)
    step = once.plan.steps[0]
    plan = CompressionPlan((step, step))
    try:
        twice = apply_plan(model, plan, supplies(family)).model
    except UsageError:
        with pytest.raises(UsageError, match=r"already|has no layer"):
            apply_plan(model, plan, supplies(family))
    else:
        assert method.trains or twice.fingerprint == once.model.fingerprint


def test_saved_and_loaded_it_gives_equal_outputs(method: CompressionMethod, family: str, tmp_path: Path) -> None:
    case = FAMILIES[family]
    model = case.model()
    result = compressed(method, model, family)
    save_model(result.model, tmp_path / "model")
    torch.manual_seed(99)
    other = case.build()  # the class with other weights
    again = load_saved(tmp_path / "model", module=other)
    assert torch.equal(again.predict(case.batch(3)), result.model.predict(case.batch(3)))
    assert again.fingerprint == result.model.fingerprint


def test_what_it_refuses_it_refuses_with_the_reason(method: CompressionMethod, family: str) -> None:
    model = FAMILIES[family].model()
    refused = untreated(method, model, [layer.name for layer in model.layers])
    for name, reason in refused.items():
        assert len(reason) > 10
        with pytest.raises(UsageError, match="cannot treat") as caught:
            apply_plan(model, CompressionPlan((step_of(method, [name]),)), supplies(family))
        assert reason in str(caught.value)


def test_outputs_stay_in_float32_and_near(method: CompressionMethod, family: str) -> None:
    model, batch = FAMILIES[family].model(), FAMILIES[family].batch(3)
    result = compressed(method, model, family)
    output = result.model.predict(batch)
    assert output.dtype == torch.float32
    assert output.isfinite().all()
    if method.name in NEAR:  # pruning and dropping may move random weights as far as they like
        assert relative_error(output, model.predict(batch)) < 0.1
