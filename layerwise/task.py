"""A task turns outputs into a loss, metrics and a likelihood to differentiate: the contract, and which one labels suit.

One task is one file in ``layerwise/tasks``, found by its registered name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from layerwise.tasks._contract import TASKS, Figures, Task, as_rows, classes_last, output_mask, task_named, token_ids, token_mask
from layerwise.tasks.classification import Classification, check_classes
from layerwise.tasks.fidelity import Fidelity, cosine_distance, drawn_classes
from layerwise.tasks.language_modelling import LanguageModelling
from layerwise.tasks.multi_label import MultiLabel
from layerwise.tasks.regression import Regression
from layerwise.tasks.segmentation import Segmentation
from layerwise.tasks.token_classification import TokenClassification

__all__ = [
    "TASKS", "Classification", "Fidelity", "Figures", "LanguageModelling", "MultiLabel", "Regression", "Segmentation", "Task",
    "TokenClassification", "as_rows", "check_classes", "classes_last", "cosine_distance", "drawn_classes", "output_mask",
    "suited_task", "task_named", "token_ids", "token_mask",
]  # fmt: skip


def suited_task(labels: Any, output: Tensor) -> Task | None:
    """The task that these labels and outputs are of; None where they are of none. The outputs may be those of other samples.

    Whole numbers are classes: of samples with logits (samples, C), of tokens, of pixels. Real values, several targets, and whole
    numbers for a single output are regression; or yes/no questions, where all that are known are 0 or 1.
    """
    if labels is None or isinstance(labels, Mapping):
        return None
    found = torch.as_tensor(labels)
    if output.dim() not in (1, 2, *DENSE):
        return None
    if output.dim() in DENSE:
        task, dims = DENSE[output.dim()]
        return task() if found.dim() == dims and not found.is_floating_point() else None
    known = found[~found.isnan()] if found.is_floating_point() else found
    single = output.dim() == 1 or output.shape[1] == 1
    whole = not found.is_floating_point() or bool((known == known.round()).all())
    if found.dim() == 1 and whole and not single:
        return Classification()
    return MultiLabel() if bool(((known == 0) | (known == 1)).all()) else Regression()


DENSE: dict[int, tuple[type[Task], int]] = {3: (TokenClassification, 2), 4: (Segmentation, 3)}  # by dimensions, with the labels'
