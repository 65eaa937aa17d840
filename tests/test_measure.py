"""Figures that can be counted by hand, and clocks that are read fairly."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from layerwise import measure as measuring
from layerwise.compress.half_precision import HalfPrecision
from layerwise.compress.int8_dynamic import Int8Dynamic
from layerwise.data import Batch, Data
from layerwise.measure import compare, costs, latency, measure, time_paired
from layerwise.method import apply_plan, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.task import Classification, Fidelity, LanguageModelling
from tests.models import CASES


def test_counts_by_hand() -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()
    with torch.no_grad():
        module[0].weight[:2] = 0
        module[0].bias.fill_(1)
        module[1].bias.fill_(1)  # BatchNorm's biases start at 0
        module[3].weight.fill_(1)
        module[3].bias.fill_(1)
    found = measure(UniversalModel(module, task=Classification()), Data.of([(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))]))
    assert found.params == 4 * 6 + 6 + 6 + 6 + 6 * 3 + 3
    assert found.nonzero == found.params - 8
    assert found.size == 4 * (found.params + 6 + 6) + 8  # running mean and variance, and an int64 counter
    assert found.macs == 4 * 6 + 6 * 3
    assert (found.batch_size, found.samples) == (5, 5)
    assert found.latency > 0
    assert found.device.startswith("cpu")


def test_tied_weights_count_once() -> None:
    model = CASES["gpt2"].model()
    named = {id(p): p.numel() for p in model.module.parameters()}
    assert costs(model)["params"] == sum(named.values())
    assert costs(model)["size"] == 4 * sum(named.values())


def test_macs_do_not_change_with_the_type_of_numbers() -> None:
    model, data = CASES["vit"].model(), CASES["vit"].data(3)
    names = [layer.name for layer in model.layers]
    small = apply_plan(model, CompressionPlan((step_of(Int8Dynamic(), names),))).model
    before, after = compare(model, small, data, latency_batches=3)
    assert before.macs == after.macs > 1000
    assert after.size < 0.5 * before.size
    assert after.params == before.params


def test_metrics_are_means_over_samples_not_over_batches() -> None:
    case = CASES["vit"]
    model = case.model(Classification())
    data = case.data(5, 3, 1)
    found = measure(model, data, latency_batches=3)
    outputs = torch.cat([model.predict(b) for b in data]).double()
    labels = torch.cat([b.labels for b in data])
    losses = nn.functional.cross_entropy(outputs, labels, reduction="none").numpy()
    assert found.metrics["loss"] == pytest.approx(losses.mean(), rel=1e-6)
    assert found.stderr["loss"] == pytest.approx(losses.std(ddof=1) / 3, rel=1e-4)
    assert found.metrics["accuracy"] == pytest.approx(float((outputs.argmax(1) == labels).double().mean()))
    assert found.samples == 9


def test_language_models_weigh_by_tokens() -> None:
    case = CASES["gpt2"]
    model = case.model(LanguageModelling())
    data = case.data(4, 3)
    found = measure(model, data, latency_batches=3)
    losses, tokens = [], []
    for batch in data:
        logits, ids, mask = model.predict(batch).double(), batch.kwargs["input_ids"], batch.kwargs["attention_mask"]
        nll = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        losses += (nll * mask[:, 1:]).sum(1).tolist()
        tokens += mask[:, 1:].sum(1).tolist()
    v, w = np.array(losses), np.array(tokens)
    mean = v.sum() / w.sum()
    n = len(v)
    assert found.metrics["loss"] == pytest.approx(mean, rel=1e-6)
    assert found.metrics["perplexity"] == pytest.approx(np.exp(mean), rel=1e-6)
    assert found.stderr["loss"] == pytest.approx(np.sqrt(((v - mean * w) ** 2).sum() * n / (n - 1)) / w.sum(), rel=1e-4)


def test_fidelity_is_to_the_uncompressed_model() -> None:
    case = CASES["residual"]
    model = case.model(Fidelity())
    small = apply_plan(model, CompressionPlan((step_of(HalfPrecision("bfloat16"), ()),))).model
    before, after = compare(model, small, case.data(), latency_batches=3)
    assert before.metrics["divergence"] == 0
    assert 0 < after.metrics["divergence"] < 0.1
    assert measure(small, case.data(), latency_batches=3).metrics["divergence"] == 0
    assert measure(small, case.data(), reference=model, latency_batches=3).metrics == after.metrics


class Clock:
    """A clock that only the models move."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Slow(nn.Module):
    """Takes `seconds` on the clock; notes its calls."""

    def __init__(self, seconds: float, clock: Clock, log: list[str], name: str) -> None:
        super().__init__()
        self.linear, self.seconds, self.clock, self.log, self.name = nn.Linear(4, 4), seconds, clock, log, name

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += self.seconds
        self.log.append(self.name)
        return self.linear(x)


def test_two_models_are_timed_alternately(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    clock = Clock()
    monkeypatch.setattr(measuring, "time", clock)
    models = [UniversalModel(Slow(s, clock, log, n)) for s, n in ((0.004, "a"), (0.008, "b"))]
    a, b = time_paired(models, Batch((torch.randn(2, 4),)), repeats=6)
    assert "".join(log) == "abab" + "abba" * 3  # warm-up, then rounds to and fro
    assert a.repeats == b.repeats == 6
    assert (a.median, b.median) == pytest.approx((4, 8))
    assert a.spread == pytest.approx(0, abs=1e-9)
    assert latency(models[0], Batch((torch.randn(2, 4),)), repeats=3) == pytest.approx(4)


def test_progress_is_told_per_batch() -> None:
    told: list[tuple[int, int]] = []
    measure(
        CASES["residual"].model(), CASES["residual"].data(2, 2, 2), latency_batches=3, progress=lambda i, n: told.append((i, n))
    )
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.fixture
def flags_kept() -> Iterator[UniversalModel]:
    model = CASES["vit"].model()
    model.module.train()
    yield model
    assert all(m.training for m in model.module.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())


def test_nothing_is_left_on_the_model(flags_kept: UniversalModel) -> None:
    fingerprint = flags_kept.fingerprint
    measure(flags_kept, CASES["vit"].data(3), latency_batches=3)
    assert flags_kept.fingerprint == fingerprint
