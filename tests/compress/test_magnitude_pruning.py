"""Exactly the right number of weights, and the right ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from layerwise.compress.magnitude_pruning import MagnitudePruning
from layerwise.errors import UsageError
from layerwise.method import apply_plan, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.sparsity import weights_of
from tests.models import CASES


def pruned(model: UniversalModel, method: MagnitudePruning) -> UniversalModel:
    names = [layer.name for layer in model.layers]
    return apply_plan(model, CompressionPlan((step_of(method, names),))).model


def slow(weights: list[np.ndarray], amount: float) -> list[np.ndarray]:
    """Sorts everything in float64 and zeroes from the small end; of equal ones the first."""
    flat = np.concatenate([w.reshape(-1).astype(np.float64) for w in weights])
    flat[np.argsort(np.abs(flat), kind="stable")[: round(amount * len(flat))]] = 0
    parts = np.split(flat, np.cumsum([w.size for w in weights])[:-1])
    return [p.reshape(w.shape) for p, w in zip(parts, weights, strict=True)]


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("amount", [0.0, 0.3, 0.77, 1.0])
def test_it_follows_the_slow_way(scope: str, amount: float) -> None:
    model = CASES["residual"].model()
    names = [layer.name for layer in model.layers]
    before = weights_of(model.module, names)
    after = weights_of(pruned(model, MagnitudePruning(amount, scope)).module, names)
    arrays = [w.detach().numpy() for w in before.values()]
    expected = slow(arrays, amount) if scope == "global" else [slow([a], amount)[0] for a in arrays]
    for name, wanted in zip(before, expected, strict=True):
        np.testing.assert_array_equal(after[name].detach().numpy(), wanted)


def test_biases_and_what_is_outside_the_layers_stay() -> None:
    model = CASES["residual"].model()
    result = pruned(model, MagnitudePruning(1.0))
    for name, p in result.module.named_parameters():
        assert bool((p == 0).all()) == (name.startswith("blocks") and p.dim() > 1), name


def test_bad_settings_are_refused_with_their_range() -> None:
    for amount in (1.5, -0.1, float("nan")):
        with pytest.raises(UsageError, match=r"0 … 1"):
            MagnitudePruning(amount)
    with pytest.raises(UsageError, match="local, global"):
        MagnitudePruning(scope="layer")
    with pytest.raises(UsageError, match="contradict"):
        MagnitudePruning(scope="global", amounts={"blocks.0": 0.1})
    with pytest.raises(UsageError, match=r"Did you mean 'blocks\.\d'"):
        pruned(CASES["residual"].model(), MagnitudePruning(amounts={"blocks.l": 0.1}))


def zeros(model: UniversalModel, layer: str) -> float:
    weights = list(weights_of(model.module, [layer]).values())
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def test_single_layers_may_have_their_own_amount() -> None:
    result = pruned(CASES["residual"].model(), MagnitudePruning(0.5, amounts={"blocks.1": 0.25, "blocks.2": 0}))
    assert [zeros(result, f"blocks.{i}") for i in range(4)] == [0.5, 0.25, 0.0, 0.5]


@pytest.mark.parametrize("scope", ["local", "global"])
def test_rows_go_by_their_norm(scope: str) -> None:
    model = CASES["residual"].model()
    names = [f"blocks.{i}" for i in range(4)]
    before = weights_of(model.module, names)
    for norm in (1, 2):
        after = weights_of(pruned(model, MagnitudePruning(0.25, scope, "row", norm)).module, names)
        sizes = {n: (w.detach().double().abs() ** norm).mean(1) ** (1 / norm) for n, w in before.items()}
        every = torch.cat(list(sizes.values())).sort().values
        for name, w in before.items():
            of = every if scope == "global" else sizes[name].sort().values
            kept = sizes[name] > of[round(0.25 * len(of)) - 1]
            np.testing.assert_array_equal(after[name].detach(), (w * kept[:, None]).detach())


def test_the_two_norms_choose_other_rows() -> None:
    model = CASES["residual"].model()
    with torch.no_grad():
        weight = model.module.get_submodule("blocks.0.up").weight
        weight[:] = 1.0
        weight[3], weight[5] = torch.tensor([0.9] + [0.0] * 7), torch.full((8,), 0.2)  # L1: 0.9 < 1.6; L2: 0.9 > 0.57
    for norm, row in ((1, 3), (2, 5)):
        after = pruned(model, MagnitudePruning(1 / 16, granularity="row", norm=norm)).module
        assert (after.get_submodule("blocks.0.up").weight == 0).all(1).nonzero().tolist() == [[row]]


def test_rows_of_transposed_layers_are_their_outputs_and_tables_stay() -> None:
    case = CASES["gpt2"]
    model = case.model()
    result = pruned(model, MagnitudePruning(0.5, granularity="row"))
    weight = result.module.get_submodule("transformer.h.0.mlp.c_fc").weight  # (inputs, outputs)
    assert int((weight == 0).all(0).sum()) == weight.shape[1] // 2
    assert not bool((weight == 0).all(1).any())
