"""One pass feeds all; it resumes to the same bits, survives memory running out, and notices damaged checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from layerwise.analyzer import ANALYZERS, Statistic
from layerwise.data import Batch, Data
from layerwise.engine import analyze
from layerwise.errors import CorruptRun, DataError, NonFiniteWeights, OutOfMemory
from layerwise.model import UniversalModel
from layerwise.observe import observe
from layerwise.task import Classification
from tests.models import CASES, ResidualNet, vectors

METHODS = ["fisher_information", "gradient_based", "layer_ablation", "layer_correlation"]


def statistics(model: UniversalModel) -> dict[str, Statistic]:
    found = {name: ANALYZERS[name]().statistic(model) for name in METHODS}
    return {name: s for name, s in found.items() if s is not None}


def states(found: dict[str, Statistic]) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": t for name, s in found.items() for key, t in s.state().items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_all_observers_share_one_forward_and_one_backward() -> None:
    case = CASES["vit"]
    model = case.model(Classification())
    observers = {k: s for k, s in statistics(model).items() if s.needs}
    seen = observe(model, case.data(4, 4, 4), observers)
    assert (seen.counts.forwards, seen.counts.backwards) == (3, 4)  # the fourth checks once that samples do not mix


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [1, 2, 3])
def test_an_interrupted_pass_goes_on_to_the_same_bits(tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwise.observe.SAVE_EVERY", 0.0)
    case = CASES["bert"]
    data = case.data(3, 4, 2, 5)

    def stop(done: int, total: int) -> None:
        if done == after:
            raise Stop

    whole, broken, resumed = (case.model() for _ in range(3))
    unbroken = statistics(whole)
    counts = observe(whole, data, unbroken, seed=7).counts
    with pytest.raises(Stop):
        observe(broken, data, statistics(broken), seed=7, progress=stop, checkpoint=tmp_path / "state")
    found = statistics(resumed)
    fed: list[int] = []
    again = observe(resumed, data, found, seed=7, progress=lambda d, t: fed.append(d), checkpoint=tmp_path / "state")
    assert same_bits(states(found), states(unbroken))
    assert fed == list(range(after + 1, 5)), "a finished batch was fed again"
    assert again.counts.block_calls == counts.block_calls


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwise.observe.SAVE_EVERY", 0.0)
    case = CASES["residual"]
    data, model = case.data(3, 4, 5), case.model(Classification())
    unbroken = statistics(model)
    observe(model, data, unbroken, checkpoint=tmp_path / "state")
    kept = sorted((tmp_path / "state").iterdir())
    assert [k.name for k in kept] == ["batch-000000002", "batch-000000003"]
    victim = kept[-1] / "layer_ablation.safetensors"
    raw = bytearray(victim.read_bytes())
    raw[-1] ^= 1
    victim.write_bytes(bytes(raw))
    found = statistics(model)
    fed: list[int] = []
    seen = observe(model, data, found, progress=lambda d, t: fed.append(d), checkpoint=tmp_path / "state")
    assert fed == [3]
    assert same_bits(states(found), states(unbroken))
    assert "batch-000000003" in seen.notes[0]
    assert "layer_ablation.safetensors" in seen.notes[0]


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    case = CASES["residual"]
    model = case.model(Classification())
    observe(model, case.data(), statistics(model), checkpoint=tmp_path / "state")
    model.module.head.weight.data += 1
    with pytest.raises(CorruptRun, match=r"LW-R11 .*another model"):
        observe(model, case.data(), statistics(model), checkpoint=tmp_path / "state")


class Hungry(ResidualNet):
    """Asks the allocator for more than any machine has when it gets more than `limit` samples: the error is torch's own."""

    limit = 3
    refused = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.limit:
            type(self).refused += 1
            torch.empty(1 << 60, dtype=torch.uint8)
        return super().forward(x)


def test_a_batch_that_does_not_fit_is_halved_and_gives_the_same_scores() -> None:
    torch.manual_seed(0)
    model = UniversalModel(Hungry(), task=Classification(), example=vectors()(2))
    calm = UniversalModel(ResidualNet(), task=Classification(), example=vectors()(2))
    calm.module.load_state_dict(model.module.state_dict())
    data = Data.of([vectors()(3), vectors()(10)])
    found, expected = statistics(model), statistics(calm)
    Hungry.refused = 0
    seen = observe(model, data, found)
    observe(calm, data, expected)
    assert Hungry.refused > 0
    assert seen.notes == [
        "Memory ran out with 10 samples; the batch was halved.",
        "Memory ran out with 5 samples; the batch was halved.",
    ]
    for name in METHODS:
        a = ANALYZERS[name]().finish(model, found[name], 0)
        b = ANALYZERS[name]().finish(calm, expected[name], 0)
        for layer in a:
            assert a[layer] == pytest.approx(b[layer], rel=1e-5)


def test_memory_that_never_suffices_is_said_after_three_halvings() -> None:
    model = UniversalModel(Hungry(), task=Classification(), example=vectors()(2))
    assert model.layers
    Hungry.refused = 0
    with pytest.raises(OutOfMemory, match=r"LW-R01 .*5 samples.*smaller batch") as caught:
        observe(model, Data.of([vectors()(40)]), statistics(model))
    assert Hungry.refused == 4
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("where", ["first", "last", "bias"])
def test_not_finite_weights_are_found_before_any_work(where: str) -> None:
    case = CASES["vit"]
    model = case.model(Classification())
    names = [n for n, _ in model.module.named_parameters()]
    name = {"first": names[0], "last": names[-1], "bias": "blocks.2.mlp.fc1.bias"}[where]
    model.module.get_parameter(name).data.view(-1)[0] = float("nan")
    calls: list[object] = []
    model.module.register_forward_hook(lambda *a: calls.append(a))
    with pytest.raises(NonFiniteWeights, match=rf"LW-M04 .*{name}.*1 ") as caught:
        analyze(model, case.data())
    assert not calls
    assert caught.value.exit_code == 3


def test_an_empty_batch_is_refused_by_its_number() -> None:
    case = CASES["residual"]
    data = Data.of([case.batch(2), Batch((torch.randn(0, 8),), {}, torch.zeros(0, dtype=torch.long))])
    with pytest.raises(DataError, match=r"LW-D29 .*Batch 1 of batches is empty"):
        observe(case.model(Classification()), data, statistics(case.model(Classification())))


def test_a_checkpoint_is_readable_without_pickle(tmp_path: Path) -> None:
    case = CASES["residual"]
    model = case.model(Classification())
    observe(model, case.data(), statistics(model), checkpoint=tmp_path / "state")
    kinds = {p.suffix for p in (tmp_path / "state").rglob("*") if p.is_file()}
    assert kinds == {".safetensors", ".json"}
    shutil.rmtree(tmp_path / "state")


def test_the_users_modules_flags_survive_a_pass_that_runs_out_of_memory() -> None:
    model = UniversalModel(Hungry(), task=Classification(), example=vectors()(2))
    model.module.train()
    with pytest.raises(OutOfMemory):
        observe(model, Data.of([vectors()(40)]), statistics(model))
    assert all(m.training for m in model.module.modules() if isinstance(m, nn.Module))
