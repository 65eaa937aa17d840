"""`METRICS`: what every metric of every task is: which way is better, whether it is a share, its unit. No torch here.

Targets, reports and the leaderboard read this one table; a test holds it to what the tasks compute.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """`share`: 0 … 1, written as percent; `unit`: what a plain number is in."""

    higher_is_better: bool
    share: bool = False
    unit: str = ""


SHARE = Metric(higher_is_better=True, share=True)
ERROR = Metric(higher_is_better=False)
# A report draws the first that it finds, so those that tasks are judged by come first.
METRICS: dict[str, Metric] = {
    "accuracy": SHARE,
    "loss": Metric(higher_is_better=False, unit="nats"),
    "perplexity": ERROR,
    "divergence": Metric(higher_is_better=False, unit="nats"),
    "agreement": SHARE,
    "token_accuracy": SHARE,
    "f1_score": SHARE,
    "precision": SHARE,
    "recall": SHARE,
    "auc": Metric(higher_is_better=True),
    "rmse": ERROR,
    "mse": ERROR,
    "mae": ERROR,
    "r2": Metric(higher_is_better=True),
}
