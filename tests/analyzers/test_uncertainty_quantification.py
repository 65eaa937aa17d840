"""No noise, linear regression and a small-noise expansion, where the answers are known; a slow twin; block calls."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.analyzers.uncertainty_quantification import NoiseEffects, UncertaintyAnalyzer, disturbed, information
from layerwise.counts import Counts
from layerwise.data import Batch, Data
from layerwise.errors import UsageError
from layerwise.model import UniversalModel
from layerwise.observe import observe
from layerwise.replay import Replay
from layerwise.scores import Status
from layerwise.task import Classification, Fidelity
from tests.models import CASES


@pytest.mark.parametrize("name", ["residual", "vit", "resnet", "bert", "t5"])
@pytest.mark.parametrize("measure", ["divergence", "linear"])
def test_without_noise_nothing_moves_to_the_bit(name: str, measure: str) -> None:
    case = CASES[name]
    scores = UncertaintyAnalyzer(noise=0.0, draws=1, measure=measure).analyze(case.model(), case.data(3))  # type: ignore[arg-type]
    assert set(scores.usable().values()) == {0.0}


def linear(outputs: int) -> UniversalModel:
    """Two matrices in a row; the layers are both of them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6, bias=False), nn.Linear(6, outputs, bias=False)).double()
    return UniversalModel(net, task=Classification(), example=Batch((torch.randn(2, 8, dtype=torch.float64),)))


def test_the_output_of_a_linear_regression_varies_by_the_noise_times_the_norm_of_the_weights() -> None:
    model, s = linear(1), 0.3
    x = torch.randn(1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).expand(4000, 8)
    settings = UncertaintyAnalyzer(noise=s, relative=False)
    replay = Replay(model, Batch((x,)), Counts())
    moved = replay.replacing({0: disturbed(model.layers[0], settings, 0)}) - replay.output
    weight = model.module[1].weight.detach()
    assert float(moved.var()) == pytest.approx(s**2 * float(weight.square().sum()), rel=0.08)
    relative = replay.replacing({0: disturbed(model.layers[0], UncertaintyAnalyzer(noise=s, of="output"), 0)}) - replay.output
    spread = model.module[0](x[:1]).detach().var(correction=0)
    assert float(relative.var()) == pytest.approx(float(s**2 * spread * weight.square().sum()), rel=0.08)


def test_small_noise_before_a_softmax_costs_half_the_trace_of_its_fisher_information() -> None:
    model, s = linear(4), 0.02
    x = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    weight = model.module[1].weight.detach()
    expected = torch.zeros(6, dtype=torch.float64)
    for i, p in enumerate((x @ model.module[0].weight.T @ weight.T).softmax(-1).detach()):
        expected[i] = 0.5 * s**2 * torch.trace(weight.T @ (p.diag() - torch.outer(p, p)) @ weight)
    settings = {"noise": s, "relative": False, "draws": 400}
    drawn = UncertaintyAnalyzer(**settings).analyze(model, Data.of([x]))["0"]  # type: ignore[arg-type]
    expanded = UncertaintyAnalyzer(**settings, measure="linear").analyze(model, Data.of([x]))["0"]  # type: ignore[arg-type]
    assert drawn == pytest.approx(float(expected.mean()), rel=0.05)
    assert expanded == pytest.approx(float(expected.mean()), rel=0.05)


def test_scores_equal_the_slow_twin() -> None:
    case = CASES["residual"]
    model, batch = case.model(Fidelity()), case.batch(7)
    scores = UncertaintyAnalyzer(noise=0.8, draws=3, seed=5).analyze(model, Data.of([batch]))
    net, start = model.module.double(), model.module.stem(batch.args[0].double()).detach()
    with torch.no_grad():
        for at, name in enumerate(scores):
            total = torch.zeros(7, dtype=torch.float64)
            clean = start
            for block in net.blocks:
                clean = block(clean)
            for draw in range(3):
                x = start
                for i, block in enumerate(net.blocks):
                    y = block(x)
                    if i == at:
                        noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(5 + draw))
                        y = y + 0.8 * (y - x).std(1, correction=0, keepdim=True) * noise
                    x = y
                p, q = net.head(clean).log_softmax(-1), net.head(x).log_softmax(-1)
                total += F.kl_div(q, p, log_target=True, reduction="none").sum(1) / 3
            assert scores[name] == pytest.approx(float(total.mean()), rel=1e-4)
            assert scores.entries[name].stderr == pytest.approx(float(total.std()) / 7**0.5, rel=1e-4)


def test_bald_is_what_the_draws_tell_about_the_answer() -> None:
    sure = [torch.tensor([[30.0, 0.0]]), torch.tensor([[0.0, 30.0]])]
    torch.testing.assert_close(information(iter(sure), torch.ones(1, 1).double()), torch.tensor([2.0]).double().log())
    same = [torch.tensor([[1.0, 2.0, 0.5]])] * 3
    assert float(information(iter(same), torch.ones(1, 1).double())) == pytest.approx(0.0, abs=1e-12)
    case = CASES["residual"]
    scores = UncertaintyAnalyzer(measure="bald").analyze(case.model(Classification()), case.data())
    assert min(scores.values()) > 0


def test_every_draw_runs_only_what_follows_the_noise() -> None:
    case = CASES["residual"]
    model = case.model(Fidelity())
    statistic = UncertaintyAnalyzer(draws=3).statistic(model)
    drawn = observe(model, Data.of([case.batch(4)]), {"x": statistic}).counts
    assert drawn.block_calls == 4 + 3 * (4 * 3 // 2)
    statistic = UncertaintyAnalyzer(draws=3, measure="linear").statistic(model)
    expanded = observe(model, Data.of([case.batch(4)]), {"x": statistic}).counts
    assert (expanded.forwards, expanded.backwards, expanded.block_calls) == (1, 3, 0)


def test_layers_of_one_shape_get_the_same_numbers() -> None:
    case = CASES["residual"]
    model, batch = case.model(Fidelity()), case.batch(4)
    settings = UncertaintyAnalyzer(noise=1.0, relative=False)
    added: list[Tensor] = []

    def block(x: Tensor) -> Tensor:
        return x * 2

    for layer in model.layers[:2]:
        x = batch.args[0]
        added.append(disturbed(layer, settings, 1)(block, (x,), {}) - block(x))
    torch.testing.assert_close(added[0], added[1], rtol=0, atol=0)
    assert float(added[0].std()) == pytest.approx(1.0, rel=0.3)


def test_embeddings_are_judged_by_the_cosine_and_have_no_bald() -> None:
    case = CASES["albert"]
    model = case.model()
    statistic = UncertaintyAnalyzer().statistic(model)
    assert isinstance(statistic, NoiseEffects)
    assert statistic.fidelity.kind == "cosine"
    small, large = (UncertaintyAnalyzer(noise=s).analyze(model, case.data()) for s in (0.01, 0.5))
    (name,) = small
    assert 0 < small[name] < large[name] < 2
    entry = UncertaintyAnalyzer(measure="bald").analyze(model, case.data()).entries[name]
    assert entry.status is Status.NOT_APPLICABLE
    assert "embeddings" in entry.reason


def test_settings_are_checked() -> None:
    with pytest.raises(UsageError, match="bald"):
        UncertaintyAnalyzer(measure="bal")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="draws"):
        UncertaintyAnalyzer(draws=0)
