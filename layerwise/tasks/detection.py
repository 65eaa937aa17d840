"""Object detection by set prediction (DETR and its kin): every query gives one class and one box.

Decision: the loss is the one these models are trained with, a matching of queries and objects, taken per image. Detectors that
answer with boxes left over after thresholds and suppression (torchvision's, in eval mode) give nothing that can be differentiated
or compared query by query; they are refused, and never judged by what happens to be the first tensor of their answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.data import Batch
from layerwise.errors import DataError, UserModelError, missing_dependency
from layerwise.tasks._boxes import corners, generalized_iou, matched
from layerwise.tasks._contract import TASKS, Evidence, Figures, Task

L1, GIOU = 5.0, 2.0  # DETR's weights, in the matching and in the loss
ALPHA = 0.25  # the focal loss's weight of a "yes"
EMPTY = 0.1  # DETR's weight of a query that should say "no object"
MOST = 100  # boxes per image that mAP looks at, as COCO does
MEASURED = {"map": "map", "map_50": "map_50", "map_75": "map_75", "mar_100": "mar_100"}


@TASKS.register("detection")
@dataclass(frozen=True)
class Detection(Task):
    """The forward gives ``logits`` ``(samples, queries, C + 1)``, the last class "no object", and ``pred_boxes``
    ``(samples, queries, 4)``: centre x, centre y, width, height as shares of the image. They are packed side by side. With
    `sigmoid` the logits are ``(samples, queries, C)``, one yes or no per class (Deformable DETR).

    Labels: ``(samples, objects, 5)``, class and box of each; rows with class −1 are padding. Loss: DETR's, per image: cross
    entropy (nats; "no object" with weight 0.1) + 5 · L1 + 2 · (1 − GIoU), boxes per object, after the matching of least cost.
    With `sigmoid` the focal loss per object (α ¼, γ 2) takes the place of the cross entropy, as in Deformable DETR.

    Metrics, by torchmetrics: ``map`` (mean over IoU 0.5 … 0.95), ``map_50``, ``map_75``, and ``mar_100``, the mean recall of 100
    boxes. The divergence of such packed outputs (``layer_ablation(metric=kl)``) means nothing: use the loss.

    References
    ----------
    Carion et al. (2020), "End-to-end object detection with transformers"; Zhu et al. (2021), "Deformable DETR".
    """

    sigmoid: bool = False
    name: ClassVar[str] = "detection"
    quality: ClassVar[str] = "map"
    higher_is_better: ClassVar[bool] = True

    def reads(self, raw: Any) -> Tensor | None:
        if isinstance(raw, Mapping) and "pred_boxes" in raw:
            logits = raw.get("logits", raw.get("pred_logits"))
            if isinstance(logits, Tensor):
                return torch.cat([logits, raw["pred_boxes"].to(logits.dtype)], -1)
        if isinstance(raw, tuple) and len(raw) == 2 and all(isinstance(x, Tensor) and x.dim() == 3 for x in raw):
            return torch.cat([raw[0], raw[1].to(raw[0].dtype)], -1)
        raise UserModelError(
            f"Detection reads logits and pred_boxes, one of each per query; the forward gave {type(raw).__name__}.",
            remedy="Detectors that answer with boxes after suppression (torchvision's) are not supported: give a wrapper that "
            "returns (logits, boxes).",
            code="LW-U78",
        )

    def figures(self, output: Tensor, batch: Batch, reference: Tensor | None) -> Figures:
        losses = self._losses(output, batch)
        return {"loss": (losses.double(), torch.ones_like(losses, dtype=torch.float64))}

    def likelihood(self, output: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        return self._losses(output, batch)

    def evidence(self, output: Tensor, batch: Batch) -> Evidence:
        """Boxes (samples, answers, 6): corners, score, class; objects (samples, most objects, 5): class and corners."""
        objects = self._objects(output, batch)
        scores, classes, queries = self._best(output[..., :-4].float())
        boxes = corners(output[..., -4:].float()).gather(1, queries[..., None].expand(-1, -1, 4))
        answers = torch.cat([boxes, scores[..., None], classes[..., None].float()], -1)
        return {"answers": answers, "objects": torch.cat([objects[..., :1], corners(objects[..., 1:])], -1)}

    def overall(self, evidence: Evidence) -> dict[str, float]:
        answers, objects = (evidence[name].cpu() for name in ("answers", "objects"))
        return average_precisions(list(answers), [o[o[:, 0] >= 0] for o in objects])

    def _best(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, classes and queries of the answers, (samples, answers) each: one per query, or the likeliest pairs of both."""
        if not self.sigmoid:
            scores, classes = logits.softmax(-1)[..., :-1].max(-1)
            return scores, classes, torch.arange(logits.shape[1], device=logits.device).expand_as(classes)
        scores, places = logits.sigmoid().flatten(1).topk(min(MOST, logits[0].numel()))
        return scores, places % logits.shape[2], places // logits.shape[2]

    def check(self, batch: Batch, output: Tensor) -> None:
        labels, classes = batch.labels, output.shape[-1] - (4 if self.sigmoid else 5)
        if not isinstance(labels, Tensor) or labels.device.type != "cpu" or labels.dim() != 3:
            return
        wrong = labels[..., 0] >= classes
        if bool(wrong.any()):
            row = int(wrong.any(1).nonzero()[0])
            what = f"An object in row {row} of the batch has the class {int(labels[wrong][0, 0])}, outside the model's {classes}."
            raise DataError(what, remedy="Check the class column; −1 means: padding.", code="LW-D34")
        real = labels[labels[..., 0] >= 0][:, 1:]
        if bool(((real < 0) | (real > 1)).any()):
            what = "A box lies outside 0 … 1."
            raise DataError(what, remedy="Give centre x, centre y, width, height as shares of the image.", code="LW-D33")

    @staticmethod
    def _objects(output: Tensor, batch: Batch) -> Tensor:
        labels = batch.labels
        if not isinstance(labels, Tensor) or labels.dim() != 3 or labels.shape[-1] != 5 or len(labels) != len(output):
            found = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise DataError(
                f"Detection needs labels (samples, objects, 5): class, centre x, centre y, width, height; got {found}."
            )
        return labels.to(output.device).float()

    def _losses(self, output: Tensor, batch: Batch) -> Tensor:
        objects = self._objects(output, batch)
        images = zip(output[..., :-4].float(), output[..., -4:].float(), objects, strict=True)
        return torch.stack([_loss(logits, boxes, each[each[:, 0] >= 0], self.sigmoid) for logits, boxes, each in images])


def _loss(logits: Tensor, boxes: Tensor, objects: Tensor, sigmoid: bool) -> Tensor:
    """One image: logits (queries, classes), boxes (queries, 4), objects (n, 5)."""
    classes, truth = objects[:, 0].long(), objects[:, 1:]
    overlap = generalized_iou(corners(boxes), corners(truth))
    cost, loss = (_focal_cost, _focal_loss) if sigmoid else (_categorical_cost, _categorical_loss)
    queries, found = matched(L1 * torch.cdist(boxes, truth, p=1) + cost(logits, classes) - GIOU * overlap)
    boxed = L1 * (boxes[queries] - truth[found]).abs().sum() + GIOU * (1 - overlap[queries, found]).sum()
    count = max(len(objects), 1)
    return loss(logits, queries, classes[found], count) + boxed / count


def _categorical_cost(logits: Tensor, classes: Tensor) -> Tensor:
    return -logits.softmax(-1)[:, classes]


def _categorical_loss(logits: Tensor, queries: Tensor, classes: Tensor, objects: int) -> Tensor:
    """One class per query, the last of them "no object", which is what queries without an object should say."""
    wanted = torch.full((len(logits),), logits.shape[-1] - 1, device=logits.device)
    wanted[queries] = classes
    weights = torch.ones(logits.shape[-1], device=logits.device)
    weights[-1] = EMPTY
    return F.cross_entropy(logits, wanted, weights)


def _focal_cost(logits: Tensor, classes: Tensor) -> Tensor:
    p = logits.sigmoid()
    yes, no = ALPHA * (1 - p) ** 2 * -(p + 1e-8).log(), (1 - ALPHA) * p**2 * -(1 - p + 1e-8).log()
    return (yes - no)[:, classes]


def _focal_loss(logits: Tensor, queries: Tensor, classes: Tensor, objects: int) -> Tensor:
    """One yes or no per query and class, per object; what is easily told hardly counts (Lin et al., 2017)."""
    wanted = torch.zeros_like(logits)
    wanted[queries, classes] = 1
    p = logits.sigmoid()
    right, weight = torch.where(wanted > 0, p, 1 - p), torch.where(wanted > 0, ALPHA, 1 - ALPHA)
    entropies = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return (weight * (1 - right) ** 2 * entropies).sum() / objects


def average_precisions(answers: list[Tensor], objects: list[Tensor]) -> dict[str, float]:
    """COCO's figures of images with answers (n, 6: corners, score, class) and objects (m, 5: class, corners).

    NaN where there is no object at all. Raises `MissingDependency` without torchmetrics and pycocotools.
    """
    try:
        from torchmetrics.detection import MeanAveragePrecision

        metric: Any = MeanAveragePrecision(box_format="xyxy", iou_type="bbox", max_detection_thresholds=[1, 10, MOST])
    except ImportError as error:
        raise missing_dependency("torchmetrics", "metrics", "The mAP of detection") from error
    metric.warn_on_many_detections = False
    metric.update(
        [{"boxes": a[:, :4], "scores": a[:, 4], "labels": a[:, 5].long()} for a in answers],
        [{"boxes": o[:, 1:], "labels": o[:, 0].long()} for o in objects],
    )
    found = metric.compute()
    return {name: value if (value := float(found[key])) >= 0 else math.nan for name, key in MEASURED.items()}
