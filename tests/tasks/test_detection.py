"""DETR's loss against transformers' own, mAP against torchmetrics' and by hand, and what is refused."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import layerwise
from layerwise.data import Batch, Data
from layerwise.errors import DataError, UserModelError
from layerwise.model import UniversalModel
from layerwise.tasks._boxes import generalized_iou
from layerwise.tasks.detection import Detection
from tests.tasks.splitting import SPLITS, evaluated


def scenes(count: int = 12, queries: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed outputs of queries near the objects, and up to three objects per image."""
    generator = torch.Generator().manual_seed(0)
    objects = torch.full((count, 3, 5), -1.0)
    for i in range(count):
        for j in range(i % 4):
            centre, side = torch.rand(2, generator=generator) * 0.4 + 0.3, torch.rand(2, generator=generator) * 0.3 + 0.2
            objects[i, j] = torch.cat([torch.tensor([float((i + j) % 2)]), centre, side])
    boxes = torch.rand(count, queries, 4, generator=generator) * 0.2 + 0.3
    boxes[:, :3] = torch.where(
        objects[..., 1:] >= 0, objects[..., 1:] + 0.03 * torch.randn(count, 3, 4, generator=generator), boxes[:, :3]
    )
    logits = torch.randn(count, queries, 3, generator=generator)
    return torch.cat([logits, boxes.clamp(0.01, 0.99)], -1), objects


def yolos() -> nn.Module:
    from transformers import YolosConfig, YolosForObjectDetection

    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=[32, 32], patch_size=16,
        num_detection_tokens=5, num_labels=2, eos_coefficient=0.1,
    )  # fmt: skip
    return YolosForObjectDetection(config).eval()


def test_the_loss_of_an_image_is_that_of_transformers() -> None:
    module, images, (_, objects) = yolos(), torch.randn(4, 3, 32, 32), scenes(4)
    task = Detection()
    with torch.no_grad():
        for i in range(4):
            real = objects[i][objects[i, :, 0] >= 0]
            target = {"class_labels": real[:, 0].long(), "boxes": real[:, 1:]}
            wanted = module(images[i : i + 1], labels=[target]).loss
            found = task.losses(task.reads(module(images[i : i + 1])), Batch((images[i : i + 1],), {}, objects[i : i + 1]), None)
            assert float(found[0]) == pytest.approx(float(wanted), rel=1e-5), f"{len(real)} objects"


def test_with_one_yes_or_no_per_class_it_is_that_of_deformable_detr() -> None:
    from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss

    config = SimpleNamespace(
        class_cost=1, bbox_cost=5, giou_cost=2, num_labels=3, focal_alpha=0.25, auxiliary_loss=False,
        bbox_loss_coefficient=5, giou_loss_coefficient=2,
    )  # fmt: skip
    output, objects = scenes(4)
    found, _ = Detection(sigmoid=True).losses(output, Batch((output,), {}, objects), None)
    for i in range(4):
        real = objects[i][objects[i, :, 0] >= 0]
        target = {"class_labels": real[:, 0].long(), "boxes": real[:, 1:]}
        wanted, *_ = DeformableDetrForObjectDetectionLoss(
            output[i : i + 1, :, :3], [target], "cpu", output[i : i + 1, :, 3:], config
        )
        assert float(found[i]) == pytest.approx(float(wanted), rel=1e-5), f"{len(real)} objects"


def test_with_one_yes_or_no_per_class_a_query_may_answer_several_times() -> None:
    logits = torch.full((12, 2, 3), -9.0)
    logits[:, 0, 0], logits[:, 0, 1] = 9.0, 8.0  # the same box is both
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.2, 0.2, 0.1, 0.1]]).expand(12, -1, -1)
    objects = torch.tensor([[0.0, 0.5, 0.5, 0.2, 0.2], [1.0, 0.5, 0.5, 0.2, 0.2]]).expand(12, -1, -1)
    output = torch.cat([logits, boxes], -1)
    means = evaluated(Detection(sigmoid=True), output, Batch((output,), {}, objects)).means()
    assert means["map"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("sizes", SPLITS)
def test_map_is_that_of_all_images_however_the_data_are_split(sizes: tuple[int, ...]) -> None:
    from torchmetrics.detection import MeanAveragePrecision

    output, objects = scenes()
    means = evaluated(Detection(), output, Batch((output,), {}, objects), sizes).means()
    metric = MeanAveragePrecision(box_format="cxcywh")
    scores, classes = output[..., :3].softmax(-1)[..., :2].max(-1)
    for i in range(12):
        real = objects[i][objects[i, :, 0] >= 0]
        metric.update([{"boxes": output[i, :, 3:], "scores": scores[i], "labels": classes[i]}],
                      [{"boxes": real[:, 1:], "labels": real[:, 0].long()}])  # fmt: skip
    wanted = metric.compute()
    for name in ("map", "map_50", "map_75", "mar_100"):
        assert means[name] == pytest.approx(float(wanted[name]), abs=1e-6)
    assert 0.1 < means["map_50"] < 0.9


def test_right_boxes_have_map_one_and_moved_ones_none() -> None:
    _, objects = scenes()
    sure = torch.full((12, 3, 3), -9.0)
    sure[..., 2] = 9.0
    for i, j in (objects[..., 0] >= 0).nonzero().tolist():
        sure[i, j] = torch.tensor([9.0 if objects[i, j, 0] == c else -9.0 for c in range(3)])
    for moved, wanted in ((0.0, 1.0), (0.4, 0.0)):
        boxes = torch.where(objects[..., 1:] >= 0, objects[..., 1:], 0.1).clone()
        boxes[..., 0] += moved
        output = torch.cat([sure, boxes], -1)
        assert evaluated(Detection(), output, Batch((output,), {}, objects)).means()["map_50"] == pytest.approx(wanted, abs=1e-6)


def test_without_any_object_there_is_no_map() -> None:
    output, objects = scenes()
    objects[:] = -1
    means = evaluated(Detection(), output, Batch((output,), {}, objects)).means()
    assert math.isnan(means["map"])
    assert math.isfinite(means["loss"])


def test_the_generalized_iou_is_torchvisions() -> None:
    from torchvision.ops import generalized_box_iou

    torch.manual_seed(0)
    a, b = (torch.cat([x[:, :2], x[:, :2] + x[:, 2:]], -1) for x in torch.rand(2, 7, 4))
    torch.testing.assert_close(generalized_iou(a, b), generalized_box_iou(a, b))


def test_a_detector_is_analyzed_by_name() -> None:
    module, images, (_, objects) = yolos(), torch.randn(4, 3, 32, 32), scenes(4)
    model = layerwise.load(module, task="detection")
    data = Data.of([Batch((), {"pixel_values": images}, objects)])
    report = layerwise.analyze(model, data, ["gradient_based", "layer_ablation"])
    task = Detection()
    with torch.no_grad():
        losses, _ = task.losses(task.reads(module(images)), data[0], None)
    assert report.metrics["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert all(math.isfinite(v) and v > 0 for v in report.scores["gradient_based"].usable().values())
    assert report.removal is not None
    assert report.removal.metric == "map"


@pytest.mark.parametrize(
    "answer", [[{"boxes": torch.zeros(1, 4), "scores": torch.ones(1)}], torch.zeros(2, 3), {"logits": torch.zeros(2, 3)}]
)
def test_an_answer_that_is_not_one_box_per_query_is_refused(answer: Any) -> None:
    with pytest.raises(UserModelError, match=r"LW-U78 .*not supported"):
        UniversalModel(nn.Identity(), task=Detection()).read(answer)


def test_a_list_of_boxes_per_image_is_never_read_as_the_first_ones() -> None:
    class Suppressed(nn.Module):
        def forward(self, images: torch.Tensor) -> list[dict[str, torch.Tensor]]:
            return [{"boxes": image[0, :2, :4], "scores": image[0, 0, :2]} for image in images]

    with pytest.raises(UserModelError, match=r"LW-U78 .*after suppression"):
        UniversalModel(Suppressed()).predict(torch.rand(3, 3, 8, 8))


@pytest.mark.parametrize(
    ("objects", "said"),
    [([[[5.0, 0.5, 0.5, 0.1, 0.1]]], "LW-D34 .*class 5"), ([[[0.0, 50.0, 50.0, 10.0, 10.0]]], "LW-D33 .*shares of the image")],
)
def test_wrong_objects_are_told(objects: list[Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        Detection().check(Batch((), {}, torch.tensor(objects)), torch.randn(1, 5, 7))
