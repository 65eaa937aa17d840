"""Rows with answers: spans of a context, and targets that go on after a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import nn

import layerwise
from layerwise.adapters.text import TextModalityAdapter
from layerwise.errors import DataError
from layerwise.model import UniversalModel
from layerwise.task import LanguageModelling
from layerwise.tasks._texts import as_text
from layerwise.tasks.question_answering import QuestionAnswering
from tests.adapters.test_text import ENCODER, bert, gpt2

ROW = {"text": "a b", "text_pair": "c d, e f"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij,"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "model_max_length": 9}')
    return tmp_path


def reader() -> nn.Module:
    torch.manual_seed(0)
    return tf.BertForQuestionAnswering(tf.BertConfig(**ENCODER)).eval()


def model_of(module: nn.Module, folder: Path) -> UniversalModel:
    return UniversalModel(module, adapter=TextModalityAdapter.of(module, folder))


@pytest.mark.parametrize("answer", [{"text": ["d, e", "e"], "answer_start": [2, 5]}, ["d, e", "e"]])
def test_an_answer_is_found_in_tokens_and_can_be_read_back(folder: Path, answer: Any) -> None:
    batch = TextModalityAdapter.of(reader(), folder).collate([{**ROW, "answer": answer}, {**ROW, "answer": "f"}])
    assert batch.kwargs["input_ids"][0].tolist() == [2, 5, 6, 3, 7, 8, 15, 9, 3]  # the closing token took the place of f
    assert batch.labels["span"].tolist() == [[5, 7], [0, 0]]
    first, last = batch.labels["offsets"][0, 5, 0], batch.labels["offsets"][0, 7, 1]
    assert as_text(batch.labels["context"][0])[first:last] == "d, e"
    assert [as_text(row) for row in batch.labels["answers"][0]] == ["d, e", "e"]
    output = -9.0 * torch.ones(2, 2, 9)
    output[0, 0, 5], output[0, 1, 7], output[1, :, 0] = 9, 9, 9
    figures = QuestionAnswering().figures(output, batch, None)
    assert figures["exact_match"][0].tolist() == [1.0, 0.0]  # what was cut off is not found


def test_a_question_may_have_no_answer(folder: Path) -> None:
    rows = [{**ROW, "answer": {"text": [], "answer_start": []}}, {**ROW, "answer": None}]
    batch = TextModalityAdapter.of(reader(), folder).collate(rows)
    assert batch.labels["span"].tolist() == [[0, 0], [0, 0]]
    output = torch.zeros(2, 2, 9)
    output[:, :, 0] = 9
    assert QuestionAnswering().figures(output, batch, None)["exact_match"][0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("answer", ["x", {"text": ["d"], "answer_start": [0]}])
def test_an_answer_that_the_context_does_not_hold_names_its_row(folder: Path, answer: Any) -> None:
    with pytest.raises(DataError, match=r"LW-D32 row 0: The context does not hold"):
        TextModalityAdapter.of(reader(), folder).collate([{**ROW, "answer": answer}])


def test_a_file_of_questions_is_read_by_its_columns_and_judged_as_question_answering(folder: Path, tmp_path: Path) -> None:
    answers = [{"text": ["d"], "answer_start": [2]}, {"text": ["c d"], "answer_start": [0]}, {"text": [], "answer_start": []}]
    table = pd.DataFrame({"question": ["a", "a b", "b"], "context": ["c d", "c d", "d c"], "answers": answers})
    table.to_parquet(tmp_path / "questions.parquet")
    model = model_of(reader(), folder)
    columns = {"text": "question", "text_pair": "context", "answer": "answers"}
    data = layerwise.load_data(tmp_path / "questions.parquet", model, columns=columns, seed=None)
    report = layerwise.analyze(model, data, ["gradient_based", "layer_ablation"])
    assert report.task == "question_answering"
    batch = data[0]
    with torch.no_grad():
        spans = batch.labels["span"]
        wanted = model.module(**batch.kwargs, start_positions=spans[:, 0], end_positions=spans[:, 1]).loss
    assert report.metrics["loss"] == pytest.approx(float(wanted), rel=1e-5)


def test_pairs_read_from_a_file_keep_their_segments(folder: Path, tmp_path: Path) -> None:
    pd.DataFrame({"one": ["a"], "two": ["b c"], "label": [1]}).to_parquet(tmp_path / "pairs.parquet")
    model = model_of(bert(True), folder)
    data = layerwise.load_data(tmp_path / "pairs.parquet", model, columns={"text": "one", "text_pair": "two"})
    assert data[0].kwargs["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1]]


def test_a_target_goes_on_after_the_prompt_which_is_not_judged(folder: Path, tmp_path: Path) -> None:
    pd.DataFrame({"ask": ["a b", "c"], "say": ["d e", "f"]}).to_parquet(tmp_path / "said.parquet")
    torch.manual_seed(0)
    model = model_of(gpt2().eval(), folder)
    data = layerwise.load_data(tmp_path / "said.parquet", model, columns={"text": "ask", "target": "say"}, seed=None)
    (batch,) = data
    assert batch.kwargs["input_ids"].tolist()[0] == [
        2,
        5,
        6,
        8,
        9,
    ]  # [CLS] a b d e: nothing closes the prompt or opens the target
    assert batch.labels.tolist() == [[-100, -100, -100, 8, 9], [-100, -100, 10, -100, -100]]
    values, weights = LanguageModelling().losses(model.predict(batch), batch, None)
    logits = model.predict(batch)
    following = torch.cat([logits[0, 2:4], logits[1, 1:2]])
    wanted = F.cross_entropy(following, torch.tensor([8, 9, 10]), reduction="sum")
    assert float(values.sum()) == pytest.approx(float(wanted), rel=1e-5)
    assert weights.tolist() == [2.0, 1.0]
