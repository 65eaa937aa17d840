"""Patching everything restores everything; linear models, two paths and a slow twin give the known effects."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from layerwise.analyzers.causal_analysis import CausalAnalyzer, noisy
from layerwise.counts import Counts
from layerwise.data import Batch, Data
from layerwise.errors import UsageError
from layerwise.model import UniversalModel
from layerwise.observe import observe
from layerwise.scores import Scores, Status
from layerwise.task import Classification, Fidelity, Task
from layerwise.walk import Walk
from tests.models import CASES, ResidualNet


class LastOutput(Task):
    """The loss is minus the last output: linear, so that effects can be written down."""

    name = "last"
    quality = "loss"
    higher_is_better = False

    def figures(self, output: Tensor, batch: Batch, reference: Tensor | None) -> dict:
        return {"loss": (-output[:, -1].double(), torch.ones(len(output), dtype=torch.float64))}

    def likelihood(self, output: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        return -output[:, -1]


class Adds(nn.Module):
    """x + b a x: two matrices, so that it is a block."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3, bias=False)
        self.b = nn.Linear(3, 3, bias=False)
        self.a.weight.data, self.b.weight.data = matrix, torch.eye(3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(x))


def two_paths() -> UniversalModel:
    """Output 2 is 2·x₀ by way of block 0 and 5·x₁ by way of block 1; block 2 writes elsewhere."""
    ways = [torch.zeros(3, 3) for _ in range(3)]
    ways[0][2, 0], ways[1][2, 1], ways[2][0, 1] = 2.0, 5.0, 7.0
    net = nn.Sequential(*(Adds(w) for w in ways)).double()
    return UniversalModel(net, task=LastOutput(), example=Batch((torch.randn(2, 3, dtype=torch.float64),)))


def points(n: int = 6) -> Tensor:
    x = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    x[:, 2] = 0
    return x


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("estimator", ["exact", "attribution"])
def test_two_paths_have_the_effects_that_can_be_written_down(direction: str, estimator: str) -> None:
    settings = {"direction": direction, "estimator": estimator}
    x = points()
    scores = CausalAnalyzer(**settings).analyze(two_paths(), Data.of([x]))  # type: ignore[arg-type]
    noise = x - noisy(3.0, 0)(x)  # clean minus corrupted
    for name, effect in (("0", 2 * noise[:, 0]), ("1", 5 * noise[:, 1]), ("2", torch.zeros(6))):
        assert scores[name] == pytest.approx(float(effect.mean()), rel=1e-10, abs=1e-14)
        assert scores.entries[name].stderr == pytest.approx(float(effect.std() / 6**0.5), rel=1e-9, abs=1e-12)


def test_a_shuffled_batch_is_the_same_samples_moved_by_one() -> None:
    x = points()
    scores = CausalAnalyzer(corruption="shuffle").analyze(two_paths(), Data.of([x[:5]]))
    assert scores["1"] == pytest.approx(0.0, abs=1e-14)  # over the whole batch a linear effect cancels
    one = CausalAnalyzer(corruption="shuffle", scale="share", patch="stream").analyze(two_paths(), Data.of([x[:5]]))
    assert {e.status for e in one.entries.values()} == {Status.FAILED}
    assert "too little to divide by" in one.entries["0"].reason


@pytest.mark.parametrize("name", ["residual", "vit", "resnet", "bert"])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_patching_the_whole_stream_restores_everything(name: str, direction: str) -> None:
    case = CASES[name]
    model = case.model(Fidelity())
    scores = CausalAnalyzer(patch="stream", scale="share", direction=direction).analyze(model, case.data(24, 16))  # type: ignore[arg-type]
    assert len(scores) == case.layers
    assert set(scores.values()) == {1.0}


def test_for_a_linear_model_attribution_is_exact() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(Adds(torch.randn(3, 3)) for _ in range(4))).double()
    model = UniversalModel(net, task=LastOutput(), example=Batch((points(2),)))
    for direction in ("denoise", "noise"):
        exact, estimate = (
            CausalAnalyzer(estimator=e, direction=direction).analyze(model, Data.of([points()]))  # type: ignore[arg-type]
            for e in ("exact", "attribution")
        )
        assert list(estimate.values()) == pytest.approx(list(exact.values()), rel=1e-9)


def slow(net: ResidualNet, x: Tensor, labels: Tensor, corrupt: Tensor) -> list[Tensor]:
    """Denoising effects of each block per sample, by the definition."""

    def run(stream: Tensor, patched: int, clean: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        stream, branches = net.stem(stream), []
        for i, block in enumerate(net.blocks):
            branches.append(clean[i] if i == patched else block(stream) - stream)
            stream = stream + branches[-1]
        return net.head(stream).log_softmax(-1).gather(1, labels[:, None])[:, 0], branches

    _, clean = run(x, -1, [])
    worst, _ = run(corrupt, -1, [])
    return [run(corrupt, i, clean)[0] - worst for i in range(len(net.blocks))]


def test_scores_equal_the_slow_twin() -> None:
    case = CASES["residual"]
    model, batch = case.model(Classification()), case.batch(7)
    scores = CausalAnalyzer(noise=0.7, seed=3).analyze(model, Data.of([batch]))
    with torch.no_grad():
        x = batch.args[0]
        effects = slow(model.module.double(), x.double(), batch.labels, noisy(0.7, 3)(x).double())
    for layer, effect in zip(model.layers, effects, strict=True):
        assert scores[layer.name] == pytest.approx(float(effect.mean()), rel=1e-4, abs=1e-6)
        assert scores.entries[layer.name].stderr == pytest.approx(float(effect.std()) / 7**0.5, rel=1e-4)


def test_a_share_is_a_ratio_of_sums() -> None:
    effects, whole, shares = (
        by_hand(analyzer, (24, 16))
        for analyzer in (CausalAnalyzer(), CausalAnalyzer(patch="stream"), CausalAnalyzer(scale="share"))
    )
    for name in shares:
        assert shares[name] == pytest.approx(effects[name] / whole[name], rel=1e-12)
        assert shares.entries[name].stderr > 0


def test_exact_runs_only_what_follows_the_patch_and_attribution_is_two_forwards_and_one_backward() -> None:
    case = CASES["residual"]
    model = case.model(Fidelity())

    def counts(estimator: str) -> Counts:
        analyzer = CausalAnalyzer(estimator=estimator)  # type: ignore[arg-type]
        return observe(model, Data.of([case.batch(4)]), {"x": analyzer.statistic(model)}).counts

    exact, attribution = counts("exact"), counts("attribution")
    assert exact.block_calls == 4 + 4 * 3 // 2
    assert exact.backwards == 0
    assert (attribution.forwards, attribution.backwards, attribution.block_calls) == (2, 1, 0)


def test_a_shared_layer_is_patched_from_its_first_input_to_its_last_output() -> None:
    case = CASES["albert"]
    scores = CausalAnalyzer(noise=0.5).analyze(case.model(), case.data())
    estimate = CausalAnalyzer(noise=0.5, estimator="attribution").analyze(case.model(), case.data())
    (name,) = scores
    assert scores[name] != 0.0
    assert estimate.entries[name].status is Status.OK


def by_hand(analyzer: CausalAnalyzer, sizes: tuple[int, ...]) -> Scores:
    case = CASES["residual"]
    return analyzer.analyze(case.model(Fidelity()), case.data(*sizes))


def test_what_cannot_be_said_is_said() -> None:
    alone = by_hand(CausalAnalyzer(corruption="shuffle"), (1,))
    assert {e.status for e in alone.entries.values()} == {Status.NOT_APPLICABLE}
    assert "one sample" in alone.entries["blocks.0"].reason
    flat = by_hand(CausalAnalyzer(estimator="attribution", direction="noise"), (4,))
    assert "no slope" in flat.entries["blocks.0"].reason
    case = CASES["resnet"]
    scores = CausalAnalyzer().analyze(case.model(Fidelity()), case.data())
    assert "differ in shape" in scores.entries["layer2.0"].reason


def test_noise_is_relative_to_each_sample_and_the_same_for_every_batch() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 400, dtype=torch.float64) * torch.tensor([[1.0], [10.0], [0.0]], dtype=torch.float64)
    change = noisy(2.0, 5)(x) - x
    assert change.std(1).tolist() == pytest.approx([2.0, 20.0, 0.0], rel=0.15)
    assert torch.equal(change, noisy(2.0, 5)(x) - x)


def test_embeddings_are_corrupted_in_every_run_of_the_replay() -> None:
    case = CASES["bert"]
    model, batch = case.model(Fidelity()), case.batch(3)
    walk = Walk(model, batch, 0, torch.arange(3), Counts())
    first = walk.embedded()[0]
    spoilt = walk.forward(batch, changes={first.index: noisy(3.0, 0)}).output
    assert spoilt is not None
    whole, weights = Fidelity().losses(spoilt, batch, model.predict(batch))
    patched = CausalAnalyzer(patch="stream").analyze(model, Data.of([batch]))
    assert patched[first.name] == pytest.approx(float(whole.sum() / weights.sum()), rel=1e-6)


def test_settings_are_checked() -> None:
    with pytest.raises(UsageError, match="denoise"):
        CausalAnalyzer(direction="denoised")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="above 0"):
        CausalAnalyzer(noise=0.0)
