"""What kind of network a model is, read from what it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torchvision.models import squeezenet1_1

from layerwise.adapters.audio import AudioModalityAdapter
from layerwise.adapters.text import TextModalityAdapter
from layerwise.adapters.vision import VisionModalityAdapter
from layerwise.architecture import Architecture, ArchitectureDetector
from tests.adapters.test_audio import masked, whisper
from tests.adapters.test_multimodal import clip, llava
from tests.adapters.test_text import bart_classifier, bert, gpt2, t5
from tests.models import CASES

DETECTOR = ArchitectureDetector()


class Renamed(nn.Module):
    """An encoder and a decoder under names that say nothing."""

    def __init__(self) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"d_model": 16, "nhead": 2, "dim_feedforward": 32, "batch_first": True, "dropout": 0.0}
        self.a = nn.ModuleList(nn.TransformerEncoderLayer(**sizes) for _ in range(2))
        self.norm = nn.LayerNorm(16)
        self.b = nn.ModuleList(nn.TransformerDecoderLayer(**sizes) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = x[:, :3]
        for layer in self.a:
            x = layer(x)
        x = self.norm(x)
        for layer in self.b:
            y = layer(y, x)
        return y


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.LSTM(8, 8, batch_first=True) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x, _ = layer(x)
        return x


SEQUENCE = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
FOUND: dict[str, tuple[Any, Any, Architecture, str]] = {
    "t5": (t5, None, Architecture.ENCODER_DECODER, "text"),
    "bart": (bart_classifier, None, Architecture.ENCODER_DECODER, "text"),
    "whisper": (lambda: whisper("WhisperModel"), None, Architecture.ENCODER_DECODER, "audio"),
    "renamed": (Renamed, SEQUENCE, Architecture.ENCODER_DECODER, "other"),
    "bert": (bert, None, Architecture.TRANSFORMER, "text"),
    "gpt2": (gpt2, None, Architecture.TRANSFORMER, "text"),
    "wav2vec2": (masked, None, Architecture.TRANSFORMER, "audio"),
    "clip": (clip, None, Architecture.TRANSFORMER, "multimodal"),
    "llava": (llava, None, Architecture.TRANSFORMER, "multimodal"),  # its second stack shares a table of positions
    "squeezenet": (squeezenet1_1, None, Architecture.CNN, "vision"),
    "convnext": (CASES["convnext"].build, CASES["convnext"].batch(2), Architecture.CNN, "vision"),
    "lstm": (Recurrent, SEQUENCE[..., :8], Architecture.RNN, "other"),
    "residual": (CASES["residual"].build, CASES["residual"].batch(2), Architecture.MLP, "other"),
}


@pytest.mark.parametrize(("build", "example", "architecture", "modality"), FOUND.values(), ids=FOUND)
def test_the_kind_is_read_from_what_ran(build: Any, example: Any, architecture: Architecture, modality: str) -> None:
    torch.manual_seed(0)
    found = DETECTOR.detect_and_adapt(build(), example)
    assert found.architecture == architecture, found.words
    assert found.modality == modality == found.adapter.modality
    assert found.words.startswith(f"{architecture}: {sum(found.kinds.values())} layer")
    assert sum(found.stacks.values()) == sum(found.kinds.values())


def test_the_words_name_the_stacks() -> None:
    found = DETECTOR.detect_and_adapt(Renamed(), SEQUENCE)
    assert found.words == "encoder-decoder: 4 layers (4 attention) in a (2), b (2); every layer of b reads what a gave"
    assert DETECTOR.detect_and_adapt(bert()).words == "transformer: 2 layers (2 attention)"


def test_the_adapter_is_the_one_that_claims_the_model() -> None:
    assert isinstance(DETECTOR.detect_and_adapt(gpt2()).adapter, TextModalityAdapter)
    assert isinstance(DETECTOR.detect_and_adapt(squeezenet1_1()).adapter, VisionModalityAdapter)
    assert isinstance(DETECTOR.detect_and_adapt(masked()).adapter, AudioModalityAdapter)


def test_half_and_half_is_mixed() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.ModuleList(nn.Sequential(nn.Conv1d(16, 16, 1), nn.ReLU(), nn.Conv1d(16, 16, 1)) for _ in range(2))
            self.up = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = x.mT
            for layer in self.down:
                x = layer(x)
            x = x.mT
            for layer in self.up:
                x = layer(x)
            return x

    assert DETECTOR.detect_and_adapt(Half(), SEQUENCE).architecture == Architecture.MIXED


def test_the_folders_settings_are_used(tmp_path: Any) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"sampling_rate": 8000}')
    module = tf.Wav2Vec2Model(masked().config)  # type: ignore[arg-type]
    found = ArchitectureDetector(tmp_path).detect_and_adapt(module)
    assert isinstance(found.adapter, AudioModalityAdapter)
    assert found.adapter.features.rate == 8000
