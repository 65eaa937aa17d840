"""What the coverage benchmark is measured on is all that it says."""

from __future__ import annotations

import pytest

from layerwise.benchmark.architectures import hugging, timm_families, torchaudio_models, torchvision_models
from layerwise.benchmark.architectures.made import NotBuilt, first_that_runs
from layerwise.data import Batch
from layerwise.model import UniversalModel
from tests.models import ResidualNet, vectors


def test_every_model_file_of_timm_has_its_model_in_the_table() -> None:
    import timm

    assert sorted(timm_families.table()) == timm_families.families()
    assert all(name in timm.list_models(module=family) for family, name in timm_families.table().items())


def test_every_factory_of_the_audio_table_exists() -> None:
    import torchaudio

    assert all(callable(vars(torchaudio.models)[s.factory]) for s in torchaudio_models.SUBJECTS.values())


@pytest.mark.parametrize("name", ["classification/squeezenet1_1", "video/r3d_18"])
def test_images_and_clips_are_fed(name: str) -> None:
    assert torchvision_models.make(name).example.size == 2


def test_the_smallest_side_that_runs_is_taken() -> None:
    assert timm_families.make("test_vit").how == "test_vit at 64 pixels"


def test_the_first_attempt_that_runs_is_taken_and_the_others_say_why_not() -> None:
    def broken() -> tuple[ResidualNet, Batch]:
        raise ValueError("no such width\nand more")

    made = first_that_runs(
        [("a", broken), ("b", lambda: (ResidualNet(), vectors(9)(2))), ("c", lambda: (ResidualNet(), vectors()(2)))]
    )
    assert made.how == "c"
    assert not made.module.training
    with pytest.raises(NotBuilt, match=r"a: ValueError: no such width; b: The forward of ResidualNet raised RuntimeError"):
        first_that_runs([("a", broken), ("b", lambda: (ResidualNet(), vectors(9)(2)))])


@pytest.mark.parametrize(
    "name",
    [
        "CanineForSequenceClassification",  # no table of tokens: characters are hashed
        "Gemma3ForSequenceClassification",  # texts alone, on a model whose configuration speaks of images
        "SpeechT5ForSpeechToText",  # a wave, although the configuration speaks of a spectrogram
    ],
)
def test_an_adapter_takes_what_it_claims(name: str) -> None:
    made = hugging.make(name)
    assert UniversalModel(made.module, example=made.example).output(made.example).isfinite().all()


def test_detectors_give_the_logits_of_every_proposal() -> None:
    made = torchvision_models.make("detection/fasterrcnn_mobilenet_v3_large_320_fpn")
    assert UniversalModel(made.module, example=made.example).output(made.example).shape == (2, 16, 91)
