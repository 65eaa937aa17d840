"""Spans: the loss of transformers, the best legal span, exact match and F1 by positions and by SQuAD's words."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import layerwise
from layerwise.data import Batch, Data
from layerwise.errors import DataError
from layerwise.tasks._texts import as_codes, as_text, exact_match, f1, normalised
from layerwise.tasks.question_answering import QuestionAnswering, best_spans
from tests.tasks.splitting import SPLITS, evaluated


def bert() -> nn.Module:
    from transformers import BertConfig, BertForQuestionAnswering

    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
    return BertForQuestionAnswering(config).eval()


def questions() -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids, segments = torch.randint(5, 50, (12, 9), generator=generator), torch.zeros(12, 9, dtype=torch.long)
    segments[:, 4:] = 1
    starts = torch.randint(4, 9, (12,), generator=generator)
    spans = torch.stack([starts, (starts + torch.randint(0, 3, (12,), generator=generator)).clamp_max(8)], 1)
    return Batch((), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": segments}, spans)


@pytest.mark.parametrize("sizes", [(12,), (5, 7)])
def test_a_reader_is_analyzed_by_name_with_the_loss_of_transformers(sizes: tuple[int, ...]) -> None:
    module, batch = bert(), questions()
    pieces = torch.arange(12).split(list(sizes))
    data = Data.of([batch.narrow(int(p[0]), int(p[-1]) + 1) for p in pieces])
    report = layerwise.analyze(layerwise.load(module, task="question_answering"), data, ["gradient_based", "layer_ablation"])
    with torch.no_grad():
        wanted = module(**batch.kwargs, start_positions=batch.labels[:, 0], end_positions=batch.labels[:, 1]).loss
    assert report.metrics["loss"] == pytest.approx(float(wanted), rel=1e-5)
    assert all(math.isfinite(v) and v > 0 for v in report.scores["gradient_based"].usable().values())


def test_the_best_span_is_the_best_of_all_legal_ones() -> None:
    torch.manual_seed(0)
    output, allowed = torch.randn(20, 2, 9), torch.rand(20, 9) < 0.7
    allowed[:, 0] = True
    for logits, legal, span in zip(output, allowed, best_spans(output, allowed, 3), strict=True):
        spans = [(s, e) for s in range(9) for e in range(s, min(s + 3, 9)) if legal[s] and legal[e]]
        assert tuple(span.tolist()) == max(spans, key=lambda x: float(logits[0, x[0]].double() + logits[1, x[1]].double()))


@pytest.mark.parametrize("sizes", SPLITS)
def test_positions_are_compared_one_by_one(sizes: tuple[int, ...]) -> None:
    batch = questions()
    torch.manual_seed(1)
    output = torch.randn(12, 2, 9)
    output[::2] += 9 * torch.nn.functional.one_hot(batch.labels[::2], 9)
    means = evaluated(QuestionAnswering(), output, batch, sizes).means()
    allowed = batch.kwargs["token_type_ids"].bool()
    allowed[:, 0] = True
    found = best_spans(output, allowed, 30).tolist()
    sets = [(set(range(s, e + 1)), set(range(a, b + 1))) for (s, e), (a, b) in zip(found, batch.labels.tolist(), strict=True)]
    assert means["exact_match"] == pytest.approx(sum(a == b for a, b in sets) / 12, abs=1e-12)
    assert means["f1_score"] == pytest.approx(sum(2 * len(a & b) / (len(a) + len(b)) for a, b in sets) / 12, abs=1e-12)
    assert 0.5 <= means["exact_match"] < means["f1_score"] < 1


def test_words_are_compared_as_squad_does() -> None:
    assert normalised("The  Cat, a dog!") == "cat dog"
    assert exact_match("The cat.", ["dog", "cat"]) == 1.0
    assert f1("the black cat", ["a cat", "dog"]) == pytest.approx(2 / 3)
    assert f1("", [""]) == f1("the", [""]) == 1.0
    assert f1("cat", [""]) == f1("cat", []) == 0.0


def test_with_texts_the_answer_is_cut_from_the_context() -> None:
    context = "It was the Grand Canal, in Venice."
    words = [(0, 0), (0, 2), (3, 6), (7, 10), (11, 16), (17, 22), (22, 23), (24, 26), (27, 33), (33, 34)]
    output = torch.zeros(2, 2, 10)
    output[0, 0, 3], output[0, 1, 5] = 9, 9  # "the Grand Canal"
    output[1, 0, 7], output[1, 1, 8] = 9, 9  # "in Venice"
    labels = {
        "span": torch.tensor([[4, 5], [8, 8]]),
        "context": as_codes([context] * 2),
        "offsets": torch.tensor([words] * 2),
        "answers": torch.full((2, 2, 13), -1),
    }
    for i, answers in enumerate((["Grand Canal!", "canal"], ["Venice, Italy", "Venice"])):
        for j, answer in enumerate(answers):
            labels["answers"][i, j, : len(answer)] = as_codes([answer])[0]
    figures = QuestionAnswering().figures(output, Batch((torch.zeros(2, 10),), {}, labels), None)
    assert figures["exact_match"][0].tolist() == [1.0, 0.0]
    assert figures["f1_score"][0].tolist() == pytest.approx([1.0, 2 / 3])
    assert as_text(labels["context"][0]) == context


def test_an_answer_outside_the_tokens_names_its_row() -> None:
    with pytest.raises(DataError, match=r"LW-D34 .*row 1 .*\[3, 9\]"):
        QuestionAnswering().check(Batch((), {}, torch.tensor([[0, 0], [3, 9]])), torch.zeros(2, 2, 9))
