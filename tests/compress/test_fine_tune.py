from __future__ import annotations

from pathlib import Path

import pytest
import torch

from layerwise.compress.fine_tune import FineTune
from layerwise.compress.half_precision import HalfPrecision
from layerwise.compress.int8_dynamic import Int8Dynamic
from layerwise.compress.magnitude_pruning import MagnitudePruning
from layerwise.errors import UsageError
from layerwise.method import CompressionMethod, apply_plan, step_of
from layerwise.plan import CompressionPlan
from layerwise.supplies import Supplies
from layerwise.tensors import state
from tests.training.nets import batches, supplies, universal


def plan_of(*methods: CompressionMethod) -> CompressionPlan:
    return CompressionPlan(tuple(step_of(m, [x.name for x in universal().layers]) for m in methods))


def test_it_learns_and_keeps_the_zeros() -> None:
    """Fails when the zeros live again, and when nothing was learned."""
    steps = plan_of(MagnitudePruning(0.5), FineTune(epochs=4, learning_rate=0.05))
    (pruned,) = (apply_plan(universal(), CompressionPlan(steps.steps[:1])).model,)
    tuned = apply_plan(universal(), steps, supplies(8)).model
    for name, before in state(pruned.module).items():
        after = state(tuned.module)[name]
        if before.dim() > 1:
            assert torch.equal(before == 0, after == 0)
            assert not torch.equal(before, after)
    data = batches(8)
    assert sum(tuned.loss(b) for b in data) < 0.9 * sum(pruned.loss(b) for b in data)
    method = FineTune()
    assert method.check(pruned, tuned, []).passed
    with torch.no_grad():
        weight = tuned.module.head.weight
        weight[weight == 0] = 1e-9
    broken = method.check(pruned, tuned, [])
    assert not broken.passed
    assert broken.place == "head.weight"


def test_only_the_layers_of_the_step_are_trained_where_that_is_asked() -> None:
    model = universal()
    name = model.layers[-1].name
    plan = CompressionPlan((step_of(FineTune(scope="layers", epochs=1, keep_best=False), [name]),))
    tuned = apply_plan(model, plan, supplies()).model
    moved = {n for n, t in state(tuned.module).items() if not torch.equal(t, state(model.module)[n])}
    assert {n for n in moved if not n.startswith("norm.")} == {n for n in state(model.module) if n.startswith(f"{name}.")}
    assert all(p.requires_grad for p in tuned.module.parameters())


@pytest.mark.parametrize(("method", "words"), [(Int8Dynamic(), "quantized"), (HalfPrecision(), "float16")])
def test_weights_that_cannot_learn_are_refused(method: CompressionMethod, words: str) -> None:
    pytest.importorskip("torchao")
    with pytest.raises(UsageError, match=f"fine_tune cannot treat .*{words}"):
        apply_plan(universal(), plan_of(method, FineTune()), supplies())


def test_without_training_data_it_says_so_and_with_a_folder_it_resumes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fine_tune needs training data"):
        apply_plan(universal(), plan_of(FineTune()))
    given: Supplies = supplies(checkpoint=tmp_path)
    once, again = (apply_plan(universal(), plan_of(FineTune()), given).model.fingerprint for _ in range(2))
    assert once == again
    assert list((tmp_path / "step0").glob("step-*"))
