"""A folder for from_pretrained: loaded by a fresh process, refused where the class cannot be told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from layerwise.artifact import export
from layerwise.compress.drop_layers import DropLayers
from layerwise.compress.low_rank import LowRank
from layerwise.compress.structured_pruning import StructuredPruning
from layerwise.errors import UserModelError
from layerwise.method import apply_plan, step_of
from layerwise.plan import CompressionPlan
from tests.models import CASES


def test_the_folder_is_loaded_by_a_fresh_process(tmp_path: Path) -> None:
    case = CASES["gpt2"]
    left = ["transformer.h.0", "transformer.h.2"]
    steps = step_of(DropLayers(), ["transformer.h.1"]), step_of(StructuredPruning(0.5, prune_type="neuron"), left)
    dropped = apply_plan(case.model(), CompressionPlan(steps)).model
    made = export(dropped, tmp_path / "small.hf", case.data(3, 2))
    assert made.parity.relative <= 1e-6
    assert made.notes == ("transformer.h: the layers 0, 2 are left, in this order",)
    assert made.bytes == sum(f.stat().st_size for f in made.path.iterdir())
    module = GPT2LMHeadModel.from_pretrained(made.path)
    assert (module.config.n_layer, module.config.n_inner) == (2, 64)
    assert torch.equal(module(**case.batch(3).kwargs).logits, dropped.predict(case.batch(3)))
    export(dropped, tmp_path / "small.hf", case.data(2), force=True)


@pytest.mark.parametrize(("family", "reason"), [("gpt2", "not those of the class"), ("residual", "none of transformers")])
def test_what_the_class_cannot_be_told_is_refused_and_nothing_is_left(family: str, reason: str, tmp_path: Path) -> None:
    model = CASES[family].model()
    thin = apply_plan(model, CompressionPlan((step_of(LowRank(), [model.layers[0].name]),))).model
    with pytest.raises(UserModelError, match=reason):
        export(thin, tmp_path / "thin.hf", CASES[family].data(2))
    assert not list(tmp_path.iterdir())
