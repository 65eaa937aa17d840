"""ResNet-20, -32, … for CIFAR-10 (He et al. 2016, section 4.2), with the parameter names of akamaster/pytorch_resnet_cifar10.

Open it with ``examples/cifar_resnet.py:resnet20`` and weights in safetensors. The shortcut has no parameters (option A of the
paper): where a stage halves the image and doubles the channels, it takes every second pixel and pads channels of zeros.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

# read by layerwise: images of 32×32, values 0 … 1 scaled by ImageNet's mean and standard deviation
PRETRAINED_CFG = {
    "input_size": (3, 32, 32),
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_pct": 1.0,
    "num_classes": 10,
}


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch normalization, and the shortcut around them."""

    def __init__(self, entering: int, leaving: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(entering, leaving, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(leaving)
        self.conv2 = nn.Conv2d(leaving, leaving, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(leaving)
        self.stride, self.added = stride, leaving - entering

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        """Option A: no parameters."""
        if self.stride == 1 and not self.added:
            return x
        half = self.added // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.added - half))


class CifarResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels with `blocks` blocks each: 6 · blocks + 2 layers with weights."""

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, 1)
        self.layer2 = _stage(16, 32, blocks, 2)
        self.layer3 = _stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, classes)
        self.pretrained_cfg = PRETRAINED_CFG

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(out.mean((2, 3)))


def _stage(entering: int, leaving: int, blocks: int, stride: int) -> nn.Sequential:
    widths = [(entering, stride), *[(leaving, 1)] * (blocks - 1)]
    return nn.Sequential(*(BasicBlock(width, leaving, step) for width, step in widths))


def resnet20() -> CifarResNet:
    """270 thousand parameters, 41 million multiply-accumulates per image."""
    return CifarResNet(3)


def resnet32() -> CifarResNet:
    """464 thousand parameters."""
    return CifarResNet(5)
