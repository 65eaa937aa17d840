"""Per-sample gradients equal the loop; the sweep costs one forward and one backward and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from layerwise.analyzer import Signal, Statistic
from layerwise.analyzers.gradient_based import BranchTaylor
from layerwise.data import Batch
from layerwise.errors import UserModelError
from layerwise.model import UniversalModel
from layerwise.sweep import Seen, Sweep, watched
from layerwise.task import Classification, Fidelity
from tests.models import CASES, Case, images, vectors
from tests.replicas import same_state, sample_gradients, state_of


class Collector(Statistic):
    """Keeps every per-sample gradient (tests only: a real statistic keeps sums)."""

    needs = frozenset({Signal.SAMPLE_GRADIENTS})

    def __init__(self) -> None:
        self.found: dict[tuple[int, int], Tensor] = {}

    def sample_gradient(self, layer: int, parameter: Tensor, gradient: Tensor) -> None:
        assert (layer, id(parameter)) not in self.found, "a parameter was emitted twice"
        self.found[layer, id(parameter)] = gradient.clone()

    def merge_(self, other: Statistic) -> None:
        raise AssertionError

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_(self, state: Mapping[str, Tensor]) -> None:
        raise AssertionError

    @property
    def samples(self) -> int:
        return 0


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def compare_with_loop(model: UniversalModel, batch: Batch, sweep: Sweep, collector: Collector) -> None:
    model.see(batch)
    sweep.batch(batch, seed=3)
    oracle = sample_gradients(model, batch, seed=3)
    seen = 0
    for layer in model.layers:
        for p, parameter in enumerate(layer.module.parameters()):
            expected = torch.stack([row[layer.index][p] for row in oracle])
            actual = collector.found.get((layer.index, id(parameter)), torch.zeros_like(expected))
            torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-6)
            seen += 1
    assert seen


def test_sample_gradients_equal_one_backward_per_sample(case: Case) -> None:
    model, collector = case.model(), Collector()
    compare_with_loop(model, case.batch(4), Sweep(model, [collector]), collector)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 6, 3, padding=1, groups=3),
        nn.Conv2d(6, 6, 3, padding=2, dilation=2, bias=False),
        nn.Conv2d(6, 6, 3, padding="same"),
        nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(6, 6, 1),
        nn.GroupNorm(2, 6),
        nn.BatchNorm2d(6),
        nn.PReLU(6),
        nn.ConvTranspose2d(6, 6, 3, padding=1),
    ],
    ids=lambda x: str(x)[:40],
)
def test_closed_forms_and_vmap_agree_with_the_loop(layer: nn.Module) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), layer, nn.Conv2d(6, 6, 3), nn.Flatten(), nn.LazyLinear(10)).eval()
    batch = images(12)(4)
    net(*batch.args)
    model, collector = UniversalModel(net, task=Classification(), example=batch), Collector()
    compare_with_loop(model, batch, Sweep(model, [collector]), collector)


def test_modules_that_fold_samples_together_are_caught_and_looped() -> None:
    class TokensFirst(nn.Module):
        """(samples, features) → (features, samples) → Linear over what it takes for samples."""

        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(1, 1)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2))
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                rows = self.mix(x.t().reshape(-1, 1)).reshape(4, -1).t()  # the rows of `mix` are feature-major
                x = block(rows)
            return self.head(x)

    torch.manual_seed(0)
    batch = vectors(4)(4)
    net = TokensFirst()
    model = UniversalModel(net, task=Classification(), example=batch)
    layer = model.layers[0]
    collector = Collector()
    sweep = Sweep(model, [collector])
    assert sweep.gradients is not None
    sweep.gradients.owner[net.mix.weight] = (layer.index,)
    sweep.gradients.modules[net.mix] = {"weight": net.mix.weight}
    sweep.batch(batch, seed=0)
    assert net.mix.weight in sweep.gradients.loop, "the shared rows went unnoticed"
    losses = Classification().likelihood(net(*batch.args), batch, torch.Generator())
    expected = torch.stack([torch.autograd.grad(x, net.mix.weight, retain_graph=True)[0] for x in losses])
    torch.testing.assert_close(collector.found[layer.index, id(net.mix.weight)], expected)


def test_what_is_looped_and_reaches_no_output_has_a_gradient_of_zero() -> None:
    class Aside(nn.Module):
        """Two matrices whose products nobody reads."""

        def __init__(self) -> None:
            super().__init__()
            self.both = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2))
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            for linear in self.both:
                linear(x).detach()
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    torch.manual_seed(0)
    batch = vectors(4)(4)
    net = Aside()
    model = UniversalModel(net, task=Classification(), example=batch)
    collector = Collector()
    sweep = Sweep(model, [collector])
    assert sweep.gradients is not None
    aside = net.both[0].weight
    sweep.gradients.owner[aside] = (0,)
    sweep.gradients.loop.add(aside)
    sweep.batch(batch, seed=0)
    assert collector.found[0, id(aside)].shape == (4, 4, 4)
    assert not collector.found[0, id(aside)].any()


def test_an_output_whose_rows_are_not_the_samples_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return torch.cat([x, x])

    batch = vectors(4)(4)
    model = UniversalModel(Twice(), task=Fidelity(), example=batch)
    with pytest.raises(UserModelError, match=r"LW-U78 .*8 rows for 4 samples"):
        Sweep(model, [Collector()]).batch(Batch(batch.args), seed=0)


def test_costs_one_forward_and_one_backward_per_batch_and_one_check() -> None:
    case = CASES["vit"]
    model = case.model(Classification())
    sweep = Sweep(model, [Collector()])
    for _ in range(3):
        sweep.statistics[0].found.clear()  # type: ignore[attr-defined]
        sweep.batch(case.batch(4), seed=0)
    assert (sweep.counts.forwards, sweep.counts.backwards) == (3, 4)


def test_an_observer_of_activations_costs_no_backward() -> None:
    class Watcher(Collector):
        needs = frozenset({Signal.ACTIVATIONS})
        seen: Seen | None = None

        def observe(self, seen: Seen) -> None:
            self.seen = seen

    case, watcher = CASES["vit"], Watcher()
    model = case.model(Classification())
    sweep = Sweep(model, [watcher])
    sweep.batch(case.batch(4), seed=0)
    assert (sweep.counts.forwards, sweep.counts.backwards) == (1, 0)
    assert watcher.seen is not None
    with model.capture([x.name for x in model.layers]) as expected:
        model.predict(case.batch(4))
    for layer in model.layers:
        assert torch.equal(watcher.seen.entering[layer.index], expected[layer.name][0])
        assert torch.equal(watcher.seen.leaving[layer.index], expected[layer.name][1])


def test_a_stream_that_goes_on_as_it_is_is_kept_once_and_one_that_is_written_into_is_not() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            for i, block in enumerate(self.blocks):
                x = block(x)
                if i == 1:
                    x[:, 0] = 5.0  # after the block, through a view
                if i == 2:
                    x = x * 2
            return self.head(x)

    model = UniversalModel(Writes(), task=Classification(), example=vectors()(2))
    with torch.no_grad(), watched(model, vectors()(4), backward=False) as seen:
        model.module(*vectors()(4).args)
    entering, leaving = seen.entering, seen.leaving
    assert entering[1] is leaving[0]
    for i in (1, 2):
        assert entering[i + 1] is not leaving[i]
    assert bool((entering[2][:, 0] == 5.0).all())  # type: ignore[index]  # seen above
    assert not bool((leaving[1][:, 0] == 5.0).any())  # type: ignore[index]
    torch.testing.assert_close(entering[3], leaving[2] * 2)  # type: ignore[operator]


def test_output_gradients_are_those_of_the_summed_loss() -> None:
    class Watcher(Collector):
        needs = frozenset({Signal.GRADIENTS})
        seen: Seen | None = None

        def observe(self, seen: Seen) -> None:
            self.seen = seen

    case, watcher = CASES["residual"], Watcher()
    model, batch = case.model(Classification()), case.batch(4)
    Sweep(model, [watcher]).batch(batch, seed=0)
    outputs: list[Tensor] = []
    for layer in model.layers:
        layer.module.register_forward_hook(lambda m, i, o: outputs.append(o))
    losses = Classification().likelihood(model.module(*batch.args), batch, torch.Generator())
    expected = torch.autograd.grad(losses.sum(), outputs)
    assert watcher.seen is not None
    for actual, gradient in zip(watcher.seen.gradients, expected, strict=True):
        torch.testing.assert_close(actual, gradient)


def test_output_gradients_do_not_depend_on_who_else_shares_the_pass() -> None:
    case = CASES["bert"]
    model = case.model(Classification())
    alone, shared = BranchTaylor(3), BranchTaylor(3)
    Sweep(model, [alone]).batch(case.batch(4), seed=0)
    Sweep(model, [shared, Collector()]).batch(case.batch(4), seed=0)
    torch.testing.assert_close(shared.moments.sums, alone.moments.sums)


def test_nothing_is_left_behind(case: Case) -> None:
    model = case.model()
    model.see(case.batch(3))
    model.module.train()
    for parameter in list(model.module.parameters())[::2]:
        parameter.requires_grad_(False)
        parameter.grad = torch.ones_like(parameter)
    assert model.layers
    before = state_of(model)
    Sweep(model, [Collector()]).batch(case.batch(3), seed=0)
    assert same_state(before, state_of(model)) == []
