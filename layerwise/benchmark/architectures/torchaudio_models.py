"""torchaudio: every model of `torchaudio.models`, large layouts narrower; what each of them reads is in the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerwise.benchmark.architectures.made import Group, Made, first_that_runs, noise
from layerwise.data import Batch

BINS, STEPS, WAVE = 80, 64, 8000  # of a spectrogram, its steps in time, points of a wave
Inputs = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Subject:
    """A factory of `torchaudio.models` by name, its settings, and what the model reads."""

    factory: str
    settings: Mapping[str, Any]
    inputs: Inputs


def _lengths(length: int) -> Tensor:
    return torch.full((2,), length, dtype=torch.int32)


def _wave() -> tuple[Tensor, ...]:
    return (noise(2, WAVE),)


def _frames() -> tuple[Tensor, ...]:
    return noise(2, STEPS, BINS), _lengths(STEPS)


def _segments() -> tuple[Tensor, ...]:
    return noise(2, STEPS + 4, BINS), _lengths(STEPS)


def _transduced() -> tuple[Tensor, ...]:
    tokens = torch.randint(1, 30, (2, 6), generator=torch.Generator().manual_seed(0)).int()
    return noise(2, STEPS + 4, BINS), _lengths(STEPS), tokens, _lengths(6)


def _spoken() -> tuple[Tensor, ...]:
    tokens = torch.randint(0, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    return tokens, _lengths(12), noise(2, BINS, 24), _lengths(24)


def _labelled() -> tuple[Tensor, ...]:
    return noise(2, WAVE), torch.randint(0, 100, (2, 24), generator=torch.Generator().manual_seed(0)), _lengths(WAVE)


ENCODER: Mapping[str, Any] = {  # wav2vec2's layout at a tenth of its width
    "extractor_mode": "group_norm", "extractor_conv_layer_config": None, "extractor_conv_bias": False, "encoder_embed_dim": 96,
    "encoder_projection_dropout": 0.0, "encoder_pos_conv_kernel": 32, "encoder_pos_conv_groups": 4, "encoder_num_layers": 12,
    "encoder_num_heads": 4, "encoder_attention_dropout": 0.0, "encoder_ff_interm_features": 384,
    "encoder_ff_interm_dropout": 0.0, "encoder_dropout": 0.0, "encoder_layer_norm_first": False, "encoder_layer_drop": 0.0,
}  # fmt: skip
NARROW = [(96, 10, 5), *[(96, 3, 2)] * 4, *[(96, 2, 2)] * 2]  # channels, kernel, stride of the extractor's convolutions
SMALL = {**ENCODER, "extractor_conv_layer_config": NARROW}
LARGE = {**SMALL, "extractor_mode": "layer_norm", "extractor_conv_bias": True, "encoder_layer_norm_first": True}
MASKING: Mapping[str, Any] = {
    "mask_prob": 0.0, "mask_selection": "static", "mask_other": 0.0, "mask_length": 10, "no_mask_overlap": False,
    "mask_min_space": 1, "mask_channel_prob": 0.0, "mask_channel_selection": "static", "mask_channel_other": 0.0,
    "mask_channel_length": 10, "no_mask_channel_overlap": False, "mask_channel_min_space": 1, "skip_masked": False,
    "skip_nomask": False, "num_classes": 100, "final_dim": 32, "feature_grad_mult": None,
}  # fmt: skip
TRANSDUCER: Mapping[str, Any] = {
    "input_dim": BINS, "encoding_dim": 64, "num_symbols": 30, "segment_length": 16, "right_context_length": 4,
    "time_reduction_input_dim": 32, "time_reduction_stride": 4, "transformer_num_heads": 4, "transformer_ffn_dim": 128,
    "transformer_num_layers": 6, "transformer_dropout": 0.0, "transformer_activation": "gelu",
    "transformer_left_context_length": 8, "transformer_max_memory_size": 0, "transformer_weight_init_scale_strategy": "depthwise",
    "transformer_tanh_on_mem": True, "symbol_embedding_dim": 32, "num_lstm_layers": 3, "lstm_layer_norm": True,
    "lstm_layer_norm_epsilon": 1e-3, "lstm_dropout": 0.0,
}  # fmt: skip
TASNET = {"enc_num_feats": 64, "msk_num_feats": 32, "msk_num_hidden_feats": 64}

SUBJECTS: Mapping[str, Subject] = {
    "Conformer": Subject(
        "Conformer",
        {"input_dim": BINS, "num_heads": 4, "ffn_dim": 128, "num_layers": 4, "depthwise_conv_kernel_size": 15},
        _frames,
    ),
    "ConvTasNet": Subject("ConvTasNet", TASNET, lambda: (noise(2, 1, WAVE // 2),)),
    "DeepSpeech": Subject("DeepSpeech", {"n_feature": 40, "n_hidden": 64}, lambda: (noise(2, 1, STEPS, 40),)),
    "Emformer": Subject(
        "Emformer",
        {"input_dim": BINS, "num_heads": 4, "ffn_dim": 128, "num_layers": 4, "segment_length": 16, "right_context_length": 4},
        _segments,
    ),
    "emformer_rnnt_model": Subject("emformer_rnnt_model", TRANSDUCER, _transduced),
    "HDemucs": Subject("HDemucs", {"sources": ["a", "b"], "channels": 16}, lambda: (noise(1, 2, 44100),)),
    "hubert_base": Subject("hubert_base", {}, _wave),
    "hubert_pretrain_model": Subject("hubert_pretrain_model", {**SMALL, **MASKING}, _labelled),
    "squim_objective_base": Subject("squim_objective_base", {}, _wave),
    "squim_subjective_base": Subject("squim_subjective_base", {}, lambda: (noise(2, WAVE), noise(2, WAVE, seed=1))),
    "Tacotron2": Subject("Tacotron2", {}, _spoken),
    "Wav2Letter": Subject("Wav2Letter", {}, lambda: (noise(2, 1, WAVE),)),
    "Wav2Letter (power spectrum)": Subject(
        "Wav2Letter", {"input_type": "power_spectrum", "num_features": BINS}, lambda: (noise(2, BINS, STEPS),)
    ),
    "wav2vec2_base": Subject("wav2vec2_base", {}, _wave),
    "wav2vec2_model": Subject("wav2vec2_model", {**SMALL, "aux_num_out": 30}, _wave),
    "wav2vec2_model (layout of large)": Subject("wav2vec2_model", {**LARGE, "aux_num_out": 30}, _wave),
    "WaveRNN": Subject(
        "WaveRNN",
        {"upsample_scales": [5, 5, 8], "n_classes": 64, "hop_length": 200, "n_rnn": 64, "n_fc": 64, "n_hidden": 32},
        lambda: (noise(2, 1, 6 * 200), noise(2, 1, 128, 10)),
    ),
    "wavlm_base": Subject("wavlm_base", {}, _wave),
    "wavlm_model": Subject(
        "wavlm_model", {**SMALL, "encoder_num_buckets": 32, "encoder_max_distance": 100, "aux_num_out": None}, _wave
    ),
}  # fmt: skip


def make(name: str) -> Made:
    import torchaudio

    subject = SUBJECTS[name]
    build = vars(torchaudio.models)[subject.factory]
    return first_that_runs([(subject.factory, lambda: (build(**subject.settings), Batch(subject.inputs())))])


GROUP = Group("torchaudio", lambda: list(SUBJECTS), make, lambda name: ("torchaudio",))
