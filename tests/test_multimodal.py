"""The analyses of modalities against models in which redundancy, synergy, meeting places and costs were planted."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from layerwise.games import interactions
from layerwise.loading import load, load_data
from layerwise.modal_attention import MODEL, SEVERAL, cross_attention_analysis, owners
from layerwise.modal_game import Complementarity, modal_complementarity, modal_game, modal_interaction_strength
from layerwise.modal_layers import effect, information_fusion_analysis, missing_modality_cost
from layerwise.model import UniversalModel
from layerwise.multimodal import MultiModalAnalysis
from layerwise.task import Fidelity
from tests.adapters.test_multimodal import FUSION, blip2, llava, rows
from tests.conftest import ROOT

LN2 = math.log(2)
PIXEL: dict[str, Any] = {"input_size": (1, 1, 1), "mean": (0.0,), "std": (1.0,), "crop_pct": 1.0}
CFG: dict[str, Any] = {"image": PIXEL, "audio": {"rate": 8000, "kind": "waveform"}}
Cases = list[tuple[int, int, int]]  # image's bit, audio's bit, answer; all equally likely

REDUNDANT: Cases = [(0, 0, 0), (1, 1, 1)]
SYNERGY: Cases = [(a, b, a ^ b) for a in (0, 1) for b in (0, 1)]
ONE_ONLY: Cases = [(a, b, a) for a in (0, 1) for b in (0, 1)]
APART: Cases = [(a, b, 2 * a + b) for a in (0, 1) for b in (0, 1)]
NOTHING: Cases = [(a, b, y) for a in (0, 1) for b in (0, 1) for y in (0, 1)]


class Bayes(nn.Module):
    """Gives the exact posterior of the answer from the bits that are there."""

    def __init__(self, cases: Cases) -> None:
        super().__init__()
        self.multimodal_cfg = CFG
        self.cases = torch.tensor(cases, dtype=torch.float32)

    def forward(self, image: Tensor, audio: Tensor, present: Tensor) -> Tensor:
        bits = torch.stack([image.flatten(), audio[:, 0]], 1)
        fits = ((bits[:, None] == self.cases[None, :, :2]) | ~present[:, None]).all(2).float()
        answers = nn.functional.one_hot(self.cases[:, 2].long(), 4).float()
        chances = fits @ answers / fits.sum(1, keepdim=True)
        return chances.clamp_min(1e-30).log()


def bits(cases: Cases) -> list[dict[str, Any]]:
    return [
        {"image": np.full((1, 1), float(a), np.float32), "audio": [float(b)], "sample_rate": 8000, "label": y}
        for a, b, y in cases
    ]


def split(cases: Cases) -> Complementarity:
    model = UniversalModel(Bayes(cases))
    game = modal_game(model, load_data(bits(cases), model))
    return modal_complementarity(game)["image", "audio"]


PLANTED: dict[
    str, tuple[Cases, float, float, float, float, float]
] = {  # redundancy, only image, only audio, synergy, interaction
    "redundant": (REDUNDANT, LN2, 0, 0, 0, -LN2),
    "synergy": (SYNERGY, 0, 0, 0, LN2, LN2),
    "one only": (ONE_ONLY, 0, LN2, 0, 0, 0),
    "apart": (APART, 0, LN2, LN2, 0, 0),
    "nothing": (NOTHING, 0, 0, 0, 0, 0),
}


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED)
def test_what_was_planted_is_found(planted: tuple[Cases, float, float, float, float, float]) -> None:
    cases, redundancy, image, audio, synergy, interaction = planted
    model = UniversalModel(Bayes(cases))
    game = modal_game(model, load_data(bits(cases), model))
    found = modal_complementarity(game)["image", "audio"]
    parts = (found.redundancy.value, found.unique["image"].value, found.unique["audio"].value, found.synergy.value)
    assert parts == pytest.approx((redundancy, image, audio, synergy), abs=1e-5)
    strength = modal_interaction_strength(game)
    assert strength.interactions["image", "audio"].value == pytest.approx(interaction, abs=1e-5)
    gain = game.worth(["image", "audio"]).value - game.worth([]).value
    assert sum(parts) == pytest.approx(gain, abs=1e-5)
    assert sum(value.value for value in strength.shapley.values()) == pytest.approx(gain, abs=1e-5)
    assert found.bounds[0] - 1e-5 <= found.redundancy.value <= found.bounds[1] + 1e-5


def test_bounds_say_what_the_worths_leave_open() -> None:
    assert split(APART).bounds == pytest.approx((0, LN2), abs=1e-5)
    assert split(REDUNDANT).bounds == pytest.approx((LN2, LN2), abs=1e-5)


def test_interactions_follow_the_paper() -> None:
    """Slowly, by factorials, for four players."""
    players = range(4)
    generator = torch.Generator().manual_seed(0)
    sets = [frozenset(s) for n in range(5) for s in itertools.combinations(players, n)]
    game = {s: torch.rand((), generator=generator, dtype=torch.float64) for s in sets}
    for (a, b), value in interactions(game, 4).items():
        want = 0.0
        for s in sets:
            if not s & {a, b}:
                weight = math.factorial(len(s)) * math.factorial(4 - len(s) - 2) / math.factorial(3)
                want += weight * float(game[s | {a, b}] - game[s | {a}] - game[s | {b}] + game[s])
        assert float(value) == pytest.approx(want)


class Adds(nn.Module):
    """x plus a product or a copy of some of its units; two matrices make it a block and change nothing."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        nn.init.zeros_(self.down.weight)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x)) + self.change(x)


class Chain(nn.Module):
    """A stream of four units: the image's number, the audio's number, and two that blocks fill; the answer reads the last two."""

    def __init__(self, *changes: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.multimodal_cfg = CFG
        self.blocks = nn.ModuleList(Adds(change) for change in changes)
        self.head = nn.Linear(4, 2, bias=False)
        self.head.weight.data = torch.tensor([[0.0, 0, -1, -1], [0, 0, 1, 1]])

    def forward(self, image: Tensor, audio: Tensor, present: Tensor) -> Tensor:
        nothing = torch.zeros_like(audio[:, 0])
        x = torch.stack([image.flatten(), audio[:, 0], nothing, nothing], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def into(unit: int, value: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        added = torch.zeros_like(x)
        added[:, unit] = value(x)
        return added

    return change


SIGNS: Cases = [(a, b, int(a + b > 0)) for a in (-1, 1) for b in (-1, 1)]
KEEPS, TIMES = into(2, lambda x: 0 * x[:, 0]), into(2, lambda x: x[:, 0] * x[:, 1])


def test_modalities_that_add_up_do_not_interact_and_a_product_does() -> None:
    model = UniversalModel(Chain(KEEPS, TIMES))
    found = information_fusion_analysis(model, load_data(bits(SIGNS), model))
    shares = {layer: [share.value for share in fusion.shares.values()] for layer, fusion in found.items()}
    assert list(found["blocks.0"].shares) == [("image",), ("audio",), ("image", "audio")]
    assert shares["blocks.0"] == pytest.approx([1 / 2, 1 / 2, 0], abs=1e-12)
    assert shares["blocks.1"] == pytest.approx([5 / 11, 5 / 11, 1 / 11], abs=1e-6)  # a/2, b/2, and ab/4 in all three
    assert found["blocks.1"].fused == pytest.approx(1 / 11, abs=1e-6)
    assert found["blocks.1"].moved.value == pytest.approx(11 / 16 / 3, abs=1e-6)


def test_effects_sum_to_the_stream_and_their_squares_to_its_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    sets = [frozenset(s) for n in range(4) for s in itertools.combinations(range(3), n)]
    found = {s: torch.randn(2, 5, generator=generator) for s in sets}
    effects = {s: effect(found, s) for s in sets}
    for s in sets:
        whole = sum((effects[t] * (-1.0) ** len(t - s) for t in sets), start=torch.zeros(2, 5, dtype=torch.float64))
        torch.testing.assert_close(whole, found[s].double())
    variance = torch.stack([found[s] for s in sets]).double().var(0, correction=0)
    torch.testing.assert_close(torch.stack([effects[t].square() for t in sets if t]).sum(0), variance)


def test_a_layers_cost_is_that_of_what_it_reads() -> None:
    model = UniversalModel(Chain(into(2, lambda x: 2 * x[:, 0]), into(3, lambda x: x[:, 1])))
    data = load_data(bits(SIGNS), model)
    costs = missing_modality_cost(model, data)
    whole = modal_game(model, data)
    for layer, reads, ignores in (("blocks.0", "image", "audio"), ("blocks.1", "audio", "image")):
        rest = whole.worth(["image", "audio"]).value - whole.worth([ignores]).value
        assert costs[layer][reads].value == pytest.approx(rest, abs=1e-6)
        assert abs(costs[layer][reads].value) > 0.05
        assert costs[layer][ignores].value == 0


def test_uniform_attention_is_shared_by_how_many_positions_each_has() -> None:
    torch.manual_seed(0)
    model = load(FUSION)
    for block in model.module.blocks:  # type: ignore[union-attr]
        block.qkv.weight.data[:64] *= 1e-4
        block.qkv.bias.data[:64] = 0
    found = cross_attention_analysis(model, load_data(rows(), model))
    assert list(found) == ["blocks.0", "blocks.1", "blocks.2"]
    keys = {"image": 16 / 30, "audio": 12 / 30, "text": 1 / 30, MODEL: 1 / 30}
    for query, key in itertools.product(keys, keys):
        assert found["blocks.2"].mass[query, key].value == pytest.approx(keys[key], abs=1e-4), (query, key)
    strangers = (16 * 13 + 12 * 17 + 1 * 28) / 30 / 29
    assert found["blocks.2"].cross.value == pytest.approx(strangers, abs=1e-4)


def test_cross_attention_of_one_stack_to_another() -> None:
    torch.manual_seed(0)
    model = UniversalModel(blip2())
    rows = [{"input_ids": [5, 6, 2], "image": np.random.default_rng(s).random((8, 8, 3))} for s in range(2)]
    found = cross_attention_analysis(model, load_data(rows, model))
    former = found["qformer.encoder.layer.1"]  # learned queries, which look at each other and then at the image
    assert former.mass[MODEL, "image"].value + former.mass[MODEL, MODEL].value == pytest.approx(1)
    assert 0.25 < former.mass[MODEL, "image"].value < 0.5, (
        "one of two calls goes to the image, whose class token depends on nothing"
    )
    language = found["language_model.model.decoder.layers.1"]
    for query in ("text", "image"):
        given = [value.value for (asking, _), value in language.mass.items() if asking == query]
        assert sum(given) == pytest.approx(1)
    assert language.mass["text", "image"].value > 0.2
    assert ("image", "text") not in language.mass, "the image comes first, and attention is causal"


def test_owners() -> None:
    changed = torch.tensor([[[True, False, True, False]], [[False, True, True, False]]])
    assert owners(changed).tolist() == [[0, 1, 3, 2]]
    assert [("a", "b", MODEL, SEVERAL)[i] for i in owners(changed)[0]] == ["a", "b", SEVERAL, MODEL]


def test_everything_at_once() -> None:
    torch.manual_seed(0)
    data = rows() * 2
    columns = {name: [row[key] for row in data] for name, key in (("text_data", "text"), ("image_data", "image"))}
    sounds = [row["audio"] for row in data]
    model = load(FUSION)
    report = MultiModalAnalysis().analyze_multimodal_model(model, **columns, audio_data=sounds, sample_rate=8000)
    assert report.modalities == ("image", "audio", "text")
    assert report.task == "fidelity"
    assert report.samples == 4
    assert set(report.missing_modality_cost["blocks.1"]) == set(report.modalities)
    frame = report.to_frame()
    assert frame["layer"].tolist() == ["blocks.0", "blocks.1", "blocks.2"]
    shares = frame[[c for c in frame if c.startswith("share ")]]
    assert shares.shape[1] == 7
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    assert json.loads(json.dumps(report.to_dict()))["missing_cost"]["text"]["value"] >= 0
    assert "is missed most" in report.summary()
    again = MultiModalAnalysis(batch_size=3).analyze_multimodal_model(model, **columns, audio_data=sounds, sample_rate=8000)
    np.testing.assert_allclose(again.to_frame().drop(columns="layer"), frame.drop(columns="layer"), atol=1e-5)


def test_two_of_three_are_played_with_and_the_model_is_left_alone() -> None:
    model = load(FUSION)
    data = rows()
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    given = {"text_data": [row["text"] for row in data], "image_data": [row["image"] for row in data], "labels": [3, 4]}
    report = MultiModalAnalysis().analyze_multimodal_model(model, **given)
    assert report.modalities == ("image", "text")
    assert report.task == "classification"
    assert "2 of 2 rows have no audio" in report.notes
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())


def test_the_pages_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "multimodal.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(block, "docs/multimodal.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "is missed most" in printed
    assert "text.4" in printed


def test_the_pages_figures_are_the_committed_results() -> None:
    page = (ROOT / "docs" / "multimodal.md").read_text(encoding="utf-8")
    results = json.loads((ROOT / "benchmarks" / "results" / "trimodal.json").read_text())
    table = re.findall(r"^\|(.+)\|$", page.partition("## On real data")[2].partition("\n## ")[0], re.MULTILINE)
    shown = set(re.findall(r"-?\d\.\d\d ± \d\.\d\d", "".join(table)))
    known = {f"{mean:.2f} ± {std:.2f}" for kind in ("fusion", "late") for mean, std in results[kind].values()}
    assert len(shown) > 15
    assert shown <= known


def test_a_language_model_that_sees() -> None:
    torch.manual_seed(0)
    model = UniversalModel(llava())
    images = [np.random.default_rng(s).random((8, 8, 3)) for s in range(2)]
    data = load_data([{"input_ids": [1, 7, 8, 9], "image": image} for image in images], model)
    report = MultiModalAnalysis().analyze(model, data)
    assert report.task == "language_modelling"
    towers = report.information_fusion_analysis
    assert towers["model.vision_tower.encoder.layers.1"].shares["image",].value == pytest.approx(1)
    assert towers["model.language_model.layers.0"].fused > 0
    assert report.missing_modality_cost["model.vision_tower.encoder.layers.0"]["text"].value == pytest.approx(0, abs=1e-6)
    assert model.task != Fidelity()
