"""Every analyzer on a model that was compressed: layers are gone, weights are 8-bit wrappers, and no score pretends otherwise."""

from __future__ import annotations

import math

import pytest

from layerwise.analyzer import ANALYZERS
from layerwise.compress.drop_layers import DropLayers
from layerwise.compress.int8_dynamic import Int8Dynamic
from layerwise.data import Data
from layerwise.method import apply_plan, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.scores import Scores, Status
from layerwise.weights.finite import check_finite
from tests.models import CASES

GRADIENTS = {"fisher_information", "gradient_based", "gradient_flow", "layer_conductance", "attention_analysis", "meta_learning"}


def compressed(name: str) -> tuple[UniversalModel, Data]:
    model = CASES[name].model()
    blocks = [layer.name for layer in model.layers]
    steps = (step_of(DropLayers(), [blocks[1]]), step_of(Int8Dynamic(), [blocks[0], blocks[2]]))
    return apply_plan(model, CompressionPlan(steps)).model, Data.of([model.example])


def test_the_layers_left_are_numbered_anew() -> None:
    model, _ = compressed("residual")
    assert [layer.index for layer in model.layers] == list(range(len(model.layers)))
    assert "blocks.1" not in {layer.name for layer in model.layers}


@pytest.mark.parametrize("method", list(ANALYZERS))
def test_it_scores_what_is_left_or_says_why_not(method: str) -> None:
    model, data = compressed("residual")
    check_finite(model.module)
    scores: Scores = ANALYZERS[method]().analyze(model, data)
    assert list(scores) == [layer.name for layer in model.layers]
    for entry in scores.entries.values():
        assert math.isfinite(entry.value) if entry.status is Status.OK else entry.reason
    reasons = {entry.reason for entry in scores.entries.values()}
    refused = any(reason.startswith("no gradient passes quantized weights, such as blocks.0.") for reason in reasons)
    assert refused == (method in GRADIENTS)
