"""A task turns outputs into a loss, metrics and a likelihood to differentiate: the contract, and the three that all models share.

One task is one file in ``layerwise/tasks``, found by its registered name.
"""

from __future__ import annotations

from layerwise.tasks._contract import TASKS, Figures, Task, as_rows, output_mask, task_named, token_ids, token_mask
from layerwise.tasks.classification import Classification, check_classes
from layerwise.tasks.fidelity import Fidelity, cosine_distance, drawn_classes
from layerwise.tasks.language_modelling import LanguageModelling

__all__ = [
    "TASKS", "Classification", "Fidelity", "Figures", "LanguageModelling", "Task", "as_rows", "check_classes", "cosine_distance",
    "drawn_classes", "output_mask", "task_named", "token_ids", "token_mask",
]  # fmt: skip
