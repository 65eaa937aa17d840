"""Distillation: a student learns to do what a teacher does. One file per objective; they find their way into `TERMS` themselves.

Decision: an objective is a pure function of what is *seen* of student and teacher on one batch (outputs, features of paired
layers, attention maps); who runs them, what is cached, how layers are paired and how several objectives are weighed is settled
once, in `Distillation`, which the training loop takes as it takes any objective.
"""

from __future__ import annotations

from layerwise.distillation.matching import match, match_by_scores
from layerwise.distillation.objective import Distillation, paired_layers
from layerwise.distillation.seen import Seen
from layerwise.distillation.student import cut_student
from layerwise.distillation.teacher import Memory
from layerwise.distillation.term import TERMS, Term

__all__ = ["TERMS", "Distillation", "Memory", "Seen", "Term", "cut_student", "match", "match_by_scores", "paired_layers"]
