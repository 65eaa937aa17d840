"""`TaskAdapter`: for each of ten task types, which methods to run first, which layers to look at and what to judge by.

Decision: a strategy is advice in a table, one row per task type with its reason in docs/tasks.md. It is no measurement; where
the faithfulness of methods has been measured, `layerwise.selection` chooses by that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torch import nn

from layerwise.analyzer import ANALYZERS
from layerwise.errors import UsageError, nearest
from layerwise.model import UniversalModel
from layerwise.structure import Layer


class TaskType(StrEnum):
    """What a model is for."""

    CLASSIFICATION = "classification"
    GENERATION = "generation"
    RETRIEVAL = "retrieval"
    RECOMMENDATION = "recommendation"
    DETECTION = "detection"
    SEGMENTATION = "segmentation"
    TRANSLATION = "translation"
    SUMMARIZATION = "summarization"
    QA = "question_answering"
    REINFORCEMENT_LEARNING = "reinforcement_learning"


@dataclass(frozen=True)
class Strategy:
    """Names of analyzers, the name of a focus (a key of `FOCUSES`) and the metrics to judge by."""

    primary_methods: tuple[str, ...]
    focus_layers: str
    metrics: tuple[str, ...]


STRATEGIES = {
    TaskType.CLASSIFICATION: Strategy(
        ("fisher_information", "gradient_based", "layer_ablation"), "all", ("accuracy", "f1_score", "precision", "recall")
    ),
    TaskType.GENERATION: Strategy(
        ("attention_analysis", "gradient_flow", "causal_analysis"), "encoder_decoder", ("perplexity", "bleu", "rouge")
    ),
    TaskType.RECOMMENDATION: Strategy(
        ("fisher_information", "mutual_information", "shap_analysis"),
        "embedding_and_final",
        ("ndcg", "recall", "precision", "auc"),
    ),
    TaskType.RETRIEVAL: Strategy(
        ("layer_correlation", "mutual_information", "layer_ablation"), "upper_half", ("recall_at_1", "recall_at_10", "mrr")
    ),
    TaskType.DETECTION: Strategy(
        ("layer_ablation", "gradient_based", "neuron_activation"), "stage_ends", ("map", "map_50", "mar_100")
    ),
    TaskType.SEGMENTATION: Strategy(
        ("layer_ablation", "layer_correlation", "gradient_based"), "stage_ends", ("mean_iou", "pixel_accuracy", "dice")
    ),
    TaskType.TRANSLATION: Strategy(
        ("attention_analysis", "layer_ablation", "gradient_flow"), "encoder_decoder", ("bleu", "chrf", "ter")
    ),
    TaskType.SUMMARIZATION: Strategy(
        ("attention_analysis", "layer_ablation", "information_bottleneck"), "encoder_decoder", ("rouge", "rouge_1", "rouge_2")
    ),
    TaskType.QA: Strategy(("attention_analysis", "causal_analysis", "gradient_based"), "upper_half", ("exact_match", "f1_score")),
    TaskType.REINFORCEMENT_LEARNING: Strategy(
        ("layer_ablation", "uncertainty_quantification", "gradient_based"), "all", ("mean_return", "success_rate", "kl")
    ),
}


@dataclass(frozen=True)
class TaskAdapter:
    """The strategy of `task_type`: a `TaskType`, its value or its name in any case. Any other text counts as classification."""

    task_type: TaskType | str = TaskType.CLASSIFICATION

    @property
    def resolved(self) -> TaskType:
        """The task type that is used."""
        return _known(self.task_type) or TaskType.CLASSIFICATION

    @property
    def is_known(self) -> bool:
        """Whether `task_type` is one of the ten; if not, the strategy is that of classification."""
        return _known(self.task_type) is not None

    @property
    def strategy(self) -> dict[str, Any]:
        """``primary_methods`` (names of analyzers), ``focus_layers`` (the name of a focus) and ``metrics``."""
        chosen = STRATEGIES[self.resolved]
        return {
            "primary_methods": list(chosen.primary_methods),
            "focus_layers": chosen.focus_layers,
            "metrics": list(chosen.metrics),
        }

    def _get_analysis_strategy(self) -> dict[str, Any]:
        return self.strategy

    def methods(self) -> list[str]:
        """The primary methods that are installed, for ``analyze(methods=...)``."""
        return [name for name in STRATEGIES[self.resolved].primary_methods if name in ANALYZERS]

    def layers(self, model: UniversalModel) -> list[str]:
        """The names of the layers of `model` that this task looks at first, in model order."""
        return focused(model, STRATEGIES[self.resolved].focus_layers)


def focused(model: UniversalModel, focus: str) -> list[str]:
    """The names of the layers of `model` that `focus` means, in model order. Raises `UsageError` for an unknown focus."""
    if focus not in FOCUSES:
        raise UsageError(f"Unknown focus {focus!r}.", remedy=nearest(focus, FOCUSES))
    return [layer.name for layer in FOCUSES[focus](model.layers)]


def _known(given: TaskType | str) -> TaskType | None:
    text = str(given).strip().lower().replace("-", "_").replace(" ", "_")
    return next((t for t in TaskType if text in (t.value, t.name.lower())), None)


def _all(layers: Sequence[Layer]) -> list[Layer]:
    return list(layers)


def _stacks(layers: Sequence[Layer]) -> list[Layer]:
    """Layers of stacks of at least two; all layers where there is no stack."""
    sizes = {x.group: sum(y.group == x.group for y in layers) for x in layers}
    return [x for x in layers if sizes[x.group] > 1] or list(layers)


def _ends(layers: Sequence[Layer]) -> list[Layer]:
    """The first layer (it reads the embedding), the last, and every layer that holds an embedding table itself."""
    tables = (nn.Embedding, nn.EmbeddingBag)
    return [x for x in layers if x in (layers[0], layers[-1]) or any(isinstance(m, tables) for m in x.module.modules())]


def _stage_ends(layers: Sequence[Layer]) -> list[Layer]:
    """The last layer at each shape of the stream: what a pyramid of features is built from."""
    ends = [a for a, b in itertools.pairwise(layers) if a.shape[1:] != b.shape[1:]]
    return [*ends, layers[-1]]


def _upper_half(layers: Sequence[Layer]) -> list[Layer]:
    """The later half of each stack, the larger part where the number is odd."""
    kept = []
    for group in dict.fromkeys(x.group for x in layers):
        stack = [x for x in layers if x.group == group]
        kept += stack[len(stack) // 2 :]
    return sorted(kept, key=lambda x: x.index)


FOCUSES: dict[str, Callable[[Sequence[Layer]], list[Layer]]] = {
    "all": _all,
    "encoder_decoder": _stacks,
    "embedding_and_final": _ends,
    "stage_ends": _stage_ends,
    "upper_half": _upper_half,
}
