"""The damages on weights small enough to check by hand, and what comes back afterwards."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch

from layerwise.benchmark.hurting import WEIGHT_DAMAGES, Norms, halved, hurt, input_norms, rounded, wanda
from layerwise.benchmark.measuring import measure_damages, qualities
from layerwise.data import Batch
from layerwise.model import UniversalModel
from layerwise.structure import Layer
from layerwise.swapping import swapped
from tests.benchmark.tiny import opened


def test_rounding_uses_one_scale_per_output_channel() -> None:
    weight = torch.tensor([[7.0, 3.4, -0.4], [0.7, 0.34, -0.04]])
    assert torch.allclose(rounded(weight, 4), torch.tensor([[7.0, 3.0, 0.0], [0.7, 0.3, 0.0]]))
    assert set(rounded(weight, 2)[0].tolist()) == {7.0, 0.0}
    assert torch.equal(rounded(torch.zeros(2, 2), 2), torch.zeros(2, 2))


def test_half_of_the_weights_go_by_size_and_by_size_times_input() -> None:
    weight = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    assert halved(weight).tolist() == [[4.0, 3.0, 0.0, 0.0]]
    assert wanda(weight, torch.tensor([1.0, 1.0, 1.0, 100.0])).tolist() == [[4.0, 0.0, 0.0, 1.0]]


def test_input_norms_are_those_of_the_inputs() -> None:
    parts = opened(0)
    block = parts.model.layers[2].module
    seen = []
    handle = block.up.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    norms = input_norms(parts.model, parts.calibration)[id(block.up.weight)]
    handle.remove()
    assert torch.allclose(norms, torch.cat(seen).double().norm(dim=0))


@pytest.mark.parametrize("damage", [*WEIGHT_DAMAGES, "skip"])
def test_damages_equal_the_naive_loop_and_leave_no_trace(damage: str) -> None:
    parts = opened(0)
    model, before = parts.model, parts.model.fingerprint
    norms = input_norms(model, parts.calibration)
    found = measure_damages(model, parts.evaluation, norms, [damage], lambda done, total: None)
    for layer in model.layers:
        values = []
        for batch in parts.evaluation:
            whole = model.predict(batch)
            with damaged(model, layer, damage, norms):
                values += _losses(model, batch)
            assert torch.equal(whole, model.predict(batch))
        base = [v for batch in parts.evaluation for v in _losses(model, batch)]
        expected = [a - b for a, b in zip(values, base, strict=True)]
        assert found["tables"][f"{damage}/dce"][layer.name] == expected
        assert min(found["tables"][f"{damage}/kl"][layer.name]) >= 0
    assert model.fingerprint == before


def damaged(model: UniversalModel, layer: Layer, damage: str, norms: Norms) -> AbstractContextManager[None]:
    return model.skipping([layer.name]) if damage == "skip" else swapped(hurt(layer, damage, norms))


def _losses(model: UniversalModel, batch: Batch) -> list[float]:
    return torch.nn.functional.cross_entropy(model.predict(batch), batch.labels, reduction="none").double().tolist()


def test_quality_is_the_mean_probability_of_the_right_answer() -> None:
    parts = opened(1)
    found = qualities(parts.model, parts.evaluation, [frozenset(), frozenset({0, 3})])
    names = [parts.model.layers[i].name for i in (0, 3)]
    with parts.model.skipping(names):
        expected = [
            p
            for b in parts.evaluation
            for p in parts.model.predict(b).softmax(-1).gather(1, b.labels[:, None]).flatten().tolist()
        ]
    assert found[frozenset({0, 3})] == pytest.approx(sum(expected) / len(expected), rel=1e-6)
