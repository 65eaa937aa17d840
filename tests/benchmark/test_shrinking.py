"""Default configurations of transformers become small ones that build and run, whatever the model is called."""

from __future__ import annotations

from typing import Any

import pytest

from layerwise.benchmark.architectures import hugging
from layerwise.benchmark.shrinking import STEPS, shrunk, steps


@pytest.mark.parametrize(
    "name",
    [
        "BertForSequenceClassification",  # text, an encoder
        "DeepseekV3ForCausalLM",  # experts in groups, low-rank attention with three sizes of heads
        "T5ForConditionalGeneration",  # an encoder and a decoder
        "SwinForImageClassification",  # lists of depths and heads, windows
        "CLIPModel",  # two nested configurations that meet in one width
        "ASTForAudioClassification",  # a spectrogram under the name of a wave
        "Wav2Vec2ForCTC",  # a wave, and lists that must stay as long as they are
    ],
)
def test_a_class_of_each_kind_is_built_small_and_fed(name: str) -> None:
    made = hugging.make(name)
    assert 1000 < sum(p.numel() for p in made.module.parameters()) < 5_000_000
    assert type(made.module).__name__ == name
    assert made.example.size == 2


def config_of(name: str) -> Any:
    import transformers

    return getattr(transformers, f"{name}Config")()


def test_ratios_and_products_stay() -> None:
    before, small = config_of("Llama"), shrunk(config_of("Llama"), STEPS[0])
    assert small.hidden_size == small.num_attention_heads * small.head_dim
    ratio = small.intermediate_size / small.hidden_size
    assert ratio == pytest.approx(before.intermediate_size / before.hidden_size, rel=0.03)  # rounded to whole fours
    assert small.intermediate_size % 4 == 0
    assert (small.num_hidden_layers, small.vocab_size) == (8, 512)
    assert type(small) is type(before)


def test_special_tokens_follow_the_vocabulary_and_stay_distinct() -> None:
    small = shrunk(config_of("Qwen2VL"), STEPS[0])
    ids = [small.image_token_id, small.video_token_id, small.vision_start_token_id, small.vision_end_token_id]
    assert len(set(ids)) == 4
    assert max(ids) < small.text_config.vocab_size


def test_the_steps_differ_and_the_first_is_the_smallest() -> None:
    refused: list[str] = []
    found = list(steps(type(config_of("Bert")), refused))
    assert len({c.to_json_string() for c in found}) == len(found) > 1
    assert refused == []
    assert found[0].hidden_size == min(c.hidden_size for c in found)


def test_a_class_that_refuses_says_why() -> None:
    class Strict:
        def __init__(self) -> None:
            raise ValueError("never small")

    refused: list[str] = []
    assert list(steps(Strict, refused)) == []
    assert set(refused) == {"never small"}


def test_every_class_of_the_mappings_comes_once_with_all_its_kinds() -> None:
    names = hugging.GROUP.names()
    assert len(names) == len(set(names)) > 500
    assert list(hugging.GROUP.kinds("BertForMaskedLM")) == ["masked language modelling"]
