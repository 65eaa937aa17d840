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
EMPTY = 0.1  # DETR's weight of a query that should say "no object"
MOST = 100  # boxes per image that mAP looks at, as COCO does
MEASURED = {"map": "map", "map_50": "map_50", "map_75": "map_75", "mar_100": "mar_100"}


@TASKS.register("detection")
@dataclass(frozen=True)
class Detection(Task):
    """The forward gives ``logits`` ``(samples, queries, C + 1)``, the last class "no object", and ``pred_boxes``
    ``(samples, queries, 4)``: centre x, centre y, width, height as shares of the image. They are packed side by side.

    Labels: ``(samples, objects, 5)``, class and box of each; rows with class −1 are padding. Loss: DETR's, per image: cross
    entropy (nats; "no object" with weight 0.1) + 5 · L1 + 2 · (1 − GIoU), boxes per object, after the matching of least cost.
    Metrics, by torchmetrics: ``map`` (mean over IoU 0.5 … 0.95), ``map_50``, ``map_75``, and ``mar_100``, the mean recall of 100
    boxes. The divergence of such packed outputs (``layer_ablation(metric=kl)``) means nothing: use the loss.

    References
    ----------
    Carion et al. (2020), "End-to-end object detection with transformers".
    """

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
        """Boxes (samples, queries, 6): corners, score, class; objects (samples, most objects, 5): class and corners."""
        objects = self._objects(output, batch)
        scores, classes = output[..., :-4].float().softmax(-1)[..., :-1].max(-1)
        answers = torch.cat([corners(output[..., -4:].float()), scores[..., None], classes[..., None].float()], -1)
        return {"answers": answers, "objects": torch.cat([objects[..., :1], corners(objects[..., 1:])], -1)}

    def overall(self, evidence: Evidence) -> dict[str, float]:
        answers, objects = (evidence[name].cpu() for name in ("answers", "objects"))
        return average_precisions(list(answers), [o[o[:, 0] >= 0] for o in objects])

    def check(self, batch: Batch, output: Tensor) -> None:
        labels, classes = batch.labels, output.shape[-1] - 5
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
        return torch.stack(
            [_loss(o[:, :-4].float(), o[:, -4:].float(), t[t[:, 0] >= 0]) for o, t in zip(output, objects, strict=True)]
        )


def _loss(logits: Tensor, boxes: Tensor, objects: Tensor) -> Tensor:
    """One image: logits (queries, C + 1), boxes (queries, 4), objects (n, 5)."""
    classes, truth = objects[:, 0].long(), objects[:, 1:]
    overlap = generalized_iou(corners(boxes), corners(truth))
    cost = L1 * torch.cdist(boxes, truth, p=1) - logits.softmax(-1)[:, classes] - GIOU * overlap
    queries, found = matched(cost)
    wanted = torch.full((len(logits),), logits.shape[-1] - 1, device=logits.device)
    wanted[queries] = classes[found]
    weights = torch.ones(logits.shape[-1], device=logits.device)
    weights[-1] = EMPTY
    boxed = L1 * (boxes[queries] - truth[found]).abs().sum() + GIOU * (1 - overlap[queries, found]).sum()
    return F.cross_entropy(logits, wanted, weights) + boxed / max(len(objects), 1)


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
