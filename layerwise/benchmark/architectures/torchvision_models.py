"""torchvision: the smallest classifier of every model file; all of detection, segmentation and video."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.benchmark.architectures.made import Group, Made, first_that_runs, noise
from layerwise.data import Batch

SIDES = (96, 128, 224, 299)
CLIPS = ((4, 64), (8, 64), (16, 112), (16, 224))  # frames, pixels
SMALL = {"min_size": 128, "max_size": 128}  # what detectors bring images to, where they let one say


class Dense(nn.Module):
    """A detector up to the logits of every anchor or proposal, (samples, boxes, classes), before boxes are left out.

    What is left after suppression is another number of boxes for each image, which no task of samples can read; two-stage
    detectors look at the same grid of proposals in every image.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> Tensor:
        from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

        batch, _ = self.detector.transform(list(images))
        features = self.detector.backbone(batch.tensors)
        if not isinstance(self.detector, GeneralizedRCNN):
            return self.detector.head(list(features.values()))["cls_logits"]
        scores, _ = self.detector.rpn.head(list(features.values()))
        heads = self.detector.roi_heads
        pooled = heads.box_roi_pool(features, [_grid(size) for size in batch.image_sizes], batch.image_sizes)
        logits, _ = heads.box_predictor(heads.box_head(pooled))
        objects = torch.cat([score.flatten(1) for score in scores], 1).mean(1)  # so that the proposals' head is part of it
        return logits.unflatten(0, (len(images), -1)) + objects[:, None, None]


def _grid(size: tuple[int, int]) -> Tensor:
    """Four by four boxes over the image, (16, 4)."""
    height, width = size[0] / 4, size[1] / 4
    return torch.tensor([[x * width, y * height, (x + 1) * width, (y + 1) * height] for y in range(4) for x in range(4)])


def _kinds() -> dict[str, ModuleType]:
    from torchvision import models

    return {"classification": models, "detection": models.detection, "segmentation": models.segmentation, "video": models.video}


def names() -> list[str]:
    from torchvision.models import list_models

    found = [f"{kind}/{name}" for kind, module in _kinds().items() for name in list_models(module=module)]
    return [*_smallest([n for n in found if n.startswith("classification/")]), *(n for n in found if "classification" not in n)]


def _smallest(names: Sequence[str]) -> list[str]:
    """Of each file the one with the fewest parameters: the larger ones are its blocks again."""
    from torchvision.models import get_model_builder

    best: dict[str, tuple[float, str]] = {}
    for name in names:
        family = get_model_builder(name.partition("/")[2]).__module__
        best[family] = min(best.get(family, (math.inf, "")), (_parameters(name), name))
    return [name for _, (_, name) in sorted(best.items())]


def _parameters(name: str) -> int:
    """Counted without memory; some compute with their weights while they are built."""
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in _module(name).parameters())
    except (RuntimeError, NotImplementedError):
        return sum(p.numel() for p in _module(name).parameters())


def make(name: str) -> Made:
    return first_that_runs(_attempts(name))


def _attempts(name: str) -> Iterator[tuple[str, Callable[[], tuple[nn.Module, Batch]]]]:
    kind = name.partition("/")[0]
    if kind == "video":
        for frames, side in CLIPS:
            yield f"{frames} frames of {side} pixels", partial(_built, name, (frames, side, side), {})
        return
    settings: list[dict[str, Any]] = [SMALL, {}] if kind == "detection" else [{}]
    for side in SIDES:
        for chosen in ({"image_size": side}, *settings) if kind == "classification" else settings:
            yield f"{side} pixels", partial(_built, name, (side, side), chosen)


def _built(name: str, shape: tuple[int, ...], settings: dict[str, Any]) -> tuple[nn.Module, Batch]:
    return _module(name, **settings), Batch((noise(2, 3, *shape).sigmoid(),))


def _module(name: str, **settings: Any) -> nn.Module:
    from torchvision.models import get_model

    kind, _, plain = name.partition("/")
    if kind in {"detection", "segmentation"}:
        settings |= {"weights_backbone": None}
    if plain in {"googlenet", "inception_v3"}:
        settings |= {"init_weights": True}
    module = get_model(plain, weights=None, **settings)
    return Dense(module) if kind == "detection" else module


GROUP = Group("torchvision", names, make, lambda name: (name.partition("/")[0],))
