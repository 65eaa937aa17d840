"""Bad sets of modalities: unequal counts, one that is missing everywhere, rows without any, models that cannot be traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from layerwise.errors import DataError, LayerwiseError, UsageError, UserModelError
from layerwise.loading import load, load_data
from layerwise.multimodal import MultiModalAnalysis

CFG: dict[str, Any] = {"image": {"input_size": (1, 4, 4)}, "text": {"words": ["one", "two"]}}
IMAGES = [np.zeros((4, 4), np.float32)] * 2


class Reader(nn.Module):
    """Adds what it makes of the image to what it makes of the words; two blocks."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.multimodal_cfg = CFG
        self.words = nn.Embedding(4, 4)
        self.pixels = nn.Linear(16, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(layers))

    def forward(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor, present: Tensor) -> Tensor:
        x = self.words(input_ids).mean(1) + self.pixels(image.flatten(1)) * present[:, :1]
        for layer in self.chosen(present):
            x = x + layer(x)
        return x

    def chosen(self, present: Tensor) -> list[nn.Module]:
        return list(self.layers)


class Chooses(Reader):
    """Runs fewer layers where an image is missing."""

    def chosen(self, present: Tensor) -> list[nn.Module]:
        return list(self.layers)[: 2 if bool(present[:, 0].all()) else 1]


class Untraceable(Reader):
    def chosen(self, present: Tensor) -> list[nn.Module]:
        raise ValueError("no layer today")


def analyze(module: nn.Module, **given: Any) -> Any:
    return MultiModalAnalysis().analyze_multimodal_model(module, **given)


CASES: list[tuple[str, Callable[[], Any], type[LayerwiseError], str, list[str]]] = [
    (
        "unequal counts",
        lambda: analyze(Reader(), text_data=["one"], image_data=IMAGES),
        DataError,
        "LW-D43",
        ["1 of text", "2 of image"],
    ),
    (
        "unequal labels",
        lambda: analyze(Reader(), text_data=["one", "two"], image_data=IMAGES, labels=[1]),
        DataError,
        "LW-D43",
        ["1 of label"],
    ),
    (
        "missing everywhere",
        lambda: analyze(Reader(), text_data=[None, None], image_data=IMAGES),
        DataError,
        "LW-D44",
        ["'text' is missing in all 2 rows"],
    ),
    (
        "a row without any",
        lambda: analyze(Reader(), text_data=["one", None], image_data=[IMAGES[0], None]),
        DataError,
        "LW-D32",
        ["row 1", "none of image, text"],
    ),
    ("nothing", lambda: analyze(Reader(), text_data=[], image_data=[]), DataError, "LW-D29", ["empty"]),
    ("one modality", lambda: analyze(Reader(), text_data=["one"]), UsageError, "LW-C", ["text", "nothing to compare"]),
    (
        "no such modality",
        lambda: analyze(Reader(), text_data=["one"], audio_data=[[0.1]]),
        UsageError,
        "LW-C",
        ["nothing to compare"],
    ),
    (
        "a model of one modality",
        lambda: MultiModalAnalysis().analyze(load(nn.Linear(2, 2), example=torch.ones(2, 2)), load_data([{"x": [1.0, 2.0]}])),
        UsageError,
        "LW-C",
        ["reads other"],
    ),
    (
        "layers that depend on what is there",
        lambda: analyze(Chooses(), text_data=["one", "two"], image_data=IMAGES),
        UserModelError,
        "LW-U76",
        ["layers.1", "without image"],
    ),
    (
        "cannot be traced",
        lambda: analyze(Untraceable(), text_data=["one", "two"], image_data=IMAGES),
        UserModelError,
        "LW-U73",
        [__file__, "no layer today"],
    ),
]


@pytest.mark.parametrize(("action", "kind", "code", "named"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_a_bad_set_is_named(action: Callable[[], Any], kind: type[LayerwiseError], code: str, named: list[str]) -> None:
    with pytest.raises(LayerwiseError) as caught:
        action()
    text = str(caught.value)
    assert type(caught.value) is kind, text
    assert text.startswith(f"{code} "), text
    assert "\n" not in text
    assert caught.value.remedy, text
    assert not [part for part in named if part not in text], text
