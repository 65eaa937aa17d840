"""Each proof holds for a right result, and catches the faults it is there for; every fault is shown to be one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from layerwise import proofs
from layerwise.compress.drop_layers import DropLayers
from layerwise.compress.half_precision import HalfPrecision
from layerwise.compress.int8_dynamic import Int8Dynamic
from layerwise.compress.magnitude_pruning import MagnitudePruning
from layerwise.compress.structured_pruning import StructuredPruning
from layerwise.data import Batch, Data
from layerwise.method import CompressionMethod, apply_plan, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.proofs import prove, shrinkage
from layerwise.reload_check import Reload
from layerwise.result import Measurement, Proof
from layerwise.saved import save_model
from layerwise.source import Source
from layerwise.target import Target
from layerwise.task import Classification
from tests.models import CASES, ResidualNet

ALL = ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]


def original(source: Source | None = None) -> UniversalModel:
    torch.manual_seed(0)
    return UniversalModel(ResidualNet().eval(), task=Classification(), source=source, example=CASES["residual"].batch(2))


def data() -> Data:
    return CASES["residual"].data(5, 3)


def plan(*parts: tuple[CompressionMethod, list[str]], targets: tuple[str, ...] = ()) -> CompressionPlan:
    return CompressionPlan(tuple(step_of(m, names) for m, names in parts), targets=tuple(Target.parse(t) for t in targets))


def proved(model: UniversalModel, result: UniversalModel, steps: CompressionPlan, **options: Any) -> dict[str, Proof]:
    return {p.name: p for p in prove(model, result, steps, data(), **options)}


MIXED = plan((DropLayers(), ["blocks.1"]), (MagnitudePruning(0.3), ["blocks.0"]), (HalfPrecision("bfloat16"), []))


def test_a_right_result_holds() -> None:
    model = original()
    found = prove(model, apply_plan(model, MIXED).model, MIXED, data())
    assert [p.name for p in found] == ["masked_equivalence", "expected_values", "expected_values", "shrinkage", "reload"]
    assert all(p.passed for p in found), found
    assert found[0].measured == 0.0
    assert "plain object" in found[-1].detail
    assert "overwritten by NaN" in found[-1].detail


def test_the_original_is_left_alone() -> None:
    model = original()
    model.module.train()
    fingerprint = model.fingerprint
    prove(model, apply_plan(model, MIXED).model, MIXED, data())
    assert model.fingerprint == fingerprint
    assert all(m.training for m in model.module.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.module.modules())


DROP = plan((DropLayers(), ["blocks.1", "blocks.2"]))
PRUNE = plan((MagnitudePruning(0.5), ALL))
HALF = plan((HalfPrecision("float16"), []))
INT8 = plan((Int8Dynamic(), ALL))
Fault = Callable[[UniversalModel, UniversalModel], UniversalModel]


def in_weights(change: Callable[[nn.Module], None]) -> Fault:
    def fault(model: UniversalModel, result: UniversalModel) -> UniversalModel:
        with torch.no_grad():
            change(result.module)
        return result

    return fault


def swap(module: Any) -> None:
    up = module.blocks[0].up.weight.clone()
    module.blocks[0].up.weight.copy_(module.blocks[3].up.weight)
    module.blocks[3].up.weight.copy_(up)


FAULTS: dict[str, tuple[CompressionPlan, Fault, str, str]] = {
    # name: plan, fault, the proof that fails, where it says so
    "another layer was dropped": (
        DROP,
        lambda m, r: apply_plan(m, plan((DropLayers(), ["blocks.0", "blocks.2"]))).model,
        "masked_equivalence",
        "blocks.1",
    ),
    "one layer too few was dropped": (
        DROP,
        lambda m, r: apply_plan(m, plan((DropLayers(), ["blocks.1"]))).model,
        "masked_equivalence",
        "blocks.2",
    ),
    "nothing was dropped": (DROP, lambda m, r: m.clone(), "masked_equivalence", "blocks.1"),
    "swapped tensors": (DROP, in_weights(swap), "masked_equivalence", "blocks.0"),
    "a stale bias": (DROP, in_weights(lambda m: m.blocks[3].down.bias.add_(0.01)), "masked_equivalence", "blocks.3"),
    "a wrong head": (DROP, in_weights(lambda m: m.head.weight.mul_(1.001)), "masked_equivalence", "the model's outputs"),
    "NaN in a layer": (DROP, in_weights(lambda m: m.blocks[3].up.bias.fill_(torch.nan)), "masked_equivalence", "blocks.3"),
    "stale weights after pruning": (PRUNE, lambda m, r: m.clone(), "expected_values", "blocks.0.up.weight"),
    "one weight too many at zero": (
        PRUNE,
        in_weights(lambda m: one_to_zero(m)),
        "expected_values",
        "blocks.2.up.weight",
    ),
    "a weight outside the layers": (PRUNE, in_weights(lambda m: m.head.bias.add_(1e-3)), "expected_values", "head.bias"),
    "the type was not changed": (HALF, lambda m, r: m.clone(), "expected_values", ""),
    "one tensor kept its type": (
        HALF,
        in_weights(lambda m: setattr(m.blocks[1].up.weight, "data", m.blocks[1].up.weight.data.float())),
        "expected_values",
        "blocks.1.up.weight",
    ),
    "rounded to the other type": (
        HALF,
        lambda m, r: apply_plan(m, plan((HalfPrecision("bfloat16"), []))).model,
        "expected_values",
        "stem.weight",
    ),
    "not quantized": (INT8, lambda m, r: m.clone(), "expected_values", "blocks.0.up.weight"),
    "one layer not quantized": (
        INT8,
        lambda m, r: apply_plan(m, plan((Int8Dynamic(), ALL[:-1]))).model,
        "expected_values",
        "blocks.3.up.weight",
    ),
    "one integer off": (
        INT8,
        in_weights(lambda m: m.blocks[2].down.weight.qdata[1, 1].add_(1)),
        "expected_values",
        "blocks.2.down.weight",
    ),
    "a row's scale off": (
        INT8,
        in_weights(lambda m: m.blocks[2].down.weight.scale[1].mul_(1.05)),
        "expected_values",
        "blocks.2.down.weight",
    ),
    "another class in a place": (
        PRUNE,
        in_weights(lambda m: m.blocks[1].set_submodule("up", OtherLinear(m.blocks[1].up))),
        "expected_values",
        "blocks.1.up",
    ),
}


class OtherLinear(nn.Linear):
    """A linear layer of another class with the same weights."""

    def __init__(self, other: nn.Linear) -> None:
        super().__init__(other.in_features, other.out_features)
        self.load_state_dict(other.state_dict())


def one_to_zero(module: Any) -> None:
    weight = module.blocks[2].up.weight
    row, column = (weight != 0).nonzero()[0].tolist()
    weight[row, column] = 0


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught_where_it_is(name: str) -> None:
    steps, fault, proof, place = FAULTS[name]
    model = original()
    right = apply_plan(model, steps).model
    assert proved(model, right, steps, reload=False)[proof].passed
    before = right.fingerprint, [type(m) for m in right.module.modules()]
    wrong = fault(model, right)
    assert before != (wrong.fingerprint, [type(m) for m in wrong.module.modules()]), "the fault did not fire"
    found = proved(model, wrong, steps, reload=False)[proof]
    assert found.passed is False
    assert not found.measured <= found.bound
    assert found.layer == place


def test_a_fault_in_a_step_before_the_last_is_caught() -> None:
    model = original()
    wrong = apply_plan(model, plan((DropLayers(), ["blocks.2"]), *[(MagnitudePruning(0.3), ["blocks.0"])])).model
    steps = plan((DropLayers(), ["blocks.1"]), (MagnitudePruning(0.3), ["blocks.0"]))
    assert proved(model, wrong, steps, reload=False)["expected_values"].passed is False


def test_a_result_that_does_not_run_fails_with_the_reason() -> None:
    model = original()
    wrong = apply_plan(model, DROP).model
    wrong.module.head = nn.Linear(5, 3)
    found = proved(model, wrong, DROP)
    assert all(p.passed is False for p in found.values())
    assert "mat1 and mat2" in found["masked_equivalence"].detail
    assert "cannot be measured" in found["shrinkage"].detail


class Drowned(nn.Module):
    """Sixteen hidden units at a time are added to a large number, which goes again: float32 rounds to 2e-4 each time."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.share = nn.Linear(16, 128), nn.Linear(128, 16), 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = x.new_full(x.shape, 4000.0)
        for hidden, weight in zip(self.up(x).relu().split(16, -1), self.down.weight.split(16, 1), strict=True):
            total = total + hidden @ weight.T
        return x + self.share * (total - 4000.0)


@pytest.mark.parametrize(("share", "holds"), [(1.0, True), (1.0001, False)])
def test_rounding_and_a_wrong_cut_are_told_apart_in_float64(share: float, holds: bool) -> None:
    """The outputs differ by about as much in float32; the fault is in a setting, which no comparison of tensors finds."""
    torch.manual_seed(0)
    example = Batch((torch.randn(64, 16),))
    model = UniversalModel(nn.Sequential(*(Drowned() for _ in range(3))).eval(), example=example)
    steps = plan((StructuredPruning(), ["0", "1", "2"]))
    applied = apply_plan(model, steps)
    applied.model.module[1].share = share
    (proof,) = proofs.equivalence(model, applied.model, applied.plan, [example])
    assert proof.passed is holds
    assert "float64" in proof.detail
    assert proof.measured > 1e-6 if not holds else proof.measured < 1e-12


def test_the_same_infinities_do_not_differ() -> None:
    masked = torch.tensor([1.0, -math.inf])
    assert proofs.relative_error(masked, masked) == 0
    assert not proofs.relative_error(masked, -masked) < math.inf
    assert not proofs.relative_error(masked, torch.zeros(2)) < math.inf


def test_missing_shrinkage_is_caught() -> None:
    model = original()
    found = proved(model, model.clone(), DROP, reload=False)["shrinkage"]
    assert found.passed is False
    assert "not kept: macs, params, size" in found.detail
    assert found.measured == found.bound + 1


FIGURES = Measurement(100, 100, 400, 1000, 10.0, 0.5, 8, {"accuracy": 0.9}, {"accuracy": 0.01}, 50, "cpu")


@pytest.mark.parametrize(
    ("after", "targets", "passed", "words"),
    [
        ({"size": 200}, ("size<=0.5x",), True, "400 → 200 (0.50x)"),
        ({"size": 201}, ("size<=0.5x",), False, "not kept: size<=0.5x"),
        ({"size": 200, "latency": 10.2}, (), True, "no speed-up shown: the two times differ by less than their spreads"),
        ({"size": 200, "latency": 20.0}, (), True, "no speed-up: 2.00x slower"),
        ({"size": 200, "latency": 5.0}, (), True, "2.00x faster (10 → 5 ms per batch of 8)"),
        ({"size": 200, "latency": 20.0}, ("latency<=0.9x",), False, "not kept: latency<=0.9x"),
        ({"size": 400}, (), False, "not kept: size"),
    ],
)
def test_shrinkage_is_judged_by_what_was_promised_and_asked(
    after: dict[str, Any], targets: tuple[str, ...], passed: bool, words: str
) -> None:
    found = shrinkage(plan((HalfPrecision(), []), targets=targets), FIGURES, replace(FIGURES, **after))
    assert found.passed is passed
    assert words in found.detail
    assert (found.measured <= found.bound) is passed


def test_pruning_promises_zeros_and_no_shrinkage() -> None:
    found = shrinkage(PRUNE, FIGURES, replace(FIGURES, nonzero=40))
    assert found.passed is None
    assert "60.0% of the parameters are 0" in found.detail
    assert math.isnan(found.bound)


SOURCE = Source("py", "tests.models:ResidualNet", {})


def test_a_fresh_process_rebuilds_it() -> None:
    model = original(SOURCE)
    steps = plan((DropLayers(), ["blocks.1"]), (Int8Dynamic(), ["blocks.0", "blocks.2"]))
    found = proved(model, apply_plan(model, steps).model, steps)["reload"]
    assert found.passed, found
    assert found.measured == found.bound == 0.0
    assert "by a fresh process" in found.detail


def test_a_fresh_process_rebuilds_a_language_model() -> None:
    case = CASES["llama"]
    built = case.build()
    source = Source("hf", "llama", {"architecture": "LlamaForCausalLM", "config": built.config.to_dict()})
    model = UniversalModel(built.eval(), source=source, example=case.batch(2))
    names = [layer.name for layer in model.layers]
    steps = plan((DropLayers(), names[1:2]), (HalfPrecision("bfloat16"), []))
    found = prove(model, apply_plan(model, steps).model, steps, case.data(3))
    assert [p.passed for p in found] == [True] * 4, found


def test_weights_changed_after_saving_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A valid manifest over other weights: only the outputs can tell."""

    def save(model: UniversalModel, folder: Path) -> Path:
        other = model.clone()
        with torch.no_grad():
            other.module.get_parameter("head.bias")[0] += 1e-3
        return save_model(other, folder)

    monkeypatch.setattr(proofs, "save_model", save)
    found = proved(original(), apply_plan(original(), DROP).model, DROP)["reload"]
    assert found.passed is False
    assert found.measured == pytest.approx(1e-3, rel=1e-2)
    assert "differ by up to 0.001" in found.detail


@pytest.mark.parametrize("file", ["weights.safetensors", "layerwise.json", "manifest.json"])
def test_a_corrupt_folder_is_caught(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged: list[Path] = []

    def save(model: UniversalModel, folder: Path) -> Path:
        save_model(model, folder)
        content = bytearray((folder / file).read_bytes())
        content[len(content) // 2] ^= 4
        (folder / file).write_bytes(content)
        damaged.append(folder / file)
        return folder

    monkeypatch.setattr(proofs, "save_model", save)
    model = original()
    found = proved(model, apply_plan(model, DROP).model, DROP)["reload"]
    assert damaged
    assert found.passed is False
    assert "LW-R11" in found.detail


def test_what_the_state_does_not_hold_is_caught() -> None:
    """A hook left on the result is in no file: what is saved computes something else."""
    model = original()
    result = apply_plan(model, DROP).model
    result.module.head.register_forward_hook(lambda m, a, out: out * 1.001)
    assert proved(model, result, DROP)["reload"].passed is False


def test_a_class_that_changed_in_the_meantime_is_caught() -> None:
    model = original(Source("py", "tests.models:ResidualNet", {"depth": 5}))
    found = proved(model, apply_plan(model, DROP).model, DROP)["reload"]
    assert found.passed is False
    assert "a fresh process failed: LW-M55" in found.detail
    assert "blocks.4" in found.detail


def test_reload_compares_bits_and_shapes() -> None:
    one = torch.tensor([1.0, 2.0])
    assert Reload.of(one, one.clone(), "").equal
    assert Reload.of(one, one + 1e-7, "").difference > 0
    assert Reload.of(one, one.double(), "").difference == math.inf
    assert Reload.of(one[:1], one, "").difference == math.inf
