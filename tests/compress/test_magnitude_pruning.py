"""Exactly the right number of weights, and the right ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from layerwise.compress.magnitude_pruning import MagnitudePruning, weights_of, zero_smallest_
from layerwise.errors import UsageError
from layerwise.method import apply_plan, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ties_do_not_change_the_count(dtype: torch.dtype) -> None:
    weight = torch.tensor([1.0, -1.0, 1.0, 0.5, -1.0, 1.0], dtype=dtype)
    zero_smallest_([weight], 3)
    assert weight.tolist() == [0.0, 0.0, 1.0, 0.0, -1.0, 1.0]


def test_more_than_16_million_elements() -> None:
    weight = torch.arange(1, 17_000_001, dtype=torch.float32)
    zero_smallest_([weight], 8_500_000)
    assert int((weight == 0).sum()) == 8_500_000
    assert float(weight[8_500_000]) == 8_500_001


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
