"""Units inside blocks: found by data flow, seen and silenced at their site, bit-equal to naive silencing by hooks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layerwise.counts import Counts
from layerwise.errors import UsageError
from layerwise.model import UniversalModel
from layerwise.replay import Replay
from layerwise.structure import Layer
from layerwise.sweep import frozen, watched
from layerwise.task import Classification
from layerwise.trace import run
from layerwise.units import GRANULARITIES, granularities
from tests.models import CASES, ResidualNet, images, timm_model, tokens, vectors
from tests.replicas import mask_gradients, same_state, silencing_by_hook, state_of

COUNTS = {  # sublayers, heads, channels
    "vit": (8, 8, 512),
    "resnet": (5, 0, 4736),
    "convnext": (12, 0, 11040),
    "bert": (6, 12, 192),
    "gpt2": (6, 12, 384),
    "llama": (6, 12, 192),
    "t5": (15, 36, 384),
    "albert": (2, 4, 64),
    "encoder": (6, 0, 96),
    "residual": (4, 0, 64),
    "mobilenet": (7, 0, 5824),
}
FOUND = [(name, g) for name, row in COUNTS.items() for g, count in zip(GRANULARITIES[1:], row, strict=True) if count]


def some(layers: list[Layer], count: int = 12) -> list[Layer]:
    return layers[:: max(len(layers) // count, 1)]


def awake(model: UniversalModel) -> UniversalModel:
    """Residual branches that a fresh model scales by 0 or 1e-6 get a share of the output."""
    torch.manual_seed(3)
    for parameter in model.module.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.2, 1.0)
    return model


@pytest.mark.parametrize("name", COUNTS)
def test_finds_the_units_of_every_family(name: str) -> None:
    model = CASES[name].model()
    for granularity, count in zip(GRANULARITIES[1:], COUNTS[name], strict=True):
        if not count:
            with pytest.raises(UsageError, match=rf"LW-U77.*No {granularity} was found"):
                model.at(granularity)
            continue
        view = model.at(granularity)
        assert len(view.layers) == count
        assert [x.index for x in view.layers] == list(range(count))
        assert len({x.name for x in view.layers}) == count
        assert {x.parent for x in view.layers} <= {x.name for x in model.layers}
        assert all(x.granularity == granularity and x.skippable and x.parameters for x in view.layers)


@pytest.mark.parametrize(("name", "granularity"), FOUND)
def test_silencing_by_replay_equals_hooks_bit_for_bit(name: str, granularity: str) -> None:
    case = CASES[name]
    view, batch = awake(case.model()).at(granularity), case.batch(3)
    replay = Replay(view, batch)
    moved = 0
    for unit in some(view.layers, 6):
        with silencing_by_hook([unit]):
            expected = view.predict(batch)
        assert torch.equal(replay.skipping([unit]), expected), unit.name
        with view.skipping([unit.name]):
            assert torch.equal(view.predict(batch), expected), unit.name
        moved += not torch.equal(expected, replay.output)
    assert moved, "silencing changes nothing"


@pytest.mark.parametrize(("name", "granularity"), [("vit", "head"), ("bert", "sublayer"), ("resnet", "channel")])
def test_several_units_are_silenced_together(name: str, granularity: str) -> None:
    case = CASES[name]
    view, batch = case.model().at(granularity), case.batch(3)
    chosen = [view.layers[0], view.layers[1], view.layers[-1]]
    with silencing_by_hook(chosen):
        expected = view.predict(batch)
    assert torch.equal(Replay(view, batch).skipping(chosen), expected)


def test_a_unit_costs_its_block_and_those_after_it() -> None:
    case = CASES["vit"]
    view, counts = case.model().at("head"), Counts()
    replay = Replay(view, case.batch(2), counts)
    assert counts.block_calls == 4
    for unit in view.layers:
        replay.skipping([unit])
    assert counts.block_calls == 4 + 2 * (4 + 3 + 2 + 1)


def test_a_silenced_attention_leaves_the_block_its_feed_forward() -> None:
    case = CASES["vit"]
    view = case.model().at("sublayer")
    block, x = view.module.blocks[0], torch.randn(2, 5, 32)
    with view.skipping(["blocks.0.attn"]), torch.no_grad():
        assert torch.equal(block(x), x + block.mlp(block.norm2(x)))
    with view.skipping(["blocks.0.mlp"]), torch.no_grad():
        assert torch.equal(block(x), x + block.attn(block.norm1(x)))


def test_sublayers_have_the_kind_of_what_they_compute() -> None:
    kinds = {name: [x.kind for x in CASES[name].model().at("sublayer").layers[:2]] for name in ("bert", "resnet", "encoder")}
    assert kinds == {"bert": ["attention", "mlp"], "resnet": ["convolution"] * 2, "encoder": ["attention", "mlp"]}


@pytest.mark.parametrize("name", ["vit", "gpt2", "llama", "residual"])
def test_the_sublayers_of_a_block_share_out_its_parameters(name: str) -> None:
    model = CASES[name].model()
    view = model.at("sublayer")
    for block in model.layers:
        assert sum(x.parameters for x in view.layers if x.parent == block.name) == block.parameters
    for unit in view.layers:
        assert sum(t.numel() for _, t in unit.tensors()) == unit.parameters


@pytest.mark.parametrize(("name", "granularity"), [("vit", "head"), ("gpt2", "head"), ("llama", "channel"), ("gpt2", "channel")])
def test_a_slice_of_the_weights_is_what_reads_the_slice_of_the_site(name: str, granularity: str) -> None:
    case = CASES[name]
    view, batch = case.model().at(granularity), case.batch(2)
    for unit in some(view.layers, 3):
        with view.skipping([unit.name]):
            expected = view.predict(batch)
        kept = [(t, t.detach().clone()) for _, t in unit.tensors()]
        with torch.no_grad():
            for tensor, _ in kept:
                tensor.zero_()  # a view of the model's own weights
            found = view.predict(batch)
            for tensor, old in kept:
                tensor.copy_(old)
        assert torch.allclose(found, expected, atol=1e-6), unit.name
        assert not torch.allclose(expected, view.predict(batch), atol=1e-6)


def test_a_dead_channel_of_a_convolution_is_the_one_whose_weights_are_zero() -> None:
    case = CASES["resnet"]
    view, batch = awake(case.model()).at("channel"), case.batch(2)
    unit = view.layer("layer1.1.conv1:channel3")
    assert [name for name, _ in unit.tensors()] == ["layer1.1.conv1.weight", "layer1.1.bn1.weight", "layer1.1.bn1.bias"]
    with view.skipping([unit.name]):
        expected = view.predict(batch)
    with torch.no_grad():
        for name, tensor in unit.tensors():
            tensor.mul_(0.0 if "bn1" in name else 1.0)
    assert torch.allclose(view.predict(batch), expected, atol=1e-5)
    assert not torch.equal(expected, awake(case.model()).predict(batch))


def test_units_are_views_of_one_tensor() -> None:
    case = CASES["vit"]
    view, batch = case.model(Classification()).at("channel"), case.batch(3)
    with frozen(view.module), watched(view, batch, backward=False) as seen:
        run(view.module, batch)
    one, other = seen.leaving[0], seen.leaving[1]
    assert one is not None
    assert other is not None
    assert one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    assert len(seen.sites) == 4
    assert seen.entering[0] is None
    assert seen.branch(view.layers[0]) is one
    assert seen.complete(view.layers[0])


@pytest.mark.parametrize(
    ("name", "granularity"), [*[(n, g) for n, g in FOUND if n in {"vit", "bert", "t5", "albert"}], ("resnet", "channel")]
)
def test_mask_gradients_are_each_samples_derivative_by_the_mask(name: str, granularity: str) -> None:
    case = CASES[name]
    model, batch = awake(case.model()), case.batch(3)
    model.see(batch)
    view = model.at(granularity)
    with frozen(view.module), watched(view, batch, backward=True) as seen:
        losses = view.task.likelihood(view.output(batch), batch, torch.Generator().manual_seed(5))
        losses.sum().backward()
    found = {unit.name: values[:, i] for units, values in seen.mask_gradients() for i, unit in enumerate(units)}
    assert set(found) == {x.name for x in view.layers}
    with frozen(view.module):
        for unit in some(view.layers, 5):
            assert found[unit.name].tolist() == pytest.approx(mask_gradients(view, batch, unit, 5), rel=2e-3, abs=2e-6), unit.name


def test_the_parts_of_a_split_that_are_not_heads_are_not_called_heads() -> None:
    class Interleaved(nn.Module):
        """Mixes the heads' features one by one: a slice of its projection's input is no head."""

        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (t.unflatten(-1, (4, 2)).permute(0, 3, 1, 2) for t in self.qkv(x).chunk(3, -1))
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
            return x + self.proj(mixed.permute(0, 2, 3, 1).flatten(2))

    net = nn.Sequential(nn.Unflatten(1, (4, 8)), *[Interleaved() for _ in range(3)])
    model = UniversalModel(net, example=vectors(32)(2))
    with pytest.raises(UsageError, match="The heads do not enter a linear operator side by side in: 1, 2, 3"):
        model.at("head")


def test_parallel_branches_are_two_sublayers() -> None:
    class Parallel(nn.Module):
        def __init__(self, first: bool) -> None:
            super().__init__()
            self.first = first
            self.left = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
            self.right = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.left(x) + self.right(x) if self.first else x + (self.left(x) + self.right(x))

    for first in (True, False):
        model = UniversalModel(nn.Sequential(*[Parallel(first) for _ in range(2)]), example=vectors()(2))
        assert [x.name for x in model.at("sublayer").layers] == ["0.left", "0.right", "1.left", "1.right"]


def test_what_cannot_be_identified_is_named_in_a_note() -> None:
    notes = CASES["resnet"].model().at("sublayer").notes
    assert notes == ("No residual branch was found in: layer2.0, layer3.0, layer4.0.",)


def test_heads_of_the_eager_attention_are_found_as_well() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        attn_implementation="eager",
    )  # fmt: skip
    model = UniversalModel(BertForSequenceClassification(config).eval(), example=tokens(labels=True)(2))
    assert len(model.at("head").layers) == 8


def test_windows_folded_into_the_batch_are_seen_as_not_complete() -> None:
    build = timm_model("swin_tiny_patch4_window7_224", img_size=56, embed_dim=16, depths=(2, 2), num_heads=(2, 2))
    model = UniversalModel(build().eval(), task=Classification(), example=images(56)(2))
    view, batch = model.at("head"), images(56)(3)
    with frozen(view.module), watched(view, batch, backward=False) as seen:
        run(view.module, batch)
    assert not seen.complete(view.layers[0])
    assert seen.complete(view.layers[0]) == (seen.leaving[0].shape[0] == 3)


def test_several_granularities_are_one_list_from_coarse_to_fine() -> None:
    view = CASES["vit"].model().at(["head", "block", "sublayer"])
    assert [x.granularity for x in view.layers] == ["block"] * 4 + ["sublayer"] * 8 + ["head"] * 8
    assert [x.index for x in view.layers] == list(range(20))


def test_an_unknown_granularity_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"'heads'.*head"):
        granularities("heads")
    with pytest.raises(UsageError, match="No granularity"):
        granularities([])


def test_reading_units_leaves_no_trace() -> None:
    for name in ("vit", "bert", "resnet"):
        model = CASES[name].model()
        model.module.train()
        assert model.layers
        before = state_of(model)
        model.at(["sublayer", "channel"])
        assert same_state(before, state_of(model)) == []


def test_a_block_that_works_in_place_has_its_branch() -> None:
    class InPlace(ResidualNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    net = InPlace()
    for block in net.blocks:
        block.forward = lambda x, b=block: x.add_(b.down(torch.relu_(b.up(x))))
    view = UniversalModel(net, example=vectors()(2)).at("sublayer")
    assert len(view.layers) == 4
    batch = vectors()(3)
    with silencing_by_hook([view.layers[1]]):
        expected = view.predict(batch)
    assert torch.equal(Replay(view, batch).skipping([view.layers[1]]), expected)
