"""Text: what is taken from the module, what the forward gets, which task it is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from layerwise.adapter import adapter_for
from layerwise.adapters.text import TextModalityAdapter
from layerwise.errors import DataError
from layerwise.features import pooled
from layerwise.heads import EncoderWithHead, PooledEncoder
from layerwise.model import UniversalModel
from layerwise.rows import Record
from layerwise.task import Classification, Fidelity, LanguageModelling, Task

ENCODER: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 60,
}
IDS: dict[str, Any] = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BART: dict[str, Any] = {
    **IDS,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "decoder_start_token_id": 2,
}


def bert(head: bool = False) -> nn.Module:
    return (tf.BertForSequenceClassification if head else tf.BertModel)(tf.BertConfig(**ENCODER))


def gpt2() -> nn.Module:
    return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=12, **{**IDS, "pad_token_id": None}))


def llama() -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**ENCODER, max_position_embeddings=12))


def t5(kind: Any = tf.T5ForConditionalGeneration) -> nn.Module:
    return kind(tf.T5Config(d_model=16, num_layers=2, num_heads=2, d_kv=8, d_ff=32, decoder_start_token_id=0, vocab_size=60))


def bart_classifier() -> nn.Module:
    return tf.BartForSequenceClassification(tf.BartConfig(**BART, num_labels=3))


MODELS: dict[str, tuple[Any, tuple[int, ...], Task, Task]] = {  # builder, output, task without and with labels
    "bert with head": (lambda: bert(True), (2, 2), Fidelity(), Classification()),
    "bert bare": (bert, (2, 16, 16), Fidelity("cosine"), Fidelity("cosine")),
    "bert pooled": (lambda: PooledEncoder(bert()), (2, 16), Fidelity("cosine"), Fidelity("cosine")),
    "bert pooled with head": (lambda: EncoderWithHead(PooledEncoder(bert()), 16, 3), (2, 3), Fidelity(), Classification()),
    "gpt2": (gpt2, (2, 12, 60), LanguageModelling(), LanguageModelling()),
    "llama": (llama, (2, 12, 60), LanguageModelling(), LanguageModelling()),
    "t5": (t5, (2, 17, 60), Fidelity(), Fidelity()),
    "t5 encoder": (lambda: t5(tf.T5EncoderModel), (2, 16, 16), Fidelity("cosine"), Fidelity("cosine")),
    "bart classifier": (bart_classifier, (2, 3), Fidelity(), Classification()),
    "masked": (lambda: tf.BertForMaskedLM(tf.BertConfig(**ENCODER)), (2, 16, 60), Fidelity(), Fidelity()),
}


@pytest.mark.parametrize(("build", "shape", "plain", "labelled"), MODELS.values(), ids=MODELS)
def test_example_output_and_task(build: Any, shape: tuple[int, ...], plain: Task, labelled: Task) -> None:
    torch.manual_seed(0)
    model = UniversalModel(build())
    output = model.predict(model.example)
    assert model.domain == "text"
    assert output.shape == shape
    assert bool(output.isfinite().all())
    assert model.adapter.default_task(model.module, model.example, output) == plain
    with_labels = dataclasses.replace(model.example, labels=torch.tensor([0, 1]))
    assert model.adapter.default_task(model.module, with_labels, output) == labelled
    assert len(model.layers) >= 2
    again = UniversalModel(build()).example.kwargs["input_ids"]
    assert torch.equal(again, model.example.kwargs["input_ids"])


def test_a_cache_is_never_given() -> None:
    """A growing cache beside the logits would break replay; it is asked for by most configurations."""
    model = UniversalModel(gpt2())
    raw = model.module(**model.example.kwargs)
    assert list(raw) == ["logits"]


def test_padding_changes_no_output() -> None:
    model = UniversalModel(PooledEncoder(bert()).eval())
    short, long = {"input_ids": [5, 6, 7]}, {"input_ids": [8] * 10}
    together = model.predict(model.adapter.collate([short, long]))
    torch.testing.assert_close(together[:1], model.predict(model.adapter.collate([short])))
    batch = model.adapter.collate([short, long])
    assert batch.kwargs["attention_mask"].sum(1).tolist() == [3, 10]


def test_pooling_is_the_mean_over_what_counts() -> None:
    module = PooledEncoder(bert()).eval()
    ids, mask = torch.tensor([[5, 6, 7, 0]]), torch.tensor([[1, 1, 1, 0]])
    hidden = module.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(module(ids, mask), hidden[:, :3].mean(1))
    torch.testing.assert_close(module(ids[:, :3]), module.encoder(input_ids=ids[:, :3]).last_hidden_state.mean(1))


def test_translation_pairs_are_language_modelling_on_the_target() -> None:
    model = UniversalModel(t5())
    batch = model.adapter.collate([{"input_ids": [5, 6], "target_ids": [7, 8, 1]}, {"input_ids": [5], "target_ids": [9]}])
    assert batch.kwargs["decoder_input_ids"].tolist() == [[0, 7, 8, 1], [0, 9, 0, 0]]
    assert batch.labels.tolist() == [[0, 7, 8, 1], [0, 9, -100, -100]]
    model.see(batch)
    assert model.task == LanguageModelling()
    _, weights = model.task.losses(model.predict(batch), batch, None)
    assert weights.tolist() == [3, 1]


def test_each_stack_of_a_translator_has_its_own_padding() -> None:
    """Seen by an encoder that is given the short text alone."""
    torch.manual_seed(0)
    model = UniversalModel(t5())
    short, long = {"input_ids": [5, 6], "target_ids": [7, 8, 9]}, {"input_ids": [5, 6, 7, 8], "target_ids": [9]}
    batch = model.adapter.collate([short, long])  # four tokens each, the decoder's first included
    assert batch.kwargs["input_ids"].shape[1] != batch.kwargs["decoder_input_ids"].shape[1]
    alone = model.adapter.collate([short])
    torch.testing.assert_close(model.predict(batch)[:1], model.predict(alone))
    for layer in model.layers:
        with model.capture([layer.name]) as seen:
            model.predict(batch)
            together = pooled(batch, layer, seen[layer.name][1])[:1]
            model.predict(alone)
            torch.testing.assert_close(together, pooled(alone, layer, seen[layer.name][1]), rtol=1e-5, atol=1e-6)


def roberta() -> nn.Module:
    return tf.XLMRobertaModel(tf.XLMRobertaConfig(**ENCODER, max_position_embeddings=22, pad_token_id=1))


def qwen() -> nn.Module:
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**ENCODER, num_key_value_heads=2, head_dim=8, max_position_embeddings=20))


def opt() -> nn.Module:
    sizes = {"hidden_size": 16, "ffn_dim": 32, "word_embed_proj_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return tf.OPTForCausalLM(tf.OPTConfig(**sizes, vocab_size=60, max_position_embeddings=20))


def bart() -> nn.Module:
    return tf.BartForConditionalGeneration(tf.BartConfig(**BART, max_position_embeddings=20))


@pytest.mark.parametrize("build", [roberta, qwen, opt, bart, gpt2])
def test_the_longest_text_fits_and_padding_changes_nothing(build: Any) -> None:
    torch.manual_seed(0)
    model = UniversalModel(build().eval())
    longest = model.adapter.longest  # type: ignore[attr-defined]
    assert longest in (12, 20)
    short = {"input_ids": [6, 7, 8, 2]}
    output = model.predict(model.adapter.collate([{"input_ids": [5] * 40}, short]))
    assert output.shape[1] == longest
    torch.testing.assert_close(output[1:, :4], model.predict(model.adapter.collate([short]))[:, :4], rtol=1e-4, atol=1e-5)


def test_a_decoder_gets_no_more_than_the_model_takes() -> None:
    adapter = dataclasses.replace(adapter_for(t5()), longest=4)  # type: ignore[type-var]  # every adapter is a dataclass
    batch = adapter.collate([{"input_ids": [5, 6, 7, 8, 9]}])
    assert batch.kwargs["decoder_input_ids"].tolist() == [[0, 5, 6, 7]]


def test_labels_of_a_language_model_are_left_out_and_said() -> None:
    adapter = adapter_for(gpt2())
    rows, notes = adapter.prepare([{"input_ids": [3, 4], "label": 1}])
    assert adapter.collate(rows).labels is None
    assert notes == ("the labels are not used: a language model predicts the next token",)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "model_max_length": 8}')
    return tmp_path


def test_the_folders_tokenizer_is_used_and_saved(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    adapter = TextModalityAdapter.of(PooledEncoder(bert()), tokenizer)
    assert adapter.collate([{"text": "a c"}]).kwargs["input_ids"].tolist() == [[2, 5, 7, 3]]
    assert adapter.longest == 8
    saved = tmp_path_factory.mktemp("saved")
    adapter.save(saved)
    again = TextModalityAdapter.of(PooledEncoder(bert()), saved)
    assert again.collate([{"text": "a c"}]).kwargs["input_ids"].tolist() == [[2, 5, 7, 3]]


def test_pairs_of_texts_keep_their_segments(tokenizer: Path) -> None:
    batch = TextModalityAdapter.of(bert(True), tokenizer).collate([{"text": "a", "text_pair": "b c"}])
    assert batch.kwargs["input_ids"].tolist() == [[2, 5, 3, 6, 7, 3]]
    assert batch.kwargs["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1]]


def test_a_cut_text_keeps_the_token_that_closes_it(tokenizer: Path) -> None:
    adapter = TextModalityAdapter.of(bert(True), tokenizer)
    batch = adapter.collate([{"text": "a b c d e f g h i j"}])
    assert batch.kwargs["input_ids"].tolist() == [[2, 5, 6, 7, 8, 9, 10, 3]]


@pytest.mark.parametrize(
    ("row", "code", "text"),
    [
        ({"words": "a"}, "LW-D32", "has no 'text'"),
        ({"text": 3}, "LW-D32", "has int in 'text'"),
        ({"text": "a"}, "LW-D", "without a tokenizer"),
        ({"input_ids": []}, "LW-D29", "no token"),
        ({"input_ids": [3, -1]}, "LW-D39", "token id -1"),
        ({"input_ids": [3], "label": "good"}, "LW-D32", "'good'"),
    ],
)
def test_bad_rows_are_named(row: dict[str, Any], code: str, text: str) -> None:
    with pytest.raises(DataError) as caught:
        adapter_for(bert(True)).collate([{"input_ids": [4], "label": 1}, Record(row, "rows.csv, row 7")])
    assert caught.value.code == code
    assert text in str(caught.value)
    assert "rows.csv, row 7" in str(caught.value)


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(DataError, match="The tokenizer cannot be read"):
        adapter_for(bert(), tmp_path)


def test_models_that_read_more_than_text_are_not_claimed() -> None:
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tf.CLIPConfig(text_config={**small, "vocab_size": 60}, vision_config={**small, "image_size": 16, "patch_size": 8})
    assert not TextModalityAdapter.claims(tf.CLIPModel(config))
    assert adapter_for(tf.CLIPModel(config)).modality == "multimodal"
