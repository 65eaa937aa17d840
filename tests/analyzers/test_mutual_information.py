"""Closed forms, limits that no estimate may cross, and scikit-learn's nearest neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from sklearn.feature_selection import mutual_info_classif, mutual_info_regression
from torch import Tensor, nn

from layerwise.analyzers.mutual_information import MutualInformationAnalyzer
from layerwise.covariance import moments_of
from layerwise.data import Batch, Data
from layerwise.errors import UsageError
from layerwise.information import gaussian_information, log_ratio
from layerwise.model import UniversalModel
from layerwise.neighbours import ksg, ksg_classes
from layerwise.observe import observe
from layerwise.scores import LayerScore, Status
from layerwise.task import Classification
from tests.models import CASES


class Gives(nn.Module):
    """A layer with two matrices that gives what `function` makes of its input."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.function = function
        self.a, self.b = (nn.Parameter(torch.eye(width, dtype=torch.float64)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x @ self.a @ self.b)


def scored(
    x: Tensor, labels: Tensor | None, function: Callable[[Tensor], Tensor] = lambda x: x, **settings: object
) -> LayerScore:
    net = nn.Sequential(Gives(function, x.shape[1]), Gives(lambda x: x, x.shape[1]))
    model = UniversalModel(net, task=Classification() if labels is not None else None, example=Batch((x[:2],)))
    half = len(x) // 2
    parts = [(x[:half],), (x[half:],)] if labels is None else [(x[:half], labels[:half]), (x[half:], labels[half:])]
    return MutualInformationAnalyzer(**settings).analyze(model, Data.of(parts)).entries["0"]


def correlated(n: int, rho: float, copies: int = 1) -> Tensor:
    torch.manual_seed(0)
    z, e = torch.randn(2, n, copies, dtype=torch.float64)
    return torch.cat([z, rho * z + math.sqrt(1 - rho**2) * e], 1)


def test_correlated_gaussians_have_their_closed_form_and_copies_add() -> None:
    exact = -0.5 * math.log(1 - 0.8**2)
    for copies in (1, 3):
        rows = correlated(20000, 0.8, copies)
        assert gaussian_information(moments_of(rows), copies) == pytest.approx(copies * exact, rel=0.03)
        held_out = log_ratio(moments_of(rows[:10000]), rows[10000:], copies, classes=False)
        assert float(held_out.mean()) == pytest.approx(copies * exact, rel=0.04)
    rows = correlated(1500, 0.8)
    assert float(ksg(rows[:, :1], rows[:, 1:], 3).mean()) == pytest.approx(exact, abs=0.08)


def test_the_gaussian_form_is_that_of_the_canonical_correlations() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64)
    c = torch.cov(x.T)
    zz, zy, yy = c[:3, :3], c[:3, 3:], c[3:, 3:]
    inside = torch.eye(2, dtype=torch.float64) - torch.linalg.inv(yy) @ zy.T @ torch.linalg.inv(zz) @ zy
    assert gaussian_information(moments_of(x), 3) == pytest.approx(-0.5 * float(torch.logdet(inside)), rel=1e-5)


def test_of_exclusive_or_a_linear_probe_sees_nothing_and_neighbours_see_log_2() -> None:
    torch.manual_seed(0)
    bits = torch.randint(0, 2, (800, 2)).double()
    labels = (bits.sum(1) == 1).long()
    x = torch.cat([bits * 4 + 0.3 * torch.randn(800, 2, dtype=torch.float64), torch.zeros(800, 1, dtype=torch.float64)], 1)
    linear = scored(x, labels)
    assert abs(linear.value) < 4 * linear.stderr + 0.01
    assert scored(x, labels, estimator="ksg").value == pytest.approx(math.log(2), abs=0.06)


@pytest.mark.parametrize("estimator", ["linear", "ksg"])
def test_independent_answers_have_no_information_within_the_error(estimator: str) -> None:
    torch.manual_seed(0)
    entry = scored(torch.randn(1000, 6, dtype=torch.float64), torch.randint(0, 3, (1000,)), estimator=estimator)
    assert abs(entry.value) < 4 * entry.stderr
    assert entry.stderr < 0.05


def test_a_probe_with_many_features_is_not_judged_on_what_it_was_fitted_to() -> None:
    torch.manual_seed(0)
    entry = scored(torch.randn(200, 60, dtype=torch.float64), torch.randint(0, 3, (200,)))
    assert entry.value < 2 * entry.stderr  # judged on its own half it comes out at 0.63 ± 0.05


@pytest.mark.parametrize("estimator", ["linear", "ksg"])
def test_an_output_that_is_the_answer_carries_its_whole_entropy(estimator: str) -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 4, (1000,))
    x = nn.functional.one_hot(labels, 4).double() + 0.01 * torch.randn(1000, 4, dtype=torch.float64)
    assert scored(x, labels, estimator=estimator).value == pytest.approx(math.log(4), abs=0.05)


def test_a_linear_probe_finds_what_a_discriminant_analysis_finds() -> None:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    torch.manual_seed(0)
    labels = torch.randint(0, 3, (6000,))
    x = torch.randn(6000, 4, dtype=torch.float64) + nn.functional.one_hot(labels, 4).double() * 1.5
    rows = torch.cat([x, nn.functional.one_hot(labels, 3).double()], 1)
    found = log_ratio(moments_of(rows[:3000]), rows[3000:], 4, classes=True).mean()
    probe = LinearDiscriminantAnalysis(solver="lsqr").fit(x[:3000].numpy(), labels[:3000].numpy())
    nll = -torch.from_numpy(probe.predict_log_proba(x[3000:].numpy())).gather(1, labels[3000:, None])[:, 0]
    prior = -torch.from_numpy(probe.priors_).log()[labels[3000:]]
    assert float(found) == pytest.approx(float((prior - nll).mean()), abs=2e-3)


def test_nearest_neighbours_agree_with_scikit_learn() -> None:
    rows = correlated(300, 0.6)
    x, y = rows[:, :1], rows[:, 1:]
    theirs = mutual_info_regression(x.numpy(), y[:, 0].numpy(), n_neighbors=3, random_state=0)[0]
    assert float(ksg(x / x.std(), y / y.std(), 3).mean()) == pytest.approx(theirs, abs=1e-2)
    labels = (y[:, 0] > 0).long() + (y[:, 0] > 2.4).long()
    theirs = mutual_info_classif(x.numpy(), labels.numpy(), n_neighbors=3, random_state=0)[0]
    values = ksg_classes(x, labels, 3)
    assert float(values[~values.isnan()].mean()) == pytest.approx(theirs, abs=1e-6)


def test_the_gain_of_a_layer_that_destroys_the_answer_is_below_0_and_of_an_identity_is_0() -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (600,))
    x = nn.functional.one_hot(labels, 5).double() * 3 + torch.randn(600, 5, dtype=torch.float64)
    assert scored(x, labels, relative="gain").value == pytest.approx(0.0, abs=1e-12)
    assert scored(x, labels, lambda x: 0 * x, relative="gain").value < -0.5
    assert scored(x, labels, lambda x: 0 * x).value == pytest.approx(0.0, abs=0.02)


def test_without_labels_the_answer_is_the_models_own_output() -> None:
    torch.manual_seed(0)
    x = torch.randn(800, 4, dtype=torch.float64)
    assert scored(x, None).value > 2  # the output is a function of it
    assert scored(x, None, estimator="gaussian").value > 2


@pytest.mark.parametrize("settings", [{}, {"relative": "gain"}, {"estimator": "gaussian"}, {"estimator": "ksg"}])
def test_shards_merge_to_the_same_scores(settings: dict[str, str]) -> None:
    case, analyzer = CASES["residual"], MutualInformationAnalyzer(**settings, points=30)
    data = Data.of([Batch((torch.randn(40, 8),), {}, torch.arange(40) % 3), *(case.batch(n) for n in (9, 20))])
    one, other = (case.model(Classification()) for _ in range(2))
    whole = analyzer.analyze(one, data)
    states = [analyzer.statistic(other) for _ in range(2)]
    observe(other, data, {"x": states[0]})
    states[1].load_(states[0].state())
    states[1].merge_(analyzer.statistic(other))
    assert str(analyzer.finish(other, states[1], 0).entries) == str(whole.entries)
    assert len(whole.usable()) == 4
    assert all(e.stderr > 0 for e in whole.entries.values())


def test_too_few_samples_are_said_and_settings_checked() -> None:
    entry = scored(torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 4, estimator="gaussian")
    assert entry.status is Status.NOT_APPLICABLE
    assert "too few samples: 6" in entry.reason
    with pytest.raises(UsageError, match="ksg"):
        MutualInformationAnalyzer(estimator="ksgg")
    with pytest.raises(UsageError, match="points"):
        MutualInformationAnalyzer(points=1)


def test_it_costs_one_forward_and_keeps_no_more_than_its_points() -> None:
    case = CASES["vit"]
    model = case.model(Classification())
    statistic = MutualInformationAnalyzer(points=6, dimensions=4).statistic(model)
    seen = observe(model, case.data(5, 6), {"x": statistic})
    assert (seen.counts.forwards, seen.counts.backwards) == (2, 0)
    assert {len(x.rows()) for x in statistic.landmarks.values()} == {6}
    assert {c.scatter.shape[-1] for c in statistic.covariances.values()} == {4 + 10}
