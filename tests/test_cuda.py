"""The same code on a GPU gives the same scores. Skipped where there is no CUDA device."""

from __future__ import annotations

import pytest
import torch

from layerwise.analyzer import ANALYZERS
from layerwise.data import Data
from layerwise.model import UniversalModel
from layerwise.task import Classification
from tests.models import CASES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]
METHODS = ["fisher_information", "gradient_based", "layer_ablation", "layer_correlation"]


def on_gpu(name: str) -> UniversalModel:
    model = CASES[name].model(Classification())
    return UniversalModel(model.module.cuda(), task=Classification(), example=CASES[name].batch(2))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["vit", "resnet", "bert"])
def test_scores_are_those_of_the_cpu(name: str, method: str) -> None:
    data = Data.of([CASES[name].batch(6)])
    here = ANALYZERS[method]().analyze(CASES[name].model(Classification()), data)
    there = ANALYZERS[method]().analyze(on_gpu(name), data)
    for layer in here.usable():
        assert there[layer] == pytest.approx(here[layer], rel=2e-2, abs=1e-4)
