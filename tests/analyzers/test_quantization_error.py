"""Weights whose rounding can be done by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from layerwise.analyzers.quantization_error import QuantizationErrorAnalyzer
from layerwise.errors import UsageError


def score(tensor: Tensor, **settings: object) -> float:
    analyzer = QuantizationErrorAnalyzer(**settings)  # type: ignore[arg-type]
    return analyzer.combine([analyzer.summarize(tensor)]).value


def slow(tensor: Tensor, bits: int) -> float:
    """Row by row, weight by weight."""
    error = 0.0
    for row in tensor.flatten(1).double().tolist():
        step = max(abs(w) for w in row) / (2 ** (bits - 1) - 1)
        error += sum((round(w / step) * step - w) ** 2 for w in row)
    return math.sqrt(error)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_error_is_that_of_the_slow_twin(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwise.zeroshot.BLOCK", 30)
    w = torch.randn(7, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    assert score(w, bits=bits, relative=False) == pytest.approx(slow(w, bits), rel=1e-12)
    assert score(w, bits=bits) == pytest.approx(slow(w, bits) / float(w.double().norm()), rel=1e-12)


def test_weights_on_the_grid_lose_nothing() -> None:
    grid = torch.arange(-7.0, 8.0).repeat(3, 1) * torch.tensor([[0.5], [2.0], [1024.0]])
    assert score(grid, bits=4) == 0.0
    assert score(torch.zeros(3, 3)) == 0.0


def test_two_bits_know_three_values() -> None:
    assert score(torch.tensor([[1.0, 0.4, -0.25], [4.0, 0.0, -4.0]]), bits=2, relative=False) == pytest.approx(
        math.hypot(0.4, 0.25)
    )


def test_a_bit_more_halves_the_error() -> None:
    w = torch.rand(50, 400, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert score(w, bits=6) / score(w, bits=7) == pytest.approx(63 / 31, rel=0.02)


def test_each_channel_has_its_own_step_and_the_share_no_scale() -> None:
    w = torch.randn(5, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert score(100 * w) == pytest.approx(score(w), rel=1e-12)
    scales = torch.tensor([[1.0], [10.0], [100.0], [1000.0], [1e4]], dtype=torch.float64)
    alone = [score(row[None], relative=False) for row in scales * w]
    assert score(scales * w, relative=False) == pytest.approx(math.hypot(*alone), rel=1e-12)


def test_the_number_of_bits_is_checked() -> None:
    for bits in (1, 17, 4.0, True):
        with pytest.raises(UsageError, match="from 2 to 16"):
            QuantizationErrorAnalyzer(bits=bits)  # type: ignore[arg-type]
