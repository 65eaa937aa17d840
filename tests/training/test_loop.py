from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from layerwise.data import Batch, Data
from layerwise.errors import CorruptRun, MissingDependency, ProofFailed, UsageError
from layerwise.model import UniversalModel
from layerwise.supplies import Supplies
from layerwise.tensors import state
from layerwise.training import Given, KeptZeros, TrainingSettings, kept_zeros, loop, only_training, train_, training_output
from tests.conftest import ROOT
from tests.training.nets import Net, batches, supplies, universal

RECIPE = TrainingSettings(epochs=3, learning_rate=0.03, keep_best=False)


def weights(model: UniversalModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state(model.module).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_it_is_adamw_with_warm_up_and_cosine_step_by_step() -> None:
    """The update written out in float64 (Loshchilov & Hutter 2019), weight by weight."""
    settings = TrainingSettings(epochs=2, learning_rate=0.05, weight_decay=0.1, warm_up=0.25, clip=0.5, keep_best=False, seed=3)
    model = universal(dropout=0.0, norm=False)
    model.module.double()
    data = [b.map(lambda t: t.double() if t.is_floating_point() else t) for b in batches(4)]
    plain = universal(dropout=0.0, norm=False).module.double()
    exact = Given(lambda m, b: nn.functional.cross_entropy(training_output(m, b), b.labels))  # tasks compute in float32
    train_(model, Supplies(training=Data.of(data)), exact, settings)
    parameters = list(plain.parameters())
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    for step in range(8):
        batch = data[settings.order(step // 4, 4)[step % 4]]
        gradients = torch.autograd.grad(nn.functional.cross_entropy(plain(*batch.args), batch.labels), parameters)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        rate = 0.05 * ((step + 1) / 2 if step < 2 else (1 + math.cos(math.pi * (step - 2) / 6)) / 2)
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
                g = g * min(1.0, 0.5 / (norm + 1e-6))
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                decay = 0.1 if p.dim() > 1 else 0.0
                p -= rate * (decay * p + (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8))
    for (name, found), wanted in zip(model.module.named_parameters(), parameters, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("settings", [RECIPE, replace(RECIPE, optimizer="sgd", keep_best=True)], ids=["adamw", "sgd"])
def test_after_ctrl_c_in_a_forward_it_ends_at_the_same_bits(settings: TrainingSettings, tmp_path: Path) -> None:
    """Fails if dropout, order, optimizer, best weights or the statistics that the broken step wrote are not what they were."""
    whole, broken = universal(), universal()
    expected = train_(whole, supplies(), settings=settings)
    given = supplies(checkpoint=tmp_path)
    assert isinstance(broken.module, Net)
    broken.module.interrupt = 7
    with pytest.raises(KeyboardInterrupt):
        train_(broken, given, settings=settings)
    again = universal()
    trained = train_(again, given, settings=settings)
    assert again.module.calls == 12 - 6, "it began again"
    assert same(weights(whole), weights(again))
    assert trained == expected


def test_killed_in_the_middle_of_an_epoch_it_ends_at_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(loop, "SAVING_SHARE", math.inf)
    whole, again = universal(), universal()
    train_(whole, supplies(), settings=RECIPE)
    child = os.fork()
    if child == 0:  # no finally, no flush: as `kill -9`
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        train_(universal(), supplies(checkpoint=tmp_path, progress=lambda n, _: n == 6 and os._exit(9)), settings=RECIPE)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    newest = max(tmp_path.glob("step-*"))
    assert newest.name == "step-000000006"
    (newest / "model.safetensors").write_bytes(b"torn")
    trained = train_(again, supplies(checkpoint=tmp_path), settings=RECIPE)
    assert "step-000000006" in trained.notes[0]
    assert again.module.calls == 12 - 5
    assert same(weights(whole), weights(again))


def test_a_finished_training_is_not_repeated_and_others_are_refused(tmp_path: Path) -> None:
    given = supplies(checkpoint=tmp_path)
    first, second = universal(), universal()
    settings = replace(RECIPE, keep_best=True)
    trained = train_(first, given, settings=settings)
    assert train_(second, given, settings=settings) == trained
    assert second.module.calls == 0
    assert same(weights(first), weights(second))
    for changed in ({"learning_rate": 0.02}, {"seed": 1}):
        with pytest.raises(CorruptRun, match="another model"):
            train_(universal(), given, settings=replace(settings, **changed))
    with pytest.raises(CorruptRun):
        train_(universal(), replace(given, training=Data.of(batches(3))), settings=settings)


def test_all_but_the_trained_weights_is_as_it_was() -> None:
    model = universal()
    module = model.module
    module.drop.train()
    module.norm.requires_grad_(False)
    module.head.bias.grad = torch.ones(3)
    before, random = weights(model), torch.random.get_rng_state()
    flags = [m.training for m in module.modules()]
    with only_training(module, [module.first, module.norm]):
        train_(model, supplies(), settings=RECIPE)
    assert [m.training for m in module.modules()] == flags
    assert torch.equal(torch.random.get_rng_state(), random)
    assert torch.equal(module.head.bias.grad, torch.ones(3))
    assert [n for n, p in module.named_parameters() if not p.requires_grad] == ["norm.weight", "norm.bias"]
    after = weights(model)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == {"first.weight", "first.bias", "again.weight"}, "the statistics of frozen batch normalization stay"
    assert module.again.weight is module.first.weight


def test_the_best_epoch_is_kept_and_patience_ends_it() -> None:
    model = universal(dropout=0.0)
    seen: list[dict[str, Tensor]] = [weights(model)]

    def spoiled(model: UniversalModel, batch: Batch) -> Tensor:
        """Learns for the first epoch and unlearns from then on."""
        loss = nn.functional.cross_entropy(training_output(model, batch), batch.labels)
        return loss if len(seen) <= 4 else -loss

    settings = TrainingSettings(epochs=9, learning_rate=0.1, schedule="constant", patience=2, monitor="loss")
    trained = train_(model, supplies(), Given(spoiled), settings, after_step=lambda _: seen.append(weights(model)))
    assert trained.best == 1
    assert "no better loss" in trained.stopped
    assert [e.number for e in trained.epochs] == [0, 1, 2, 3]
    assert same(weights(model), seen[4])
    assert trained.counts.backwards == trained.steps == 12
    assert trained.counts.forwards == 12 + 4 * 2
    assert min(trained.epochs[1:], key=lambda e: e.metrics["loss"]).number == 1


def test_pruned_weights_stay_zero_through_momentum_and_decay() -> None:
    model = universal()
    weight = model.module.head.weight
    with torch.no_grad():
        weight[0, :3] = 0
        model.module.first.bias.zero_()
    zeros = kept_zeros(model.module)
    assert list(zeros.masks) == ["head.weight"], "a bias is not pruned"
    train_(model, supplies(), settings=RECIPE, after_step=zeros)
    assert not weight[0, :3].any()
    assert weight[0, 3:].all()
    assert zeros.broken(model.module) == {}
    assert KeptZeros({"head.weight": torch.zeros(3, 6, dtype=torch.bool)}).broken(model.module) == {"head.weight": 15}


def test_a_loss_that_is_not_finite_ends_it() -> None:
    calls = []

    def loss(model: UniversalModel, batch: Batch) -> Tensor:
        calls.append(batch)
        return training_output(model, batch).square().sum() * (math.inf if len(calls) == 3 else 1)

    model = universal()
    with pytest.raises(ProofFailed, match=r"became inf in step 3 of 12") as caught:
        train_(model, supplies(), Given(loss), RECIPE)
    assert caught.value.code == "LW-V05"
    assert all(t.isfinite().all() for t in weights(model).values())


def test_what_cannot_be_trained_is_refused_in_words() -> None:
    unlabelled = Data.of([Batch(b.args) for b in batches(2)])
    model = UniversalModel(Net().eval(), example=batches(1)[0])
    with pytest.raises(UsageError, match="nothing to learn from"):
        train_(model, Supplies(training=unlabelled))
    with pytest.raises(UsageError, match="needs training data"):
        train_(model, Supplies())
    with pytest.raises(UsageError, match="float16"):
        train_(UniversalModel(Net().eval().half()), supplies())
    with pytest.raises(UsageError, match="no parameter requires"):
        train_(UniversalModel(Net().eval().requires_grad_(False)), supplies())
    with pytest.raises(UsageError, match="no metric 'acuracy'"):
        train_(universal(), supplies(), settings=replace(RECIPE, monitor="acuracy", keep_best=True))
    with pytest.raises(UsageError, match="executor"):
        train_(universal(), supplies(executor="acelerate"))
    for wrong in ({"learning_rate": math.nan}, {"warm_up": 1.5}, {"optimizer": "adam"}, {"schedule": "step"}):
        with pytest.raises(UsageError):
            TrainingSettings(**wrong)  # type: ignore[arg-type]


# AdamW does not see the size of a gradient, and would hide a mean that should be a sum
SHARED = replace(RECIPE, optimizer="sgd", learning_rate=0.1, clip=0.0)


def in_each_process(folder: str) -> None:
    """What the launcher runs; the first process writes its weights, under the number of those that really worked together."""
    from accelerate import PartialState

    torch.set_num_threads(1)
    model = universal(dropout=0.0, norm=False)
    given = replace(supplies(executor="accelerate"), training=Data.of(batches(4, size=7)))
    train_(model, given, settings=SHARED)
    if PartialState().is_main_process:
        save_file(weights(model), f"{folder}/{PartialState().num_processes}")


def _launched(folder: Path, processes: int) -> None:
    """The launcher forks, so it starts from a process that has computed nothing: OpenMP's threads do not survive a fork."""
    code = (
        "from accelerate import debug_launcher; from tests.training.test_loop import in_each_process; "
        f"debug_launcher(in_each_process, ({str(folder)!r},), num_processes={processes})"
    )
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=settings, check=True, timeout=240)


def test_one_and_two_processes_through_accelerate_give_the_same_weights(tmp_path: Path) -> None:
    """Fails if gradients are averaged instead of summed, or samples of unequal shares (7 = 3 + 4) count unequally."""
    if find_spec("accelerate") is None:
        with pytest.raises(MissingDependency, match=r"layerwise\[train\]"):
            train_(universal(), supplies(executor="accelerate"))
        pytest.skip("accelerate is not installed; the error says how to get it")
    plain = universal(dropout=0.0, norm=False)
    train_(plain, replace(supplies(executor="local"), training=Data.of(batches(4, size=7))), settings=SHARED)
    for processes in (1, 2):  # each in processes of its own: Accelerate keeps what it found first
        _launched(tmp_path, processes)
        found = load_file(tmp_path / str(processes))
        for name, tensor in weights(plain).items():
            bound = {"rtol": 0.0, "atol": 0.0} if processes == 1 else {"rtol": 1e-4, "atol": 1e-6}
            assert torch.allclose(found[name], tensor, **bound), (processes, name)
