"""Audio: features against the libraries' own, resampling and padding that are said, what the forward gets."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
import transformers as tf
from torch import nn

from layerwise.adapter import adapter_for
from layerwise.adapters._audio import AudioFeatures
from layerwise.adapters.audio import AudioModalityAdapter
from layerwise.benchmark.audio import log_mel
from layerwise.errors import DataError, UsageError
from layerwise.heads import EncoderWithHead, fit_head
from layerwise.loading import load, load_data
from layerwise.model import UniversalModel
from layerwise.source import SOURCES
from layerwise.task import Classification, Fidelity, LanguageModelling, Task, token_mask

CONV: dict[str, Any] = {"conv_dim": (8, 8, 8), "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2), "num_feat_extract_layers": 3}
SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
WAVES: dict[str, Any] = {**SIZES, **CONV, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3, "vocab_size": 60}
LISTENER: dict[str, Any] = {
    "d_model": 16,
    **{f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("attention_heads", 2))},
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "num_mel_bins": 16,
    "max_source_positions": 50,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
WINDOWS: dict[str, Any] = {"spec_size": 64, "num_mel_bins": 16, "patch_size": 4, "patch_stride": (4, 4), "window_size": 4}
WINDOWS |= {"patch_embeds_hidden_size": 8, "depths": [2, 2], "num_attention_heads": [2, 2], "hidden_size": 16}
PATCHES: dict[str, Any] = {"max_length": 64, "num_mel_bins": 32, "patch_size": 8, "frequency_stride": 8, "time_stride": 8}


def speech(model: str, config: str = "Wav2Vec2Config", **more: Any) -> nn.Module:
    return getattr(tf, model)(getattr(tf, config)(**{**WAVES, "classifier_proj_size": 8, **more})).eval()


def whisper(model: str) -> nn.Module:
    return getattr(tf, model)(tf.WhisperConfig(**LISTENER, **IDS, num_labels=5)).eval()


def masked() -> nn.Module:
    return speech("Wav2Vec2ForSequenceClassification", feat_extract_norm="layer", do_stable_layer_norm=True)


class Net(nn.Module):
    """A net that says what it hears."""

    def __init__(self, **cfg: Any) -> None:
        super().__init__()
        self.audio_cfg = {"rate": 8000, "kind": "log_mel", "mels": 40, "window": 256, "hop": 128, "frames": 48, **cfg}
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 48)) for _ in range(2)))
        self.head = nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(x).mean(1))


def torchaudios() -> nn.Module:
    """A Wav2Vec 2.0 of torchaudio with two blocks."""
    front: dict[str, Any] = {"extractor_mode": "layer_norm", "extractor_conv_bias": True}
    sizes = {
        "embed_dim": 16,
        "pos_conv_kernel": 4,
        "pos_conv_groups": 2,
        "num_layers": 2,
        "num_heads": 2,
        "ff_interm_features": 32,
    }
    rates = ("projection_dropout", "attention_dropout", "ff_interm_dropout", "dropout", "layer_drop")
    encoder = {f"encoder_{k}": v for k, v in {**sizes, **dict.fromkeys(rates, 0.0), "layer_norm_first": True}.items()}
    shapes = [(8, 10, 5), (8, 3, 2)]
    return torchaudio.models.wav2vec2_model(**front, extractor_conv_layer_config=shapes, **encoder, aux_num_out=7).eval()


MODELS: dict[str, tuple[Any, tuple[int, ...], Task, int]] = {  # builder, output, task without labels, layers
    "wav2vec2": (lambda: speech("Wav2Vec2ForSequenceClassification"), (2, 2), Fidelity(), 2),
    "wav2vec2 bare": (lambda: speech("Wav2Vec2Model"), (2, 399, 16), Fidelity("cosine"), 2),
    "ctc": (lambda: speech("Wav2Vec2ForCTC", vocab_size=20), (2, 399, 20), Fidelity(), 2),
    "hubert": (lambda: speech("HubertForSequenceClassification", "HubertConfig"), (2, 2), Fidelity(), 2),
    "wavlm": (lambda: speech("WavLMForSequenceClassification", "WavLMConfig"), (2, 2), Fidelity(), 2),
    "whisper": (lambda: whisper("WhisperForConditionalGeneration"), (2, 1, 60), Fidelity(), 4),
    "whisper bare": (lambda: whisper("WhisperModel"), (2, 1, 16), Fidelity("cosine"), 4),
    "whisper classifier": (lambda: whisper("WhisperForAudioClassification"), (2, 5), Fidelity(), 2),
    "spectrogram transformer": (lambda: tf.ASTForAudioClassification(tf.ASTConfig(**SIZES, **PATCHES)), (2, 2), Fidelity(), 2),
    "clap": (lambda: tf.ClapAudioModel(tf.ClapAudioConfig(**WINDOWS)), (2, 16), Fidelity("cosine"), 4),
    "torchaudio": (torchaudios, (2, 799, 7), Fidelity(), 2),
    "described": (Net, (2, 10), Fidelity(), 2),
}


@pytest.mark.parametrize(("build", "shape", "task", "layers"), MODELS.values(), ids=MODELS)
def test_each_kind_of_model_is_fed(build: Any, shape: tuple[int, ...], task: Task, layers: int) -> None:
    torch.manual_seed(0)
    model = UniversalModel(build())
    output = model.predict(model.example)
    assert model.domain == "audio"
    assert output.shape == shape
    assert bool(output.isfinite().all())
    assert model.adapter.default_task(model.module, model.example, output) == task
    assert sum(layer.name.rpartition(".")[2].isdigit() for layer in model.layers) == layers  # beside them stems may be layers


NOISE = torch.randn(8000, generator=torch.Generator().manual_seed(1)) / 10
TONE = 0.3 * torch.sin(torch.arange(8000) * 2 * torch.pi * 440 / 16000)


@pytest.mark.parametrize("wave", [NOISE, TONE, NOISE[:500]], ids=["noise", "tone", "short"])
def test_features_are_those_of_the_libraries(wave: torch.Tensor) -> None:
    clip, call = wave.numpy(), {"sampling_rate": 16000, "return_tensors": "pt"}
    want = tf.Wav2Vec2FeatureExtractor(do_normalize=True)(clip, **call)["input_values"][0]
    torch.testing.assert_close(AudioFeatures()(wave), want, rtol=1e-4, atol=1e-4)
    want = tf.WhisperFeatureExtractor(chunk_length=1)(clip, **call)["input_features"][0]
    torch.testing.assert_close(AudioFeatures(kind="whisper", frames=100)(wave), want, rtol=0, atol=1e-3)
    want = tf.ASTFeatureExtractor(max_length=64, num_mel_bins=32)(clip, **call)["input_values"][0]
    ours = AudioFeatures(kind="kaldi", mels=32, frames=64, mean=-4.2677393, std=4.5689974)
    torch.testing.assert_close(ours(wave), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_clips_for_clap_are_repeated_as_it_was_trained(fused: bool) -> None:
    how = "fusion" if fused else "rand_trunc"
    theirs = tf.ClapFeatureExtractor(max_length_s=1, truncation=how, padding="repeatpad")
    want = theirs(NOISE.numpy(), sampling_rate=48000, return_tensors="pt")["input_features"][0]
    ours = AudioFeatures(48_000, "clap", mels=64, window=1024, hop=480, top=14_000, frames=101, copies=4 if fused else 1)
    assert ours(NOISE).shape == want.shape
    torch.testing.assert_close(ours(NOISE), want.float(), rtol=0, atol=0.02)


def test_plain_log_mel_is_the_benchmarks() -> None:
    """Written apart, with the filters spelled out."""
    ours = AudioFeatures(rate=8000, kind="log_mel", mels=40, window=256, hop=128, frames=48)
    torch.testing.assert_close(ours(NOISE[:4000]), log_mel([NOISE[:4000].numpy()])[0], rtol=0, atol=2e-3)


def test_a_tone_keeps_its_pitch_when_it_is_resampled_and_that_is_said() -> None:
    tone = np.sin(np.arange(4000) * 2 * np.pi * 440 / 8000).astype(np.float32)
    adapter = AudioModalityAdapter(AudioFeatures(scaled=False))
    rows, notes = adapter.prepare([{"audio": tone, "sample_rate": 8000}, {"audio": tone, "sample_rate": 16000}])
    heard = rows[0]["features"]
    assert len(heard) == 8000
    assert int(torch.fft.rfft(heard).abs().argmax()) * 2 == 440  # half a second: bins of 2 Hz
    assert rows[1]["features"].tolist() == tone.tolist()
    assert notes[0] == "1 of 2 clips were resampled from 8000 to 16000 Hz"
    assert "unequal length" in notes[1]


def test_what_is_assumed_cut_or_filled_up_is_said() -> None:
    adapter = AudioModalityAdapter(AudioFeatures(rate=100, least=50, most=200), mask="attention_mask")
    rows, notes = adapter.prepare([{"audio": NOISE[:300]}, {"audio": NOISE[:10], "sample_rate": 100}])
    assert [len(row["features"]) for row in rows] == [200, 50]
    assert notes == (
        "1 of 2 clips do not say their sampling rate: 100 Hz, the model's, was assumed",
        "1 of 2 clips were cut to the 2 seconds that the model takes",
        "1 of 2 clips are shorter than 50 samples and were filled up with silence",
    )


def test_padding_changes_no_output_where_there_is_a_mask() -> None:
    torch.manual_seed(0)
    model = UniversalModel(masked())
    short, long = {"audio": NOISE[:3000], "sample_rate": 16000}, {"audio": NOISE, "sample_rate": 16000}
    batch = model.adapter.collate([short, long])
    assert batch.kwargs["attention_mask"].sum(1).tolist() == [3000, 8000]
    torch.testing.assert_close(model.predict(batch)[:1], model.predict(model.adapter.collate([short])), rtol=1e-4, atol=1e-5)
    louder = dataclasses.replace(batch, kwargs={**batch.kwargs, "attention_mask": torch.ones(2, 8000).long()})
    assert not torch.allclose(model.predict(louder)[:1], model.predict(batch)[:1], rtol=0, atol=2e-5), "the mask has no effect"


def test_frames_of_padding_are_left_out_of_a_layers_mean() -> None:
    """Up to the one frame whose middle lies on the border; the library's own count says which frames are sound."""
    torch.manual_seed(0)
    model = UniversalModel(masked())
    batch = model.adapter.collate([{"audio": NOISE[:3000]}, {"audio": NOISE}])
    frames = torch.zeros(2, 399, 16)
    kept = token_mask(batch, frames[..., 0]).sum(1)
    want = model.module.wav2vec2._get_feat_extract_output_lengths(torch.tensor([3000, 8000]))  # type: ignore[union-attr,operator]
    assert (kept - want).abs().max() <= 1
    assert kept[1] == 399


def test_a_bare_encoder_is_pooled_over_its_sound_and_gets_a_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bare = speech("Wav2Vec2Model", feat_extract_norm="layer", do_stable_layer_norm=True)
    bare.save_pretrained(tmp_path)  # type: ignore[operator]
    model = load(f"hf:{tmp_path}")
    assert model.adapter.fidelity(model.module) == Fidelity("cosine")
    clips = [
        {"audio": clip, "sample_rate": 16000, "label": i % 2} for i, clip in enumerate([NOISE[:3000], TONE, NOISE, TONE[:4000]])
    ]
    data = load_data(clips, model)
    output = model.predict(data[0])
    assert output.shape == (4, 16)
    alone = model.predict(model.adapter.collate(clips[:1]))
    torch.testing.assert_close(output[:1], alone, rtol=0, atol=0.02)  # one frame on the border
    torch.testing.assert_close(alone, bare(**model.adapter.collate(clips[:1]).kwargs)[0].mean(1))
    headed = fit_head(model, data)
    assert headed.predict(data[0]).shape == (4, 2)
    assert headed.adapter.modality == "audio"
    built = SOURCES[headed.source.kind]().build(headed.source)  # type: ignore[union-attr]
    built.load_state_dict(headed.module.state_dict())


def test_torchaudio_is_told_the_lengths() -> None:
    batch = adapter_for(torchaudios()).collate([{"audio": NOISE[:3000]}, {"audio": NOISE}])
    assert batch.kwargs["lengths"].tolist() == [3000, 8000]


def encoded(wave: torch.Tensor, rate: int, kind: str = "FLAC") -> bytes:
    out = io.BytesIO()
    soundfile.write(out, wave.numpy(), rate, format=kind)
    return out.getvalue()


def test_every_form_of_a_clip_gives_the_same(tmp_path: Path) -> None:
    adapter = AudioModalityAdapter()
    content = encoded(NOISE, 16000)
    samples = soundfile.read(io.BytesIO(content), dtype="float32")[0]
    (tmp_path / "a.flac").write_bytes(content)
    stereo = np.stack([samples, samples])
    forms = [content, str(tmp_path / "a.flac"), samples, samples.tolist(), torch.from_numpy(samples), stereo, stereo.T]
    forms += [{"bytes": content, "path": None}, {"array": samples, "sampling_rate": 16000}]
    heard = [adapter.collate([{"audio": form, "sample_rate": 16000}]).args[0] for form in forms]
    assert all(torch.equal(one, heard[0]) for one in heard[1:])


def test_the_rate_of_samples_in_a_table_is_kept() -> None:
    rows = [{"audio": NOISE[:400].numpy(), "sampling_rate": 8000, "label": 0}] * 2
    data = load_data(rows, UniversalModel(masked()))
    assert data[0].kwargs["input_values"].shape == (2, 800)
    assert "2 of 2 clips were resampled from 8000 to 16000 Hz" in data.notes
    nested = [{"audio": {"array": NOISE[:400].numpy(), "sampling_rate": 8000}, "label": 0}] * 2
    assert load_data(nested, UniversalModel(masked()))[0].kwargs["input_values"].shape == (2, 800)


def test_transcripts_are_language_modelling_on_the_target() -> None:
    model = UniversalModel(whisper("WhisperForConditionalGeneration"))
    rows = [{"audio": NOISE, "target_ids": [7, 8]}, {"audio": TONE, "target_ids": [9]}]
    batch = model.adapter.collate(rows)
    assert batch.kwargs["decoder_input_ids"].tolist() == [[3, 7, 8], [3, 9, 0]]
    assert batch.labels.tolist() == [[3, 7, 8], [3, 9, -100]]
    model.see(batch)
    assert model.task == LanguageModelling()
    assert bool(model.loss(batch).isfinite())


def test_tasks() -> None:
    model = UniversalModel(masked())
    model.see(model.adapter.collate([{"audio": NOISE, "label": 1}]))
    assert model.task == Classification()
    bare = speech("Wav2Vec2Model")
    assert adapter_for(EncoderWithHead(bare, 16, 3)).fidelity(EncoderWithHead(bare, 16, 3)) == Fidelity()


def test_the_folders_settings_are_read(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(
        '{"sampling_rate": 8000, "do_normalize": false, "return_attention_mask": true}'
    )
    adapter = AudioModalityAdapter.of(speech("Wav2Vec2Model"), tmp_path)
    assert (adapter.features.rate, adapter.features.scaled, adapter.mask) == (8000, False, "attention_mask")
    assert AudioModalityAdapter.of(speech("Wav2Vec2Model")).mask == "", "group norms were trained without a mask"
    (tmp_path / "processor_config.json").write_text('{"feature_extractor": {"sampling_rate": 4000}}')
    assert AudioModalityAdapter.of(speech("Wav2Vec2Model"), tmp_path).features.rate == 4000


def test_the_settings_survive_saving(tmp_path: Path) -> None:
    adapter = AudioModalityAdapter(AudioFeatures(rate=8000, kind="whisper", frames=100), "input_features", start=3)
    adapter.save(tmp_path)
    assert AudioModalityAdapter.of(whisper("WhisperModel"), tmp_path) == adapter


@pytest.mark.parametrize(("cfg", "text"), [({"mel": 40}, "Did you mean 'mels'"), ({"kind": "logmel"}, "Did you mean 'log_mel'")])
def test_a_wrong_description_is_named(cfg: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        adapter_for(Net(**cfg))


def test_a_target_needs_a_tokenizer() -> None:
    with pytest.raises(DataError, match="has no tokenizer"):
        adapter_for(whisper("WhisperForConditionalGeneration")).collate([{"audio": NOISE, "target": "seven"}])
