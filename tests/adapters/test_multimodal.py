"""Several modalities: what each model is fed, what a missing one becomes, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn

from layerwise.adapter import adapter_for
from layerwise.adapters.multimodal import MultiModalAdapter
from layerwise.errors import DataError, UsageError
from layerwise.loading import load, load_data
from layerwise.model import UniversalModel
from layerwise.task import Classification, Fidelity, LanguageModelling, Task
from tests.conftest import ROOT

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT: dict[str, Any] = {**SIZES, "vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IMAGE: dict[str, Any] = {**SIZES, "image_size": 8, "patch_size": 4}
AUDIO: dict[str, Any] = {"spec_size": 64, "num_mel_bins": 16, "patch_size": 4, "patch_stride": (4, 4), "window_size": 4}
AUDIO |= {"patch_embeds_hidden_size": 8, "depths": [2, 2], "num_attention_heads": [2, 2], "hidden_size": 16}
FUSION = f"{ROOT}/examples/trimodal.py:fusion"


def clip() -> nn.Module:
    return tf.CLIPModel(tf.CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=12)).eval()


def siglip() -> nn.Module:
    text = {**TEXT, "max_position_embeddings": 16}
    return tf.SiglipModel(tf.SiglipConfig(text_config=text, vision_config=IMAGE)).eval()


def clap() -> nn.Module:
    return tf.ClapModel(tf.ClapConfig(text_config={**SIZES, "vocab_size": 60}, audio_config=AUDIO, projection_dim=12)).eval()


def llava() -> nn.Module:
    parts: dict[str, Any] = {"text_config": tf.LlamaConfig(**TEXT), "vision_config": tf.CLIPVisionConfig(**IMAGE)}
    return tf.LlavaForConditionalGeneration(tf.LlavaConfig(**parts, image_token_index=50, vision_feature_layer=-1)).eval()


def blip2() -> nn.Module:
    former = {**SIZES, "vocab_size": 60, "encoder_hidden_size": 16, "cross_attention_frequency": 1}
    text = {"model_type": "opt", **TEXT, "ffn_dim": 32, "word_embed_proj_dim": 16}
    parts: dict[str, Any] = {"vision_config": IMAGE, "qformer_config": former, "text_config": text}
    return tf.Blip2ForConditionalGeneration(tf.Blip2Config(**parts, num_query_tokens=4, image_token_index=50)).eval()


MODELS: dict[str, tuple[Any, tuple[str, ...], tuple[int, ...], Task, int]] = {  # what it reads, output, task, layers
    "clip": (clip, ("text", "image"), (2, 2, 12), Fidelity("cosine"), 4),
    "siglip": (siglip, ("text", "image"), (2, 2, 16), Fidelity("cosine"), 4),
    "clap": (clap, ("text", "audio"), (2, 2, 12), Fidelity("cosine"), 6),
    "llava": (llava, ("text", "image"), (2, 12, 60), LanguageModelling(), 4),
    "blip2": (blip2, ("text", "image"), (2, 12, 60), LanguageModelling(), 6),
    "fusion": (lambda: load(FUSION).module, ("image", "audio", "text"), (2, 10), Fidelity(), 3),
}


@pytest.mark.parametrize(("build", "reads", "shape", "task", "layers"), MODELS.values(), ids=MODELS)
def test_each_kind_of_model_is_fed(build: Any, reads: tuple[str, ...], shape: tuple[int, ...], task: Task, layers: int) -> None:
    torch.manual_seed(0)
    model = UniversalModel(build())
    example = model.example
    output = model.predict(example)
    assert model.domain == "multimodal"
    assert model.adapter.modalities == reads
    assert output.shape == shape
    assert model.adapter.default_task(model.module, example, output) == task
    assert sum(layer.name.rpartition(".")[2].isdigit() for layer in model.layers) == layers  # beside them stems may be layers
    for name in reads:
        without = model.adapter.masked(example, [name])
        assert not torch.equal(model.predict(without), output), name
        assert [t.shape for t in without.tensors()] == [t.shape for t in example.tensors()]
        again = model.adapter.masked(without, [name])
        assert all(torch.equal(a, b) for a, b in zip(again.tensors(), without.tensors(), strict=True)), "missing twice"


@pytest.mark.parametrize("build", [clip, llava])
def test_without_an_image_it_does_not_matter_which_one_it_was(build: Any) -> None:
    torch.manual_seed(0)
    model = UniversalModel(build())
    one, two = ({"input_ids": [1, 7, 8, 2], "image": np.random.default_rng(s).random((8, 8, 3))} for s in (0, 1))
    seen = [model.predict(model.adapter.collate([row])) for row in (one, two)]
    unseen = [model.predict(model.adapter.masked(model.adapter.collate([row]), ["image"])) for row in (one, two)]
    assert not torch.equal(*seen)
    assert torch.equal(*unseen)


def test_the_towers_embeddings_are_side_by_side() -> None:
    torch.manual_seed(0)
    model = UniversalModel(clip())
    raw = model.module(**model.example.kwargs)
    output = model.predict(model.example)
    assert torch.equal(output[:, 0], raw["text_embeds"])
    assert torch.equal(output[:, 1], raw["image_embeds"])


def test_the_image_stands_in_the_text_where_it_is_named_or_in_front() -> None:
    adapter = adapter_for(llava())
    image = np.zeros((8, 8, 3))
    batch = adapter.collate([{"input_ids": [1, 7, 50, 8], "image": image}, {"input_ids": [1, 7], "image": image}])
    assert batch.kwargs["input_ids"].tolist() == [[1, 7, 50, 50, 50, 50, 8], [50, 50, 50, 50, 1, 7, 0]]
    assert batch.labels.tolist() == [[1, 7, -100, -100, -100, -100, 8], [-100, -100, -100, -100, 1, 7, -100]]


def rows() -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    clips = [random.normal(0, 0.1, n).astype(np.float32) for n in (3000, 5000)]
    pixels = random.integers(0, 256, (2, 28, 28), dtype=np.uint8)
    words = ["seven", "Three"]
    return [
        {"image": p, "audio": c, "sample_rate": 8000, "text": w, "label": 3} for p, c, w in zip(pixels, clips, words, strict=True)
    ]


def test_a_row_may_lack_any_of_them() -> None:
    model = load(FUSION)
    whole, part = rows()
    part |= {"audio": None, "text": None}
    data = load_data([whole, part], model)
    (batch,) = data
    assert batch.kwargs["present"].tolist() == [[True, True, True], [True, False, False]]
    assert batch.kwargs["attention_mask"].tolist() == [[1], [0]]
    assert batch.kwargs["input_ids"].tolist() == [[9], [0]]
    assert not batch.kwargs["audio"][1].unique().numel() > 1, "silence"
    assert set(data.notes) >= {"1 of 2 rows have no audio", "1 of 2 rows have no text"}
    model.see(batch)
    assert model.task == Classification()
    alone = model.predict(model.adapter.collate([part]))
    torch.testing.assert_close(model.predict(batch)[1:], alone, rtol=1e-4, atol=1e-5)
    told = model.adapter.masked(model.adapter.collate([rows()[1]]), ["audio", "text"])
    torch.testing.assert_close(model.predict(told), alone, rtol=1e-4, atol=1e-5)


def test_a_modality_that_no_row_has_needs_a_model_that_can_be_told() -> None:
    lacking = [{k: v for k, v in row.items() if k != "audio"} for row in rows()]
    batch = load_data(lacking, load(FUSION))[0]
    assert batch.kwargs["present"][:, 1].tolist() == [False, False]
    with pytest.raises(DataError, match="No row has image, which the model reads") as caught:
        adapter_for(clip()).prepare([{"input_ids": [3, 2]}, {"input_ids": [4, 2]}])
    assert caught.value.code == "LW-D32"


def test_what_the_model_does_not_read_cannot_be_missing() -> None:
    adapter = adapter_for(clip())
    with pytest.raises(UsageError, match=r"reads no 'audio'"):
        adapter.masked(adapter.example(clip()), ["audio"])
    with pytest.raises(UsageError, match="reads other only"):
        adapter_for(nn.Linear(2, 2)).masked(adapter.example(clip()), ["image"])


@pytest.mark.parametrize(
    ("cfg", "text"),
    [({"image": {}, "sound": {}}, "unknown modality 'sound'"), ({"text": {"words": ["a"]}}, "fewer than two")],
)
def test_a_wrong_description_is_named(cfg: dict[str, Any], text: str) -> None:
    module = nn.Linear(2, 2)
    module.multimodal_cfg = cfg  # type: ignore[assignment]  # how a module says what it reads
    with pytest.raises(UsageError, match=text):
        adapter_for(module)


def test_the_settings_survive_saving(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5], "size": {"height": 8, "width": 8}}'
    )
    adapter = MultiModalAdapter.of(clip(), tmp_path)
    saved = tmp_path / "saved"
    saved.mkdir()
    adapter.save(saved)
    assert MultiModalAdapter.of(clip(), saved) == adapter
    assert dict(adapter.parts.adapters)["image"].transform.mean == (0.1, 0.2, 0.3)
