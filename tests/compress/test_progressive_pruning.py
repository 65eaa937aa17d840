"""The cubic schedule to the target, with zeros that stay, also when a run is interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from layerwise.compress.progressive_pruning import ProgressivePruning, Ramp
from layerwise.errors import UsageError
from layerwise.method import apply_plan, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.proofs import judged
from layerwise.sparsity import weights_of
from layerwise.supplies import Supplies
from tests.models import CASES

NAMES = ["blocks.0", "blocks.1", "blocks.2"]


def supplies(checkpoint: Path | None = None) -> Supplies:
    data = CASES["residual"].data(*[4] * 8)
    return Supplies(training=data, validation=data, checkpoint=checkpoint, progress=lambda done, steps: None)


def pruned(method: ProgressivePruning, names: list[str], given: Supplies | None = None) -> UniversalModel:
    plan = CompressionPlan((step_of(method, names),))
    return apply_plan(CASES["residual"].model(), plan, given or supplies()).model


def share(module: nn.Module, names: list[str]) -> float:
    weights = list(weights_of(module, names).values())
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def test_the_share_of_zeros_rises_by_the_cubic_to_the_target_and_no_further() -> None:
    method = ProgressivePruning(0.8, ramp=0.5, updates=4)
    module = CASES["residual"].model().module
    ramp, seen = Ramp(method, tuple(weights_of(module, NAMES))), []
    for step in range(16):
        ramp.before(module, step, 16)
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.01)  # a step that would bring everything back to life
        ramp.after(module)
        seen.append(share(module, NAMES))
    expected = [0.0, 0.0, *[0.8 * (1 - (1 - i / 4) ** 3) for i in (1, 1, 2, 2, 3, 3)], *[0.8] * 8]
    assert seen == pytest.approx(expected, abs=0.002)  # of 768 weights


@pytest.mark.parametrize("scope", ["global", "local"])
def test_it_ends_at_exactly_the_target_and_what_is_left_has_learned(scope: str) -> None:
    method = ProgressivePruning(0.7, scope, epochs=2, learning_rate=0.01)
    result = pruned(method, NAMES)
    assert share(result.module, NAMES) == round(0.7 * 768) / 768 if scope == "global" else round(0.7 * 128) / 128
    start = CASES["residual"].model().module
    assert not torch.equal(start.get_submodule("head").weight, result.module.get_submodule("head").weight)
    assert share(result.module, ["blocks.3"]) == 0
    if scope == "local":
        assert {int((w == 0).sum()) for w in weights_of(result.module, NAMES).values()} == {round(0.7 * 128)}


def test_a_run_that_was_stopped_ends_at_the_same_bits(tmp_path: Path) -> None:
    method = ProgressivePruning(0.6, epochs=2, learning_rate=0.01, updates=5)
    whole = pruned(method, NAMES, supplies(tmp_path / "whole"))

    def stop(done: int, steps: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    given = supplies(tmp_path / "broken")
    with pytest.raises(KeyboardInterrupt):
        pruned(
            method,
            NAMES,
            Supplies(training=given.training, checkpoint=given.checkpoint, progress=stop, validation=given.validation),
        )
    assert pruned(method, NAMES, given).fingerprint == whole.fingerprint


def test_a_zero_that_lives_again_is_found() -> None:
    method = ProgressivePruning(0.5, epochs=1)
    model = CASES["residual"].model()
    result = pruned(method, NAMES)
    step = step_of(method, NAMES)
    batches = list(CASES["residual"].data(3))
    assert judged(model, result, step, batches).passed
    with torch.no_grad():
        weight = result.module.get_submodule("blocks.1.up").weight
        weight[tuple((weight == 0).nonzero()[0])] = 0.1
    proof = judged(model, result, step, batches)
    assert (proof.passed, proof.measured) == (False, 1)


def test_bad_settings_are_refused() -> None:
    for setting, value in (("amount", 1.2), ("ramp", -0.1), ("updates", 0), ("scope", "row"), ("epochs", -1)):
        with pytest.raises(UsageError, match=setting if setting != "scope" else "local, global"):
            ProgressivePruning(**{setting: value})  # type: ignore[arg-type]
