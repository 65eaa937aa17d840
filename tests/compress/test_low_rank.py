"""The factors are the best there are, by a replica that whitens as the paper does, and stand where the matrix stood."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwise.compress.low_rank import LowRank
from layerwise.data import Batch, Data
from layerwise.errors import UsageError
from layerwise.factors import TwoFactors, factorable, two_factors
from layerwise.measure import compare
from layerwise.method import Applied, apply_plan, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.supplies import NOTHING, Supplies
from tests.models import CASES, ResidualNet


def net(width: int = 12) -> UniversalModel:
    torch.manual_seed(0)
    return UniversalModel(ResidualNet(width=width).double().eval(), example=Batch((torch.randn(2, width).double(),)))


def inputs(width: int = 12, rows: int = 64) -> Data:
    """Correlated features, the last two of them always zero: XXᵀ has no inverse."""
    drawn = torch.Generator().manual_seed(1)
    mixed = torch.randn(rows, 4, generator=drawn).double() @ torch.randn(4, width, generator=drawn).double()
    x = mixed + 0.05 * torch.randn(rows, width, generator=drawn).double()
    x[:, -2:] = 0
    return Data.of([Batch((x[:40],)), Batch((x[40:],))])


def factored(model: UniversalModel, method: LowRank, data: Data | None, *layers: str) -> Applied:
    names = layers or tuple(layer.name for layer in model.layers)
    return apply_plan(model, CompressionPlan((step_of(method, names),)), Supplies(calibration=data) if data else NOTHING)


def paper(W: Tensor, X: Tensor, rank: int) -> Tensor:
    """SVD-LLM: SVD of W L with L Lᵀ = XᵀX, cut, times L⁻¹; here with the inverse square root of XᵀX where it has one."""
    values, vectors = torch.linalg.eigh(X.T @ X)
    used = values > 1e-9 * values.max()
    L = vectors[:, used] * values[used].sqrt()
    inverse = (vectors[:, used] / values[used].sqrt()).T
    U, S, V = torch.linalg.svd(W @ L, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ V[:rank] @ inverse


@pytest.mark.parametrize("matrix", ["up", "down"])
def test_the_outputs_are_those_of_the_paper(matrix: str) -> None:
    model, data = net(), inputs()
    result = factored(model, LowRank(ratio=0.4), data, "blocks.1")
    seen = list[Tensor]()
    module = model.module.get_submodule(f"blocks.1.{matrix}")
    with torch.no_grad():
        handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        for batch in data:
            model.predict(batch)
        handle.remove()
        X = torch.cat(seen)
        found = result.model.module.get_submodule(f"blocks.1.{matrix}")
        expected = X @ paper(module.weight, X, found.rank).T + module.bias
        plain = X @ low_rank_of(module.weight, found.rank).T + module.bias
        torch.testing.assert_close(found(X), expected, rtol=0, atol=2e-3 * float(expected.abs().max()))  # the ridge
        exact = X @ module.weight.T + module.bias
        assert (found(X) - exact).norm() < 0.9 * (plain - exact).norm()


def low_rank_of(W: Tensor, rank: int) -> Tensor:
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ V[:rank]


def test_without_data_it_is_the_plain_svd_and_the_plan_says_so() -> None:
    model = net()
    result = factored(model, LowRank(ratio=0.6), None, "blocks.0")
    settings = result.plan.steps[0].settings
    assert settings["aware"] is False
    assert settings["ranks"] == {"blocks.0.up": 4, "blocks.0.down": 4}  # 0.6·12·24/(12 + 24)
    for name, rank in settings["ranks"].items():
        torch.testing.assert_close(
            result.model.module.get_submodule(name).weight, low_rank_of(model.module.get_submodule(name).weight, rank)
        )


def test_energy_takes_the_least_rank_that_has_it() -> None:
    model = net()
    with torch.no_grad():
        up = model.module.blocks[2].up.weight.zero_()
        up[:3, :3] = torch.diag(torch.tensor([3.0, 2.0, 1.0]).double())  # shares 9/14, 4/14, 1/14
    for energy, rank in ((0.6, 1), (0.9, 2), (0.95, 3)):
        result = factored(model, LowRank(energy=energy, aware=False), None, "blocks.2")
        assert result.plan.steps[0].settings["ranks"]["blocks.2.up"] == rank


def test_what_would_not_shrink_stays_and_is_named() -> None:
    model = net()
    result = factored(model, LowRank(ranks={"blocks.0.up": 3, "blocks.0.down": 11}), inputs(), "blocks.0")
    assert result.plan.steps[0].settings["ranks"] == {"blocks.0.up": 3}
    assert isinstance(result.model.module.blocks[0].down, nn.Linear)
    assert any("blocks.0.down" in remark for remark in result.remarks)
    with pytest.raises(UsageError, match="no matrix would shrink"):
        factored(model, LowRank(energy=1.0), inputs(), "blocks.0")
    with pytest.raises(UsageError, match=r"Did you mean 'blocks\.0\.up'"):
        factored(model, LowRank(ranks={"blocks.0.upp": 3}), inputs(), "blocks.0")


@pytest.mark.parametrize("family", ["resnet", "gpt2"])
def test_convolutions_and_conv1d_keep_their_share(family: str) -> None:
    case = CASES[family]
    model = case.model()
    result = factored(model, LowRank(ratio=0.5), case.data(4))
    factors = {n: m for n, m in result.model.module.named_modules() if isinstance(m, TwoFactors)}
    assert factors
    for name, module in factors.items():
        whole = model.module.get_submodule(name)
        assert 0.3 < sum(p.numel() for p in module.parameters()) / sum(p.numel() for p in whole.parameters()) <= 0.55, name
        assert module.weight.shape == whole.weight.shape
    before, after = compare(model, result.model, case.data(2))
    assert after.macs < before.macs


def test_the_product_stands_for_the_matrix() -> None:
    torch.manual_seed(0)
    for module, x in (
        (nn.Conv2d(3, 5, 3, stride=2, padding=1, dilation=1, padding_mode="reflect"), torch.randn(2, 3, 9, 9)),
        (nn.Linear(6, 4, bias=False), torch.randn(2, 3, 6)),
    ):
        W: Any = module.weight.detach().flatten(1)
        U, S, V = torch.linalg.svd(W, full_matrices=False)
        both = two_factors(module, S[:, None] * V, U)
        torch.testing.assert_close(both(x), module(x))
        torch.testing.assert_close(both.weight, module.weight)


def test_hooked_shared_grouped_and_half_weights_are_left() -> None:
    block = nn.ModuleDict(
        {
            "hooked": nn.Linear(8, 8),
            "one": nn.Linear(8, 8),
            "two": nn.Linear(8, 8),
            "grouped": nn.Conv2d(8, 8, 3, groups=8),
            "sixteen": nn.Linear(8, 8).half(),
            "free": nn.Linear(8, 8),
        }
    )
    block["two"].weight = block["one"].weight
    block["hooked"].register_forward_hook(lambda m, a, o: o)
    assert list(factorable(block)) == ["free"]


@pytest.mark.parametrize("wrong", [{"ratio": 0.0}, {"ratio": 1.5}, {"energy": -1.0}, {"samples": 0}, {"ranks": {"a": 0}}])
def test_settings_outside_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="low_rank"):
        LowRank(**wrong)
