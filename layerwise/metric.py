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
GAIN = Metric(higher_is_better=True)
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
    "auc": GAIN,
    "mean_return": GAIN,
    "mean_iou": SHARE,
    "map": SHARE,
    "mrr": SHARE,
    "ndcg": SHARE,
    "exact_match": SHARE,
    "bleu": GAIN,
    "rmse": ERROR,
    "mse": ERROR,
    "mae": ERROR,
    "r2": GAIN,
    "pixel_accuracy": SHARE,
    "dice": SHARE,
    "map_50": SHARE,
    "map_75": SHARE,
    "mar_100": SHARE,
    "recall_at_1": SHARE,
    "recall_at_5": SHARE,
    "recall_at_10": SHARE,
    "chrf": GAIN,
    "ter": ERROR,
    "rouge": SHARE,
    "rouge_1": SHARE,
    "rouge_2": SHARE,
    "success_rate": SHARE,
    "kl": Metric(higher_is_better=False, unit="nats"),
}
