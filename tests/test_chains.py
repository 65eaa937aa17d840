"""Chains of blocks in nets that are built to mislead: what is opened, what stays whole, what counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from layerwise.chains import covered, find_layers
from layerwise.data import Batch
from layerwise.structure import read_layers
from layerwise.trace import Use, traced
from tests.models import CASES, Residual, images, vectors


def names(net: nn.Module, batch: Batch) -> list[str]:
    return [layer.name for layer in read_layers(net.eval(), batch)]


class Decoder(nn.Module):
    """Two attentions of one class, which hold less of the block than what follows them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention, self.crossed = Residual(width), Residual(width)
        self.up, self.down = nn.Linear(width, 8 * width), nn.Linear(8 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.crossed(self.attention(x))
        return x + self.down(torch.relu(self.up(x)))


class Scaled(nn.Conv2d):
    """A convolution with a gain per channel, which has four dimensions and is no matrix."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, padding=1)
        self.gain = nn.Parameter(torch.ones(width, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight * self.gain, self.bias, padding=1)


class Convolved(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = Scaled(width), Scaled(width)
        self.last = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.second(torch.relu(self.first(x))))


class Branching(nn.Module):
    """Two chains side by side, as in HRNet, between a large transition and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.transition = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))
        self.left = nn.Sequential(Residual(8), Residual(8))
        self.right = nn.Sequential(Residual(8), Residual(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.transition(x)
        return self.head(self.left(x) + self.right(x))


class Towers(nn.Module):
    """A second tower, larger than the first, that this input never reaches, and a table that is looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.zeros(100, 8))
        self.seen = nn.ModuleList(Residual(8) for _ in range(2))
        self.other = nn.ModuleList(Residual(32) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.places[0]
        for block in self.seen:
            x = block(x)
        return self.head(x)


class Weighted(nn.Module):
    """The large matrix before the blocks is multiplied as a product of two parameters, never by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Module()
        self.large.direction = nn.Parameter(torch.randn(64, 8))
        self.large.back = nn.Linear(64, 8)
        self.large.forward = lambda x: self.large.back(x @ (self.large.direction * 2).T)  # type: ignore[method-assign]
        self.blocks = nn.Sequential(Residual(8), Residual(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.large(x))


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), Convolved(8), Convolved(8))


FOUND: dict[str, tuple[Callable[[], nn.Module], Batch, list[str]]] = {
    "a block whose inner chain holds little of it stays whole": (
        lambda: nn.Sequential(*(Decoder(8) for _ in range(2))),
        vectors()(2),
        ["0", "1"],
    ),
    "convolutions with a gain are no blocks": (convolutional, images()(2), ["1", "2"]),
    "parallel chains, and the transition because it is large": (
        Branching,
        vectors()(2),
        ["transition", "left.0", "left.1", "right.0", "right.1"],
    ),
    "a tower that does not run and a table do not count": (Towers, vectors()(2), ["seen.0", "seen.1"]),
    "a scaled matrix is a matrix": (Weighted, vectors()(2), ["large", "blocks.0", "blocks.1"]),
    "a single layer that changes the shape is opened": (
        lambda: nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))),
        vectors()(2),
        ["0.0", "0.2"],
    ),
}


@pytest.mark.parametrize("what", FOUND)
def test_finds(what: str) -> None:
    build, batch, expected = FOUND[what]
    assert names(build(), batch) == expected


def test_stages_are_opened_also_where_each_ends_in_a_large_transition() -> None:
    class Stage(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.blocks = nn.Sequential(Residual(width), Residual(width))
            self.shrink = nn.Linear(width, 2 * width)

        def forward(self, x: Tensor) -> Tensor:
            return self.shrink(self.blocks(x))

    net = nn.Sequential(Stage(8), Stage(16), Stage(32))
    assert names(net, vectors()(2)) == [f"{i}.blocks.{k}" for i in range(3) for k in range(2)]


def test_a_block_that_stands_in_a_row_elsewhere_is_one_where_it_stands_alone() -> None:
    class Stage(nn.Module):
        def __init__(self, width: int, depth: int) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*(Residual(width) for _ in range(depth)))
            self.shrink = nn.Linear(width, 2 * width)

        def forward(self, x: Tensor) -> Tensor:
            return self.shrink(self.blocks(x))

    net = nn.Sequential(Stage(8, 1), Stage(16, 2))
    assert names(net, vectors()(2)) == ["0.blocks.0", "1.blocks.0", "1.blocks.1"]


def test_layers_of_which_none_keeps_the_shape_are_not_torn_into_convolutions() -> None:
    class Down(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv, self.mix = nn.Conv2d(width, 2 * width, 3, 2, 1), nn.Conv2d(2 * width, 2 * width, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(torch.relu(self.conv(x)))

    assert names(nn.Sequential(Down(3), Down(6), Down(12)), images()(2)) == ["0", "1", "2"]


def test_a_container_of_its_own_kind_is_opened_for_the_chain_inside() -> None:
    class Body(nn.Module):
        """Keeps the shape, and holds more outside its blocks than in them."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Residual(8) for _ in range(2))
            self.up, self.down = nn.Linear(8, 64), nn.Linear(64, 8)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x + self.down(torch.relu(self.up(x)))

    class Piped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
            self.body = Body()
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(self.stem(x)))

    assert {"body.blocks.0", "body.blocks.1", "body.up", "body.down"} <= set(names(Piped(), vectors()(2)))


def test_what_a_parameter_is_read_for() -> None:
    net = Towers()
    uses = {name: traced(net, vectors()(2)).uses.get(p) for name, p in net.named_parameters()}
    assert uses["places"] is Use.TABLE
    assert uses["seen.0.up.weight"] is uses["seen.1.down.weight"] is Use.WEIGHT
    assert uses["head.weight"] is Use.HEAD
    assert uses["other.0.up.weight"] is None


def test_the_share_leaves_out_the_head() -> None:
    net = Branching()
    root = traced(net, vectors()(2))
    of = {name: sum(p.numel() for p in net.get_submodule(name).parameters()) for name in ("transition", "left", "right")}
    share = covered(root, {net.left, net.right})
    assert share == pytest.approx((of["left"] + of["right"]) / sum(of.values()))


@pytest.mark.parametrize("name", ["resnet", "bert", "t5"])
def test_a_model_without_data_has_the_same_layers(name: str) -> None:
    case = CASES[name]
    model = case.model()
    expected = [(x.name, x.kind, x.parameters, x.macs, x.shape, x.skippable, x.reason) for x in model.layers]
    found = read_layers(model.module.to("meta"), model.example)
    assert [(x.name, x.kind, x.parameters, x.macs, x.shape, x.skippable, x.reason) for x in found] == expected


@pytest.mark.parametrize("name", ["residual", "albert"])
def test_reading_runs_the_model_once(name: str) -> None:
    model = CASES[name].model()
    ran: list[int] = []
    with_hook = model.module.register_forward_hook(lambda *_: ran.append(1))
    assert read_layers(model.module, model.example)
    with_hook.remove()
    assert ran == [1]


def test_layers_come_in_the_order_of_their_first_calls() -> None:
    for name in ("t5", "residual"):
        model = CASES[name].model()
        firsts = [calls[0].order for _, calls in find_layers(traced(model.module, model.example))]
        assert firsts == sorted(firsts)
