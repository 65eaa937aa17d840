"""Generation, translation, summarization: a network that copies is perfect, one wrong word in eight is known by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise
from layerwise.data import Batch, Data
from layerwise.errors import DataError
from layerwise.measure import evaluate
from layerwise.model import UniversalModel
from layerwise.task import LanguageModelling
from layerwise.tasks._decoding import Pair, compared
from layerwise.tasks.generation import Generation
from layerwise.tasks.summarization import Summarization
from layerwise.tasks.translation import Translation
from tests.models import CASES

VOCABULARY, END, WRONG = 40, 1, 2


class Copier(nn.Module):
    """Writes the source word for word; an `erring` one gets the second word wrong."""

    def __init__(self, erring: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(9.0))
        self.erring = erring
        self.config = SimpleNamespace(eos_token_id=END)

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        said = input_ids[:, : decoder_input_ids.shape[1]].clone()
        if self.erring and said.shape[1] > 1:
            said[:, 1] = WRONG
        return self.scale * F.one_hot(said, VOCABULARY)


def sentences(count: int = 12) -> Batch:
    """Eight different words and the end; the decoder begins with 0."""
    generator = torch.Generator().manual_seed(0)
    words = torch.stack([torch.randperm(VOCABULARY - 3, generator=generator)[:8] + 3 for _ in range(count)])
    source = torch.cat([words, torch.full((count, 1), END)], 1)
    decoder = torch.cat([torch.zeros(count, 1, dtype=torch.long), source], 1)
    return Batch((), {"input_ids": torch.cat([source, source[:, :1]], 1), "decoder_input_ids": decoder}, decoder)


@pytest.mark.parametrize("sizes", [(12,), (5, 7)])
def test_a_copy_is_perfect_however_the_data_are_split(sizes: tuple[int, ...]) -> None:
    batch = sentences()
    data = Data.of([batch.narrow(0, sizes[0]), batch.narrow(sizes[0], 12)][: len(sizes)])
    means = evaluate(UniversalModel(Copier(), task=Translation()), data).means()
    assert (means["bleu"], means["chrf"], means["ter"]) == (pytest.approx(100), pytest.approx(100), 0.0)
    means = evaluate(UniversalModel(Copier(), task=Summarization()), data).means()
    assert [means[name] for name in ("rouge", "rouge_1", "rouge_2")] == [1.0, 1.0, 1.0]


def test_one_wrong_word_in_eight_is_known_by_hand() -> None:
    data = Data.of([sentences()])
    means = evaluate(UniversalModel(Copier(erring=True), task=Translation()), data).means()
    assert means["bleu"] == pytest.approx(100 * (7 / 8 * 5 / 7 * 4 / 6 * 3 / 5) ** 0.25)
    assert means["ter"] == pytest.approx(100 / 8)
    found = evaluate(UniversalModel(Copier(erring=True), task=Summarization(samples=3)), data)
    assert [found.means()[n] for n in ("rouge", "rouge_1", "rouge_2")] == pytest.approx([7 / 8, 7 / 8, 5 / 7])
    assert found.stderr()["rouge_1"] == pytest.approx(0, abs=1e-12)  # every sentence errs alike


def test_the_end_is_where_the_network_says_it_and_too_long_a_text_is_cut() -> None:
    module, data = Copier(), Data.of([sentences()])
    assert evaluate(UniversalModel(module, task=Summarization(tokens=4)), data).means()["rouge_1"] == pytest.approx(2 / 3)
    module.config = SimpleNamespace(eos_token_id=None)  # it never ends: cut where the right text ends, the end mark included
    assert evaluate(UniversalModel(module, task=Translation(tokens=9)), data).means()["bleu"] == pytest.approx(100)


class Counter(nn.Module):
    """The next token is the last one plus one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(9.0))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.scale * F.one_hot((input_ids + 1) % VOCABULARY, VOCABULARY)


def test_a_text_is_continued_after_its_prompt() -> None:
    ids = torch.arange(12)[None] + torch.arange(3)[:, None]
    ids[2, 8:] = 0
    mask = torch.ones_like(ids)
    mask[2, 8:] = 0  # padding is no text
    data = Data.of([{"input_ids": ids, "attention_mask": mask}])
    means = evaluate(UniversalModel(Counter(), task=Generation()), data).means()
    assert (means["bleu"], means["rouge"]) == (pytest.approx(100), 1.0)
    labels = ids.clone()
    labels[:, :3] = -100
    labels[0, 6] = 33  # what should follow is the data's own text, not the label
    model = UniversalModel(Counter(), task=Generation(tokens=5))
    assert evaluate(model, Data.of([Batch((), {"input_ids": ids[:2]}, labels[:2])])).means()["bleu"] == pytest.approx(100)


def test_a_text_without_a_continuation_is_refused() -> None:
    data = Data.of([{"input_ids": torch.tensor([[3, 4]]), "labels": torch.tensor([[-100, -100]])}])
    with pytest.raises(DataError, match="no prompt and continuation"):
        Generation().acted(UniversalModel(Counter()), data)
    without = Data.of([Batch((), sentences().kwargs)])
    with pytest.raises(DataError, match="needs a target"):
        Translation().acted(UniversalModel(Copier()), without)


def test_chinese_is_compared_by_characters() -> None:
    pairs = [Pair("我喜欢猫很多", "我喜欢狗很多")]
    assert compared(pairs, ("rouge_1",), "zh")["rouge_1"] == pytest.approx(5 / 6)
    assert compared(pairs, ("rouge_1",), "13a")["rouge_1"] == 0.0  # rouge-score drops what is not a–z or a digit
    assert compared(pairs, ("ter",), "zh")["ter"] == pytest.approx(100 / 6)


@pytest.mark.parametrize(
    ("task", "metrics"), [(Translation(samples=2, tokens=4), ("bleu", "chrf", "ter")), (Summarization(2, 4), ("rouge",))]
)
def test_a_sequence_to_sequence_network_is_analyzed_by_its_task(task: Any, metrics: tuple[str, ...]) -> None:
    model = CASES["t5"].model(task)
    (batch,) = CASES["t5"].data(4)
    data = Data.of([Batch((), batch.kwargs, batch.kwargs["decoder_input_ids"])])
    report = layerwise.analyze(model, data, ["gradient_based", "layer_ablation"])
    assert report.removal is not None
    assert report.removal.metric == "perplexity"
    assert all(math.isfinite(report.metrics[name]) for name in metrics)
    plain = evaluate(CASES["t5"].model(LanguageModelling()), data).means()
    assert {name: report.metrics[name] for name in plain} == pytest.approx(plain, rel=1e-9)


def test_a_causal_network_is_analyzed_by_name() -> None:
    from tests.models import gpt2

    torch.manual_seed(0)
    model = layerwise.load(gpt2(), task="generation(samples=2, tokens=3)")
    data = Data.of([{"input_ids": torch.randint(3, 100, (4, 8))}])
    report = layerwise.analyze(model, data, ["gradient_flow", "layer_ablation"])
    assert report.task == "generation"
    assert {"perplexity", "bleu", "rouge", "token_accuracy", "loss"} == set(report.metrics)
