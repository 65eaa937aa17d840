"""transformers' Auto classes read what the native side wrote, and the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import layerwise as lw
from layerwise.native import VFTModel
from layerwise.native.hugging import VFTConfig, register

SMALL: dict[str, Any] = {"d_model": 16, "n_layers": 2, "n_heads": 2, "rank": 4, "max_positions": 32, "vocab_size": 11}
AUTO = {
    "encoder": (tf.AutoModel, {}),
    "causal": (tf.AutoModelForCausalLM, {"causal": True}),
    "classes": (tf.AutoModelForSequenceClassification, {"classes": 3}),
}


def ids() -> torch.Tensor:
    return torch.randint(0, 11, (2, 7), generator=torch.Generator().manual_seed(0))


def model(**settings: Any) -> VFTModel:
    torch.manual_seed(0)
    return VFTModel(**SMALL | settings).eval()


@pytest.mark.parametrize("kind", AUTO)
def test_auto_classes_give_the_native_outputs(kind: str, tmp_path: Path) -> None:
    auto, settings = AUTO[kind]
    made = model(**settings)
    made.save_pretrained(tmp_path / "m")
    there = auto.from_pretrained(tmp_path / "m", local_files_only=True)
    assert type(there).__name__ == there.config.architectures[0]
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    found = there(input_ids=ids(), attention_mask=mask)[0]
    torch.testing.assert_close(found, made(ids(), attention_mask=mask))
    assert there.config.hidden_size == 16


@pytest.mark.parametrize("kind", AUTO)
def test_what_transformers_saves_comes_back_on_both_sides(kind: str, tmp_path: Path) -> None:
    auto, settings = AUTO[kind]
    torch.manual_seed(0)
    there = auto.from_config(VFTConfig(**SMALL | settings)).eval()
    there.save_pretrained(tmp_path / "m")
    native = VFTModel.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(native(ids()), there(input_ids=ids())[0])
    again = auto.from_pretrained(tmp_path / "m", local_files_only=True)
    assert torch.equal(again(input_ids=ids())[0], there(input_ids=ids())[0])


def test_the_projectors_start_as_projectors_there_too() -> None:
    there = tf.AutoModel.from_config(VFTConfig(**SMALL))
    assert float(there.vft.penalty(1.0)) < 1e-9


def test_losses_are_those_of_the_labels() -> None:
    causal = tf.AutoModelForCausalLM.from_config(VFTConfig(**SMALL, causal=True)).eval()
    labels = ids()
    labels[0, 3] = -100
    out = causal(input_ids=ids(), labels=labels)
    logp = out.logits.log_softmax(-1)
    kept = [-logp[b, t - 1, labels[b, t]] for b in range(2) for t in range(1, 7) if labels[b, t] >= 0]
    torch.testing.assert_close(out.loss, torch.stack(kept).mean())
    classes = tf.AutoModelForSequenceClassification.from_config(VFTConfig(**SMALL, num_labels=4)).eval()
    out = classes(input_ids=ids(), labels=torch.tensor([3, 1]))
    torch.testing.assert_close(out.loss, -out.logits.log_softmax(-1)[[0, 1], [3, 1]].mean())


def test_generation_there_is_the_native_one() -> None:
    there = tf.AutoModelForCausalLM.from_config(VFTConfig(**SMALL, causal=True)).eval()
    assert torch.equal(there.generate(ids(), max_new_tokens=4), there.vft.generate(ids(), 4))


def test_a_folder_of_either_side_is_loaded_by_name(tmp_path: Path) -> None:
    made = model(classes=3)
    made.save_pretrained(tmp_path / "m")
    loaded = lw.load(f"hf:{tmp_path / 'm'}")
    assert type(loaded.module) is VFTModel
    assert torch.equal(loaded.module(ids()), made(ids()))
    assert loaded.source is not None
    assert loaded.source.name == "layerwise.native:VFTModel"
    assert [x.name for x in lw.load(str(tmp_path / "m")).layers] == ["blocks.0", "blocks.1"]


def test_registering_twice_does_no_harm() -> None:
    register()
    assert tf.AutoConfig.for_model("vft", **SMALL).rank == 4
