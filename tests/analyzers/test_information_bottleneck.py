"""The Gaussian channel in closed form, and the limits of the noise."""

from __future__ import annotations

import math

import pytest
import torch

from layerwise.analyzers.information_bottleneck import InfoBottleneckAnalyzer
from layerwise.covariance import Covariance
from layerwise.data import Data
from layerwise.errors import UsageError
from layerwise.information import gaussian_information, noise_information
from layerwise.observe import observe
from layerwise.task import Classification
from tests.models import CASES


def channel(copies: int = 1, n: int = 40000) -> Covariance:
    """z = x and y = x + e with e of variance 1/4, `copies` times over."""
    torch.manual_seed(0)
    x, e = torch.randn(2, n, copies, dtype=torch.float64)
    found = Covariance(10)
    for g, rows in enumerate(torch.cat([x, x + 0.5 * e], 1).chunk(10)):
        found.add_(g, rows)
    return found


@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_the_linear_gaussian_channel_has_its_closed_form_and_copies_add(sigma: float) -> None:
    rho2 = 1 / ((1 + sigma**2) * 1.25)
    for copies in (1, 3):
        about_answer, about_input = InfoBottleneckAnalyzer(sigma=sigma).plane(channel(copies), copies)
        assert about_answer == pytest.approx(-0.5 * copies * math.log(1 - rho2), rel=0.03)
        assert about_input == pytest.approx(0.5 * copies * math.log(1 + 1 / sigma**2), rel=1e-2)


def test_the_bound_on_the_input_is_the_determinant() -> None:
    moments = channel(3).total()
    c = (moments[2] / moments[0])[:3, :3]
    exact = 0.5 * float(torch.logdet(torch.eye(3, dtype=torch.float64) + c / 0.2))
    assert noise_information(moments, 3, 0.2) == pytest.approx(exact, rel=1e-9)


def test_endless_noise_leaves_nothing_and_information_is_never_created() -> None:
    about_answer, about_input = InfoBottleneckAnalyzer(sigma=1e6).plane(channel(2), 2)
    assert about_answer == pytest.approx(0.0, abs=1e-9)
    assert about_input == pytest.approx(0.0, abs=1e-9)
    for sigma in (0.1, 0.5, 2.0):
        about_answer, about_input = InfoBottleneckAnalyzer(sigma=sigma).plane(channel(2), 2)
        assert 0 < about_answer < about_input
    moments = channel(2).total()
    assert gaussian_information(moments, 2, 1.0) < gaussian_information(moments, 2)


def test_the_score_is_one_coordinate_minus_beta_times_the_other() -> None:
    case = CASES["residual"]
    model, data = case.model(Classification()), case.data(40, 30)
    analyzer = InfoBottleneckAnalyzer(beta=0.3)
    statistic = analyzer.statistic(model)
    seen = observe(model, data, {"x": statistic})
    scores = analyzer.finish(model, statistic, 0)
    assert (seen.counts.forwards, seen.counts.backwards) == (2, 0)
    for layer in model.layers:
        about_answer, about_input = analyzer.plane(statistic.covariances[f"{layer.index}.leaving"], 3)
        assert scores[layer.name] == pytest.approx(about_answer - 0.3 * about_input, rel=1e-12)
        assert scores.entries[layer.name].stderr > 0


def test_the_answer_of_classes_is_never_worth_more_than_finite() -> None:
    case = CASES["bert"]
    scores = InfoBottleneckAnalyzer().analyze(case.model(), Data.of([case.batch(12), case.batch(9)]))
    assert len(scores.usable()) == 3


def test_settings_are_checked() -> None:
    for settings in ({"beta": -1.0}, {"sigma": 0.0}, {"dimensions": 0}):
        with pytest.raises(UsageError, match="information_bottleneck"):
            InfoBottleneckAnalyzer(**settings)
