"""IoU and Dice of the whole data set, against torchmetrics and by hand; ignored pixels; coarse outputs; end to end."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import layerwise
from layerwise.data import Batch, Data
from layerwise.errors import DataError
from layerwise.task import Segmentation
from tests.tasks.splitting import SPLITS, evaluated


def masks() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(12, 4, 5, 6, generator=generator), torch.randint(0, 3, (12, 5, 6), generator=generator)
    labels[torch.rand(12, 5, 6, generator=generator) < 0.2] = 255
    return logits, labels


@pytest.mark.parametrize("sizes", SPLITS)
def test_figures_are_those_of_all_pixels_however_the_data_are_split(sizes: tuple[int, ...]) -> None:
    from torchmetrics.functional.classification import multiclass_jaccard_index

    logits, labels = masks()
    means = evaluated(Segmentation(), logits, Batch((logits,), {}, labels), sizes).means()
    assert means["mean_iou"] == pytest.approx(float(multiclass_jaccard_index(logits, labels, 4, ignore_index=255)), rel=1e-6)
    keep, answers = labels != 255, logits.argmax(1)
    assert means["pixel_accuracy"] == pytest.approx(float((answers == labels)[keep].double().mean()), abs=1e-12)
    dice = [2 * int(((answers == c) & (labels == c)).sum()) / int(((answers == c) & keep).sum() + (labels == c).sum())
            for c in range(4)]  # fmt: skip
    assert means["dice"] == pytest.approx(sum(dice) / 4, rel=1e-12)
    assert means["loss"] == pytest.approx(float(F.cross_entropy(logits, labels, ignore_index=255)), rel=1e-6)


def test_two_by_two_by_hand() -> None:
    labels = torch.tensor([[[0, 0], [1, 255]]])
    logits = F.one_hot(torch.tensor([[[0, 1], [1, 1]]]), 3).movedim(-1, 1).float()
    means = evaluated(Segmentation(), logits, Batch((logits,), {}, labels), (1,)).means()
    assert means["mean_iou"] == 0.5  # class 0: 1 of 2; class 1: 1 of 2; class 2 occurs nowhere
    assert means["dice"] == pytest.approx(2 / 3)
    assert means["pixel_accuracy"] == pytest.approx(2 / 3)


def test_coarse_outputs_are_enlarged_to_the_labels() -> None:
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 16, 16))
    large = F.interpolate(logits, size=(16, 16), mode="bilinear", align_corners=False)
    found, wanted = (evaluated(Segmentation(), x, Batch((x,), {}, labels), (2,)).means() for x in (logits, large))
    assert found == wanted


def test_a_label_outside_the_classes_names_its_row() -> None:
    labels = torch.zeros(3, 2, 2, dtype=torch.long)
    labels[1, 0, 1] = 7
    with pytest.raises(DataError, match=r"LW-D34 .*row 1 .*labelled 7.* 3 classes"):
        Segmentation().check(Batch((), {}, labels), torch.randn(3, 3, 2, 2))


class FullyConvolutional(nn.Module):
    """As torchvision's segmentation networks answer: a dict with ``out``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(3)))
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.head(self.blocks(self.stem(x)))}


def test_methods_without_labels_compare_pixels() -> None:
    torch.manual_seed(0)
    network, images, labels = FullyConvolutional(), torch.randn(4, 3, 8, 8), torch.randint(0, 3, (4, 8, 8))
    labels[0, :2] = 255
    model = layerwise.load(network, task="segmentation")
    methods = ["layer_ablation(metric=kl)", "layer_ablation(metric=accuracy)", "uncertainty_quantification", "layer_conductance"]
    report = layerwise.analyze(model, Data.of([(images, labels)]), methods)
    name = next(layer.name for layer in model.layers if layer.skippable)
    with torch.no_grad():
        whole, damaged = network(images)["out"], None
        with model.skipping([name]):
            damaged = network(images)["out"]
    p, q = whole.double().log_softmax(1), damaged.double().log_softmax(1)
    assert report.scores["layer_ablation"][name] == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-6)
    keep = labels != 255
    lost = [(x.argmax(1) == labels)[keep].double().mean() for x in (whole, damaged)]
    assert report.scores["layer_ablation(metric=accuracy)"][name] == pytest.approx(float(lost[0] - lost[1]), abs=1e-9)
    assert all(report.scores[method].usable() for method in report.scores)


def test_a_network_with_masks_is_known_for_segmentation_and_analyzed() -> None:
    torch.manual_seed(0)
    network, images, labels = FullyConvolutional(), torch.randn(6, 3, 8, 8), torch.randint(0, 3, (6, 8, 8))
    model = layerwise.load(network)
    report = layerwise.analyze(
        model, Data.of([(images[:4], labels[:4]), (images[4:], labels[4:])]), ["gradient_based", "layer_ablation"]
    )
    assert report.task == "segmentation"
    with torch.no_grad():
        loss = F.cross_entropy(network(images)["out"], labels)
    assert report.metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert report.removal is not None
    assert report.removal.metric == "mean_iou"
    assert all(math.isfinite(v) and v > 0 for v in report.scores["gradient_based"].usable().values())
