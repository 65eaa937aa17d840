"""Tasks on models and data that this project did not make: what scikit-learn and transformers say comes out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from layerwise.heads import embeddings
from layerwise.loading import load, load_data
from layerwise.measure import evaluate
from layerwise.tasks._decoding import Decoding
from tests.conftest import data_folder
from tests.real.test_real_models import minilm


@pytest.mark.data("banking77")
def test_minilm_finds_questions_of_the_same_intent_as_scikit_learn_counts(real_data: Path) -> None:
    from sklearn.neighbors import NearestNeighbors

    model = load(f"hf:{minilm()}", task="retrieval")
    data = load_data(real_data, model, "test", 128)
    found = evaluate(model, data).means()
    vectors, labels = embeddings(model, data)
    nearest = NearestNeighbors(n_neighbors=6, metric="cosine").fit(vectors).kneighbors(vectors, return_distance=False)[:, 1:]
    same, has_partner = labels[nearest] == labels[:, None], (labels[:, None] == labels).sum(1) > 1
    assert found["recall_at_1"] > 0.4
    assert found["recall_at_1"] == pytest.approx(same[has_partner, 0].mean(), abs=1e-12)
    assert found["recall_at_5"] == pytest.approx(same[has_partner].any(1).mean(), abs=1e-12)


@pytest.mark.data("stories260k")
def test_a_text_goes_on_as_transformers_generates_it(real_data: Path) -> None:
    model = load(f"hf:{real_data}", task="generation")
    data = load_data(data_folder() / "tinystories_sample", model, limit=2, batch_size=2)
    pairs = Decoding(samples=2, tokens=12, tokenize="13a").pairs(model, data)
    tokenizer = model.adapter.tokenizer  # type: ignore[attr-defined]  # the text adapter has one
    for row, pair in enumerate(pairs):
        ids, mask = data[0].kwargs["input_ids"][row], data[0].kwargs["attention_mask"][row].bool()
        prompt = ids[mask][: int(mask.sum()) // 2][None]
        theirs = model.module.generate(prompt, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(prompt))  # type: ignore[operator]  # transformers' own
        assert pair.written == tokenizer.decode(theirs[0, prompt.shape[1] :], skip_special_tokens=True)
        assert pair.wanted == tokenizer.decode(ids[mask][prompt.shape[1] :][:12], skip_special_tokens=True)
