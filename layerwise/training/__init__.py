"""Training, for whatever learns: fine-tuning, distillation, rounding that is learned.

Decision: one loop in plain torch. All that a step depends on is its number: the order of the batches, the learning rate and the
random numbers of dropout follow from seed and step, so that a run that was interrupted goes on to the same bits. Several devices
share each batch, and not the data set, so that the recipe means the same on one and on eight.
"""

from __future__ import annotations

from layerwise.training.loop import AfterStep, BeforeStep, only_training, train_, untrainable
from layerwise.training.masks import KeptZeros, kept_zeros, zeros_kept
from layerwise.training.objective import TASK_LOSS, Given, Lesson, Objective, Portion, TaskLoss, task_loss, training_output
from layerwise.training.record import Epoch, Trained
from layerwise.training.settings import TrainingSettings, recipe_of

__all__ = [
    "TASK_LOSS", "AfterStep", "BeforeStep", "Epoch", "Given", "KeptZeros", "Lesson", "Objective", "Portion", "TaskLoss",
    "Trained", "TrainingSettings", "kept_zeros", "only_training", "recipe_of", "task_loss", "train_", "training_output",
    "untrainable", "zeros_kept",
]  # fmt: skip
