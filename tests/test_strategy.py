"""The ten task types, the three given strategies word for word, and which layers a focus means."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import layerwise
from layerwise.analyzer import ANALYZERS
from layerwise.data import Batch
from layerwise.errors import UsageError
from layerwise.model import UniversalModel
from layerwise.strategy import FOCUSES, STRATEGIES, TaskAdapter, TaskType, focused
from tests.conftest import ROOT
from tests.models import CASES

SIXTEEN = (
    "fisher_information", "gradient_based", "layer_ablation", "mutual_information", "layer_conductance", "shap_analysis",
    "attention_analysis", "neuron_activation", "gradient_flow", "layer_correlation", "information_bottleneck", "causal_analysis",
    "uncertainty_quantification", "spectral_analysis", "topology_analysis", "meta_learning",
)  # fmt: skip
GIVEN = {
    TaskType.CLASSIFICATION: {
        "primary_methods": ["fisher_information", "gradient_based", "layer_ablation"],
        "focus_layers": "all",
        "metrics": ["accuracy", "f1_score", "precision", "recall"],
    },
    TaskType.GENERATION: {
        "primary_methods": ["attention_analysis", "gradient_flow", "causal_analysis"],
        "focus_layers": "encoder_decoder",
        "metrics": ["perplexity", "bleu", "rouge"],
    },
    TaskType.RECOMMENDATION: {
        "primary_methods": ["fisher_information", "mutual_information", "shap_analysis"],
        "focus_layers": "embedding_and_final",
        "metrics": ["ndcg", "recall", "precision", "auc"],
    },
}


@pytest.mark.parametrize("task", GIVEN)
def test_the_given_strategies_are_word_for_word(task: TaskType) -> None:
    assert TaskAdapter(task)._get_analysis_strategy() == TaskAdapter(task).strategy == GIVEN[task]


def test_there_are_ten_types_and_each_has_a_strategy_of_its_own() -> None:
    assert len(TaskType) == 10
    assert TaskType.QA == "question_answering"
    assert set(STRATEGIES) == set(TaskType)
    assert len({(s.primary_methods, s.metrics) for s in STRATEGIES.values()}) == 10


@pytest.mark.parametrize("task", TaskType)
def test_a_strategy_names_methods_of_the_sixteen_and_a_known_focus_and_is_documented(task: TaskType) -> None:
    chosen = STRATEGIES[task]
    assert len(chosen.primary_methods) == len(set(chosen.primary_methods)) == 3
    assert set(chosen.primary_methods) <= set(SIXTEEN)
    assert chosen.focus_layers in FOCUSES
    assert set(TaskAdapter(task).methods()) == set(chosen.primary_methods) & set(ANALYZERS)
    (row,) = [
        line for line in (ROOT / "docs/tasks.md").read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{task}`")
    ]
    for word in (*chosen.primary_methods, chosen.focus_layers, *chosen.metrics):
        assert f"`{word}`" in row, word


@pytest.mark.parametrize("name", ["QA", "qa", "question_answering", "Question-Answering", TaskType.QA])
def test_a_type_is_known_by_value_or_name_in_any_case(name: str) -> None:
    assert TaskAdapter(name).resolved is TaskType.QA


def test_an_unknown_type_counts_as_classification_and_can_be_told() -> None:
    assert TaskAdapter("juggling").strategy == GIVEN[TaskType.CLASSIFICATION]
    assert not TaskAdapter("juggling").is_known
    assert TaskAdapter("retrieval").is_known


@pytest.mark.parametrize("case", ["vit", "resnet", "bert", "t5", "sequential", "albert"])
@pytest.mark.parametrize("focus", FOCUSES)
def test_a_focus_is_never_empty_and_keeps_the_order_of_the_model(case: str, focus: str) -> None:
    model = CASES[case].model()
    names = [x.name for x in model.layers]
    found = focused(model, focus)
    assert found
    assert found == [n for n in names if n in found]


def test_what_each_focus_means() -> None:
    t5, resnet, bert = (CASES[c].model() for c in ("t5", "resnet", "bert"))
    assert focused(t5, "all") == focused(t5, "encoder_decoder") == [x.name for x in t5.layers]
    assert focused(bert, "embedding_and_final") == [bert.layers[0].name, bert.layers[-1].name]
    assert focused(resnet, "stage_ends") == ["layer1.1", "layer2.1", "layer3.1", "layer4.1"]
    assert focused(bert, "upper_half") == [x.name for x in bert.layers[1:]]
    upper = focused(t5, "upper_half")
    assert len([n for n in upper if n.startswith("encoder")]) == len([n for n in upper if n.startswith("decoder")]) == 2


def test_a_layer_that_holds_the_embedding_is_in_focus() -> None:
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Embedding(4, 8)
            self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.relu(self.up(x))) + self.extra.weight.mean(0)

    model = UniversalModel(nn.Sequential(*(Tower() for _ in range(4))), example=Batch((torch.randn(2, 8),)))
    assert focused(model, "embedding_and_final") == ["0", "1", "2", "3"]


def test_an_unknown_focus_is_told_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="upper_half"):
        focused(CASES["residual"].model(), "uper_half")


def test_the_enhanced_registry_is_the_one_registry() -> None:
    registry = layerwise.EnhancedAnalysisRegistry()
    assert dict(registry) == registry.methods == dict(ANALYZERS)
    assert registry.create("gradient_based", form="norm") == ANALYZERS["gradient_based"](form="norm")
    with pytest.raises(UsageError, match="fisher_information"):
        registry["fischer_information"]


def test_every_analyzers_class_is_a_name_of_the_package() -> None:
    for cls in ANALYZERS.values():
        assert getattr(layerwise, cls.__name__) is cls
    for name in ("NoSuchAnalyzer", "nothing"):
        with pytest.raises(AttributeError, match=name):
            getattr(layerwise, name)
