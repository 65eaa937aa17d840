"""What every registered adapter promises. A new one must add its case here, or the first test fails."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers as tf
from torch import nn

from layerwise.adapter import ADAPTERS, adapter_for
from layerwise.errors import DataError
from layerwise.model import UniversalModel
from layerwise.native import VFTModel
from layerwise.rows import Record
from tests.graphs import Convolutions
from tests.tables import Described
from tests.tables import rows as table


@dataclass(frozen=True)
class Case:
    """A model of the modality, and rows that it can read."""

    build: Callable[[], nn.Module]
    rows: list[dict[str, Any]]


def bert() -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return tf.BertForSequenceClassification(tf.BertConfig(**sizes, vocab_size=60))


def wav2vec2() -> nn.Module:
    front: dict[str, Any] = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    position = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8}
    config = tf.Wav2Vec2Config(**front, **sizes, **position, feat_extract_norm="layer", do_stable_layer_norm=True)
    return tf.Wav2Vec2ForSequenceClassification(config)


def clip() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 8}))


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=8, patch_size=2, embed_dim=16, depth=2, num_heads=2, num_classes=3)


def native() -> nn.Module:
    sizes: dict[str, Any] = {"d_model": 16, "n_layers": 2, "n_heads": 2, "rank": 4, "max_positions": 16}
    return VFTModel(**sizes, vocab_size=9, image=(1, 4, 4, 2), classes=3)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


PIXELS = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
TABLE = table()
CLIP = np.random.default_rng(1).normal(0, 0.1, 900).astype(np.float32)
CASES = {
    "native": Case(
        native, [{"input_ids": [5, 6, 7], "image": PIXELS, "label": 1}, {"input_ids": [8], "image": PIXELS, "label": 0}]
    ),
    "audio": Case(
        wav2vec2, [{"audio": CLIP, "sample_rate": 16000, "label": 1}, {"audio": CLIP[:500], "sample_rate": 16000, "label": 0}]
    ),
    "graph": Case(Convolutions, [{"smiles": "CCO", "label": 1}, {"smiles": "c1ccccc1", "label": 0}]),
    "multimodal": Case(
        clip, [{"input_ids": [1, 6, 7, 2], "image": PIXELS, "label": 1}, {"input_ids": [1, 2], "image": PIXELS[:5], "label": 0}]
    ),
    "tabular": Case(Described, TABLE[:2]),
    "tensor": Case(plain, [{"x": [1.0, 2.0, 3.0], "label": 0}, {"x": [0.0, 1.0, 0.0], "label": 1}]),
    "text": Case(bert, [{"input_ids": [5, 6, 7], "label": 1}, {"input_ids": [8], "label": 0}]),
    "vision": Case(vit, [{"image": PIXELS, "label": 2}, {"image": PIXELS[:, :, 0], "label": 0}]),
}
each = pytest.mark.parametrize("name", CASES)


def test_every_adapter_has_a_case() -> None:
    assert set(CASES) == set(ADAPTERS)


@each
def test_it_claims_its_models_and_is_chosen(name: str) -> None:
    module = CASES[name].build()
    assert ADAPTERS[name].claims(module)
    assert type(adapter_for(module)) is ADAPTERS[name]


@each
def test_rows_become_a_batch_that_the_model_takes(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = UniversalModel(case.build())
    batch = model.adapter.collate(case.rows)
    assert batch.size == 2
    assert batch.labels.tolist() == [row["label"] for row in case.rows]
    output = model.predict(batch)
    assert output.shape[0] == 2
    assert bool(output.isfinite().all())
    alone = torch.cat([model.predict(model.adapter.collate([row])) for row in case.rows])
    torch.testing.assert_close(output, alone, rtol=1e-4, atol=1e-5)


@each
def test_rows_and_module_are_left_alone_and_the_batch_is_the_same_each_time(name: str) -> None:
    case = CASES[name]
    module = case.build()
    weights, rows, state = copy.deepcopy(module.state_dict()), copy.deepcopy(case.rows), torch.get_rng_state()
    adapter = adapter_for(module)
    one, two = adapter.collate(case.rows), adapter.collate(case.rows)
    adapter.example(module)
    assert all(torch.equal(a, b) for a, b in zip(one.tensors(), two.tensors(), strict=True))
    assert repr(case.rows) == repr(rows)
    assert module.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[key], value) for key, value in module.state_dict().items())


@each
def test_preparing_first_changes_nothing(name: str) -> None:
    adapter = adapter_for(CASES[name].build())
    rows = CASES[name].rows
    prepared, notes = adapter.prepare(rows)
    assert notes == ()
    again, _ = adapter.prepare(prepared)
    for rows_now in (prepared, again):
        pairs = zip(adapter.collate(rows).tensors(), adapter.collate(rows_now).tensors(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@each
def test_the_example_is_valid_and_the_same_each_time(name: str) -> None:
    module = CASES[name].build().eval()
    adapter = adapter_for(module)
    one, two = adapter.example(module), adapter.example(module)
    if one is None or two is None:
        assert name == "tensor", "only a plain module does not say what it reads"
        return
    assert all(torch.equal(a, b) for a, b in zip(one.tensors(), two.tensors(), strict=True))
    assert one.size == 2, "one sample would let the batch dimension pass for a constant"
    assert UniversalModel(module).predict(one).shape[0] == 2


@each
def test_saving_and_coming_back_gives_the_same_batches(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    module = case.build()
    adapter_for(module).save(tmp_path)
    pairs = zip(
        adapter_for(module).collate(case.rows).tensors(), adapter_for(module, tmp_path).collate(case.rows).tensors(), strict=True
    )
    assert all(torch.equal(a, b) for a, b in pairs)


@each
def test_a_row_of_something_else_is_named(name: str) -> None:
    adapter = adapter_for(CASES[name].build())
    with pytest.raises(DataError) as caught:
        adapter.collate([CASES[name].rows[0], Record({"smell": "roses"}, "rows.parquet, row 12")])
    assert "rows.parquet, row 12" in str(caught.value)
    assert "smell" in str(caught.value)
    assert caught.value.remedy
