"""Completeness, the linear case, captum's values, a slow twin, and the number of passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from layerwise.analyzers.layer_conductance import Conductances, LayerConductanceAnalyzer, conductances
from layerwise.counts import Counts
from layerwise.data import Batch, Data
from layerwise.errors import UsageError, UserModelError
from layerwise.model import UniversalModel
from layerwise.observe import observe
from layerwise.scores import Status
from layerwise.task import Classification, Fidelity
from layerwise.walk import Walk
from tests.models import CASES, ResidualNet, vectors


def walk_over(model: UniversalModel, batch: Batch) -> Walk:
    model.see(batch)
    return Walk(model, batch, 0, torch.arange(batch.size), Counts())


def found(model: UniversalModel, batch: Batch, **settings: object) -> Conductances:
    return conductances(walk_over(model, batch), LayerConductanceAnalyzer(**settings))  # type: ignore[arg-type]


def residual(depth: int = 3) -> UniversalModel:
    torch.manual_seed(0)
    return UniversalModel(ResidualNet(depth).double(), task=Classification(), example=double(2))


def double(n: int) -> Batch:
    return vectors()(n).map(lambda t: t.double() if t.is_floating_point() else t)


def completeness_error(conductance: Conductances) -> float:
    """The largest over layers of Σ_n |Σ_j Cond − ΔF| / Σ_n |ΔF|."""
    gaps = (conductance.totals - conductance.change).abs().sum(1)
    return float(gaps.max() / conductance.change.abs().sum())


@pytest.mark.parametrize("name", ["residual", "vit", "bert", "gpt2", "llama"])
def test_over_a_full_cut_the_sum_is_the_change_of_the_target_and_the_trapezoid_comes_closer(name: str) -> None:
    case = CASES[name]
    batch = case.batch(4)
    errors = {rule: completeness_error(found(case.model(), batch, rule=rule)) for rule in ("trapezoid", "left")}
    assert errors["trapezoid"] < 0.01
    assert errors["trapezoid"] < 0.3 * errors["left"]


def test_units_sum_to_the_totals() -> None:
    case = CASES["vit"]
    whole = found(case.model(), case.batch(3), of="output")
    for units, total in zip(whole.units, whole.totals, strict=True):
        assert units is not None
        torch.testing.assert_close(units.flatten(1).double().sum(1), total, rtol=1e-5, atol=1e-6)


def test_a_path_that_the_steps_cannot_follow_has_no_score() -> None:
    """A stream of zeros under a normalization: the slope there is ten orders of magnitude above that of the rest of the path."""
    case = CASES["bert"]
    scores = LayerConductanceAnalyzer(origin="zeros").analyze(case.model(), case.data())
    entry = scores.entries[next(iter(scores))]
    assert entry.status is Status.FAILED
    assert "20 steps do not resolve the path" in entry.reason
    assert len(LayerConductanceAnalyzer().analyze(case.model(), case.data()).usable()) == 3


class Smooth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def smooth() -> UniversalModel:
    torch.manual_seed(0)
    return UniversalModel(Smooth().double(), task=Classification(), example=double(2))


def test_the_error_of_the_trapezoid_falls_with_the_square_of_the_step() -> None:
    model = smooth()
    coarse, fine = (completeness_error(found(model, double(6), steps=n, of="output")) for n in (8, 32))
    assert coarse / fine == pytest.approx(16, rel=0.1)


def test_gauss_legendre_is_exact_on_a_smooth_net_where_the_trapezoid_is_not() -> None:
    model, batch = smooth(), double(6)
    errors = {
        (rule, n): completeness_error(found(model, batch, rule=rule, steps=n, target="logit", of="output"))
        for rule in ("gauss_legendre", "trapezoid")
        for n in (4, 12)
    }
    assert errors["gauss_legendre", 4] < 0.1 * errors["trapezoid", 4]
    assert errors["gauss_legendre", 12] < 1e-9 < 1e-6 * errors["trapezoid", 12] ** 0.5  # the trapezoid is about 1e-3 off


@pytest.mark.parametrize("name", ["vit", "bert", "gpt2", "llama"])
def test_gauss_legendre_comes_closer_than_the_trapezoid_at_equal_n(name: str) -> None:
    """Through attention, whose fused kernel has no forward mode, and in streams that carry embeddings."""
    case = CASES[name]
    model, batch = case.model(), case.batch(4)
    errors = {rule: completeness_error(found(model, batch, rule=rule, steps=8)) for rule in ("trapezoid", "gauss_legendre")}
    assert errors["gauss_legendre"] < 0.2 * errors["trapezoid"]


def test_gauss_legendre_takes_a_forward_for_gradients_and_one_for_velocities_per_node() -> None:
    model = residual()
    statistic = LayerConductanceAnalyzer(steps=5, rule="gauss_legendre").statistic(model)
    seen = observe(model, Data.of([double(4)]), {"x": statistic})
    assert (seen.counts.forwards, seen.counts.backwards) == (1 + 5 + 5 + 1, 5)  # the reference, the nodes, the origin


def test_an_operator_without_a_forward_mode_is_named() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.LSTM(8, 8, batch_first=True) for _ in range(2)])
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x[:, None]
            for block in self.blocks:
                x = block(x)[0]
            return self.head(x[:, -1])

    model = UniversalModel(Recurrent(), task=Classification(), example=vectors()(2))
    data = Data.of([vectors()(4)])
    with pytest.raises(UserModelError, match=r"LW-U74 .*no forward-mode derivative.*rule='trapezoid'"):
        LayerConductanceAnalyzer(rule="gauss_legendre").analyze(model, data)
    assert len(LayerConductanceAnalyzer().analyze(model, data).usable()) == 2


def test_a_linear_net_is_exact_with_one_step() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 5, bias=False), nn.Linear(5, 3, bias=False)).double()
    model = UniversalModel(net, task=Classification(), example=double(2))
    batch = double(6)
    for rule in ("trapezoid", "left", "gauss_legendre"):
        units = found(model, batch, steps=1, target="logit", rule=rule, of="output").units[0]
        hidden = batch.args[0] @ net[0].weight.T
        torch.testing.assert_close(units, hidden * net[1].weight[batch.labels], rtol=1e-12, atol=1e-14)


def slow(model: UniversalModel, batch: Batch, layer: int, steps: int) -> Tensor:
    """Σ_j |Cond_j| of one residual block by the definition, a pass per point, a trapezoid."""
    branches, gradients = [], []
    for k in range(steps + 1):
        x = model.module.stem(batch.args[0] * (k / steps))
        for block in model.module.blocks[:layer]:
            x = block(x)
        branch = (model.module.blocks[layer](x) - x).detach().requires_grad_()
        y = x.detach() + branch
        for block in model.module.blocks[layer + 1 :]:
            y = block(y)
        target = model.module.head(y).log_softmax(-1).gather(1, batch.labels[:, None]).sum()
        gradients.append(torch.autograd.grad(target, branch)[0])
        branches.append(branch.detach())
    total = sum((branches[k + 1] - branches[k]) * (gradients[k] + gradients[k + 1]) / 2 for k in range(steps))
    assert isinstance(total, Tensor)
    return total.abs().sum(1)


def test_scores_equal_the_slow_twin() -> None:
    model, batch = residual(), double(7)
    scores = LayerConductanceAnalyzer(steps=6).analyze(model, Data.of([batch.narrow(0, 3), batch.narrow(3, 7)]))
    for layer in model.layers:
        values = slow(model, batch, layer.index, 6)
        # the task's loss is float32, so the twin agrees to that
        assert scores[layer.name] == pytest.approx(float(values.mean()), rel=1e-5)
        assert scores.entries[layer.name].stderr == pytest.approx(float(values.std()) / 7**0.5, rel=1e-4)


@pytest.mark.parametrize(("name", "layer"), [("residual", 1), ("vit", 2)])
def test_the_left_rule_equals_captum(name: str, layer: int) -> None:
    attr = pytest.importorskip("captum.attr")
    case = CASES[name]
    model, batch = case.model(Classification()), case.batch(3)
    units = found(model, batch, rule="left", target="logit", of="output", steps=8).units[layer]
    theirs = attr.LayerConductance(model.module, model.layers[layer].module).attribute(
        batch.args[0], target=batch.labels, n_steps=8, method="riemann_trapezoid"
    )
    torch.testing.assert_close(units, theirs.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("depth", [2, 6])
def test_all_layers_share_n_plus_1_forwards_and_backwards(depth: int) -> None:
    model = residual(depth)
    seen = observe(model, Data.of([double(4)]), {"x": LayerConductanceAnalyzer(steps=5).statistic(model)})
    assert (seen.counts.forwards, seen.counts.backwards) == (6, 6)


def test_no_pass_but_the_first_goes_back_through_the_first_block() -> None:
    backwards = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            backwards.append(1)
            return gradient

    for at, expected in ((0, 1), (1, 6)):
        model = residual()
        backwards.clear()
        model.module.blocks[at].up.register_forward_hook(lambda module, args, output: Counted.apply(output))
        scores = LayerConductanceAnalyzer(steps=5).analyze(model, Data.of([double(4)]))
        assert len(backwards) == expected
        assert list(scores.values()) == list(LayerConductanceAnalyzer(steps=5).analyze(residual(), Data.of([double(4)])).values())


def test_a_layer_that_adds_nothing_conducts_nothing() -> None:
    model = residual()
    model.module.blocks[1].down.weight.data.zero_()
    assert LayerConductanceAnalyzer().analyze(model, Data.of([double(4)]))["blocks.1"] < 1e-12


@pytest.mark.parametrize(("name", "first"), [("t5", [0, 3]), ("gpt2", [0]), ("albert", [0])])
def test_token_models_are_changed_where_their_embeddings_enter(name: str, first: list[int]) -> None:
    case = CASES[name]
    model, batch = case.model(), case.batch(3)
    walk = walk_over(model, batch)
    assert [layer.index for layer in walk.embedded()] == first
    same, other = (walk.forward(batch, changes=dict.fromkeys(first, f)).output for f in (torch.clone, torch.zeros_like))
    assert same is not None
    assert other is not None
    torch.testing.assert_close(same, model.predict(batch))
    assert not torch.allclose(other, same)


def test_fidelity_needs_no_drawn_answer() -> None:
    """Two seeds, one score: the target is the divergence from the model's own answer."""
    model = residual()
    model.task = Fidelity()
    first, second = (LayerConductanceAnalyzer().analyze(model, Data.of([double(4)]), seed=seed) for seed in (0, 1))
    assert dict(first) == dict(second)
    assert min(first.values()) > 0


def test_settings_are_checked() -> None:
    with pytest.raises(UsageError, match="trapezoid"):
        LayerConductanceAnalyzer(rule="trapezoids")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="at least 1 step"):
        LayerConductanceAnalyzer(steps=0)
    case = CASES["bert"]
    with pytest.raises(UsageError, match="stream"):
        LayerConductanceAnalyzer(at="inputs").analyze(case.model(), case.data())
