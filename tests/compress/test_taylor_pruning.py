"""|w · ∂L/∂w| against finite differences, and the choice of the smallest."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from layerwise.compress.taylor_pruning import TaylorPruning, taylor_scores
from layerwise.data import Data
from layerwise.errors import UsageError
from layerwise.method import apply_plan, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.sparsity import weights_of
from layerwise.supplies import Supplies
from tests.models import CASES


def slow(model: UniversalModel, data: Data, names: list[str]) -> dict[str, np.ndarray]:
    """Root of the mean over batches of (w · ∂L/∂w)², the derivative by central differences in float64, weight by weight."""
    twin = model.clone()
    twin.module.double()
    scores = {}
    for name, weight in weights_of(twin.module, names).items():
        flat, sums = weight.detach().view(-1), np.zeros(weight.numel())
        for batch in data:
            batch = batch.map(lambda t: t.double() if t.is_floating_point() else t)
            for i, value in enumerate(flat.tolist()):
                losses = []
                for step in (1e-5, -1e-5):
                    flat[i] = value + step
                    losses.append(torch.nn.functional.cross_entropy(twin.output(batch), batch.labels).item())
                flat[i] = value
                sums[i] += (value * (losses[0] - losses[1]) / 2e-5) ** 2
        scores[name] = np.sqrt(sums / len(data)).reshape(weight.shape)
    return scores


def test_scores_and_choice_follow_the_slow_way() -> None:
    model, data = CASES["residual"].model(), CASES["residual"].data(6, 3)
    names = ["blocks.1", "blocks.2"]
    expected = slow(model, data, names)
    weights = weights_of(model.module, names)
    found = taylor_scores(model, list(weights.values()), data)
    for wanted, score in zip(expected.values(), found, strict=True):
        np.testing.assert_allclose(score.numpy(), wanted, rtol=2e-3, atol=1e-8)
    plan = CompressionPlan((step_of(TaylorPruning(0.5), names),))
    after = weights_of(apply_plan(model, plan, Supplies(calibration=data)).model.module, names)
    threshold = np.sort(np.concatenate([s.reshape(-1) for s in expected.values()]))[sum(s.size for s in expected.values()) // 2]
    for name, wanted in expected.items():
        clear = np.abs(wanted / threshold - 1) > 0.01  # finite differences cannot tell neighbours apart
        np.testing.assert_array_equal((after[name] == 0).numpy()[clear], (wanted < threshold)[clear])


def test_gradients_of_either_sign_do_not_cancel() -> None:
    """Two batches with opposite labels leave no mean gradient at a fair net, but each weight matters to each."""
    model = CASES["residual"].model()
    batch = CASES["residual"].batch(4)
    one, two = (type(batch)(batch.args, {}, torch.full((4,), label)) for label in (0, 1))
    weights = list(weights_of(model.module, ["blocks.0"]).values())
    single = taylor_scores(model, weights, Data.of([one]))
    both = taylor_scores(model, weights, Data.of([one, two]))
    other = taylor_scores(model, weights, Data.of([two]))
    for a, b, c in zip(single, other, both, strict=True):
        torch.testing.assert_close(c, ((a**2 + b**2) / 2).sqrt())


def test_what_no_output_depends_on_goes_first_and_frozen_weights_count_too() -> None:
    model, data = CASES["residual"].model(), CASES["residual"].data(6)
    for p in model.module.parameters():
        p.requires_grad_(False)
    with torch.no_grad():
        model.module.get_submodule("blocks.3.down").weight.fill_(1e-3)
        model.module.get_submodule("head").weight.zero_()  # then no weight has a gradient
    names = [layer.name for layer in model.layers]
    plan = CompressionPlan((step_of(TaylorPruning(0.5), names),))
    result = apply_plan(model, plan, Supplies(calibration=data)).model
    weights = weights_of(result.module, names).values()
    assert sum(int((w == 0).sum()) for w in weights) == sum(w.numel() for w in weights) // 2
    assert not any(p.requires_grad for p in result.module.parameters())


def test_it_is_refused_without_data_and_outside_its_range() -> None:
    model = CASES["residual"].model()
    with pytest.raises(UsageError, match="calibration"):
        apply_plan(model, CompressionPlan((step_of(TaylorPruning(), ["blocks.0"]),)))
    with pytest.raises(UsageError, match=r"0 … 1"):
        TaylorPruning(1.1)
