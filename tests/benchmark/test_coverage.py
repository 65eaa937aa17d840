"""The judge: sound nets pass, and a planted failure of each of the four checks is found and named."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwise.benchmark.architectures.enlivened import enliven_
from layerwise.benchmark.architectures.made import Group
from layerwise.benchmark.catalogue import GROUPS, examined
from layerwise.benchmark.coverage import judge
from layerwise.benchmark.coverage_page import page, passed
from layerwise.benchmark.weights_used import uses_of
from layerwise.data import Batch
from layerwise.model import UniversalModel
from layerwise.replay import Replay
from tests.conftest import ROOT
from tests.models import CASES, Residual, ResidualNet, vectors


def model_of(module: nn.Module) -> UniversalModel:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return UniversalModel(module.eval(), example=vectors()(2))


def failures(model: UniversalModel) -> dict[str, str]:
    return judge(model).failures


@pytest.mark.parametrize("name", ["residual", "bert", "vit", "t5", "encoder"])
def test_sound_models_pass(name: str) -> None:
    judgement = judge(CASES[name].model())
    assert judgement.passed, judgement.failures
    assert judgement.scored == judgement.layers >= 3
    assert judgement.share >= 0.9


def test_layers_that_hold_too_little_are_found() -> None:
    class Lopsided(ResidualNet):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.back = nn.Linear(8, 512), nn.Linear(512, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = self.back(torch.relu(self.wide(x)))
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    model = model_of(Lopsided())
    model._layers = [layer for layer in model.blocks if layer.name.startswith("blocks.")]
    assert "of the weights; outside: " in failures(model)["layers"]
    assert "wide.weight" in failures(model)["layers"]


def test_layers_out_of_order_and_layers_that_overlap_are_found() -> None:
    model = model_of(ResidualNet())
    first, second, *rest = model.blocks
    model._layers = [replace(second, index=0), replace(first, index=1), *rest]
    assert failures(model)["layers"] == "layers are not in the order in which they run"
    model._layers = [first, second, *rest, replace(first, index=len(rest) + 2, name="blocks.0.up", module=first.module.up)]
    assert failures(model)["layers"] == "layers overlap"


def test_a_part_that_two_layers_call_is_no_overlap() -> None:
    model = model_of(ResidualNet())
    model.module.blocks[0].up = model.module.blocks[1].up
    assert "layers" not in failures(UniversalModel(model.module, example=vectors()(2)))


def test_zeros_and_unseen_batch_normalizations_are_enlivened() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    nn.init.zeros_(net[2].weight)
    before = net[0].weight.clone()
    batch = Batch((100 * torch.randn(64, 8),))
    enliven_(net, batch)
    assert net[2].weight.any()
    assert torch.equal(net[0].weight, before)
    assert not net.training
    assert not net[1].training
    assert net[1].momentum == 0.1
    with torch.no_grad():
        assert net[:2](*batch.args).std() == pytest.approx(1, abs=0.05)


def test_a_single_layer_is_too_few() -> None:
    assert failures(CASES["albert"].model())["layers"] == "1 layer was found"


def test_a_forward_that_draws_at_random_is_found() -> None:
    class Noisy(ResidualNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.randn(())

    assert failures(model_of(Noisy()))["replay"] == "the forward itself gives other bits each time"


def test_a_replay_that_gives_other_bits_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Replay.replacing
    monkeypatch.setattr(Replay, "replacing", lambda self, changes: honest(self, changes) * (1 + 1e-6))
    assert set(failures(model_of(ResidualNet()))) == {"replay"}


def test_a_layer_that_cannot_be_skipped_as_it_says_is_found() -> None:
    class Growing(ResidualNet):
        def __init__(self) -> None:
            super().__init__()
            self.blocks.append(nn.Linear(8, 16))
            self.head = nn.Linear(16, 3)

    model = model_of(Growing())
    model._layers = [*model.blocks[:4], *_claimed(model)]
    assert failures(model)["skip"].startswith("without blocks.4: LW-U73")


def _claimed(model: UniversalModel) -> list[Any]:
    """The layer that widens the stream, with the claim that it can be skipped."""
    from layerwise.structure import Layer, Stream

    module = model.module.get_submodule("blocks.4")
    return [Layer("blocks.4", 4, module, "linear", 144, True, "blocks", stream=Stream((0, 0), (), True))]


def test_an_output_that_a_skipped_layer_makes_infinite_is_found() -> None:
    class Dividing(ResidualNet):
        def forward(self, x: Tensor) -> Tensor:
            y = x
            for block in self.blocks:
                y = block(y)
            return self.head(y) / self.head(self.blocks[0](x) - x).abs().sum().sign()

    model = model_of(Dividing())
    with torch.no_grad():
        model.module.head.bias.zero_()
    assert "the output is not finite" in failures(model)["skip"]


def test_scores_that_no_gradient_reaches_and_scores_that_are_all_equal_are_found() -> None:
    class Cut(ResidualNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    assert failures(model_of(Cut()))["gradients"].startswith("0 of 4 layers have a score")
    flat = model_of(ResidualNet())
    with torch.no_grad():
        flat.module.head.weight.zero_()
    assert failures(flat)["gradients"] == "every score is the same"


def test_a_check_that_raises_is_a_reason_and_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, layers: Any) -> Tensor:
        raise ValueError("mine")

    monkeypatch.setattr(Replay, "skipping", broken)
    assert failures(model_of(ResidualNet())) == {"skip": "ValueError: mine"}


def test_what_counts_are_weights_that_run_without_tables_and_head() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.place = nn.Embedding(9, 8), nn.Parameter(torch.randn(1, 4, 8))
            self.enter, self.block, self.head = nn.Linear(8, 8), Residual(8), nn.Linear(8, 3)
            self.idle = nn.Linear(8, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.block(self.enter(self.table(ids) + self.place)))

    counted = uses_of(Net(), Batch((torch.tensor([[1, 2, 3, 4]]),))).counted
    assert {name.partition(".")[0] for name in counted} == {"enter", "block"}


def test_the_first_weight_that_meets_numbers_is_the_entrance() -> None:
    counted = uses_of(ResidualNet(), vectors()(2)).counted
    assert {name.partition(".")[0] for name in counted} == {"blocks"}


RECORDS: list[dict[str, Any]] = [
    {"group": "graph", "name": "GCN", "kinds": ["g"], "built": True, "failures": {}, "layers": 4},
    {"group": "graph", "name": "GAT", "kinds": ["g"], "built": True, "failures": {"skip": "shape [1, 2]"}, "layers": 4},
    {"group": "graph", "name": "PNA", "kinds": ["g"], "built": False, "error": "ImportError: none"},
    {"group": "graph", "name": "GIN", "kinds": ["g"], "built": True, "error": "no answer within 240 s"},
]


def test_the_page_counts_and_names_every_miss_with_its_reason() -> None:
    results = {
        "records": RECORDS,
        "listed": {"graph": 5},
        "environment": {"cpu": "c", "python": "3", "packages": {"torch": "2"}},
        "limits": "1 s",
    }
    text = page(results)
    assert "| PyTorch Geometric | 5 | 4 | 3 | 1 | 33.3 % | 2 | 2 | 1 | 2 |" in text
    assert "| `GAT` | skip | shape \\[1, 2\\] |" in text
    assert "| `GIN` | – | no answer within 240 s |" in text
    assert "| `PNA` | ImportError: none |" in text
    assert [passed(r) for r in RECORDS] == [True, False, False, False]


@pytest.mark.parametrize(("group", "name"), [("graph", "GCN"), ("torchaudio", "Emformer"), ("transformers", "LlamaForCausalLM")])
def test_one_model_of_a_group_is_built_fed_and_judged(group: str, name: str) -> None:
    if group == "graph":
        pytest.importorskip("torch_geometric")
    record = examined(group, name)
    assert passed(record), record
    assert record["kinds"] == list(GROUPS[group].kinds(name))


def test_a_reason_does_not_say_where_this_machine_keeps_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise RuntimeError("at /home/me/.venv/lib/python3.11/site-packages/torch/nn/modules/conv.py:565 it broke")

    monkeypatch.setitem(GROUPS, "odd", Group("odd", list, broken, lambda name: ()))
    assert examined("odd", "x")["error"] == "RuntimeError: at torch/nn/modules/conv.py:565 it broke"


def test_a_model_that_cannot_be_built_is_told_from_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    from layerwise.benchmark.architectures import torchaudio_models
    from layerwise.benchmark.architectures.torchaudio_models import Subject

    monkeypatch.setitem(torchaudio_models.SUBJECTS, "odd", Subject("Conformer", {"input_dim": 3}, tuple))
    record = examined("torchaudio", "odd")
    assert (record["built"], passed(record)) == (False, False)
    assert record["error"].startswith("Conformer: TypeError: ")


RESULTS = ROOT / "benchmarks" / "results" / "coverage.json"


def test_the_page_is_the_one_that_the_results_give() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert page(results) == (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8"), "run benchmarks/coverage.py --page"
    assert {r["group"] for r in results["records"]} == set(GROUPS)
