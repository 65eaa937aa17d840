"""The same code on a GPU gives the same scores. Skipped where there is no CUDA device."""

from __future__ import annotations

import pytest
import torch

from layerwise.analyzer import ANALYZERS
from layerwise.data import Data
from layerwise.distillation import Distillation
from layerwise.model import UniversalModel
from layerwise.supplies import Supplies
from layerwise.task import Classification
from layerwise.tensors import state
from layerwise.training import TrainingSettings, train_
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


def test_a_student_learns_what_it_learns_on_the_cpu() -> None:
    """SGD, in which rounding stays as small as it is; the student differs from its teacher by its weights alone."""
    data = Data.of([CASES["bert"].batch(6), CASES["bert"].batch(5)])
    objective, recipe = Distillation(("response", "feature", "attention")), TrainingSettings(optimizer="sgd", learning_rate=0.05)
    students = []
    for open_ in (lambda: CASES["bert"].model(Classification()), lambda: on_gpu("bert")):
        student, teacher = open_(), open_()
        for module in student.module.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # two devices draw different numbers
        with torch.no_grad():
            for parameter in student.module.parameters():
                parameter.mul_(0.9)
        train_(student, Supplies(training=data, teacher=teacher), objective, recipe)
        students.append(state(student.module))
    for name, here in students[0].items():
        assert torch.allclose(students[1][name].cpu().float(), here.float(), rtol=1e-2, atol=1e-4), name
