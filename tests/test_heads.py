"""A linear head on frozen embeddings: the fit, its source, and that the encoder is left alone."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from layerwise.data import Data
from layerwise.errors import DataError, UserModelError
from layerwise.heads import EncoderWithHead, embeddings, encoder_of, fit_head
from layerwise.loading import load, load_data
from layerwise.source import Source, build
from layerwise.task import Classification

VIT = "timm:vit_tiny_patch16_224?img_size=8&patch_size=2&in_chans=1&embed_dim=32&depth=2&num_heads=2&num_classes=0"


def blobs(classes: int = 3, rows: int = 60) -> Data:
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % classes
    centres = torch.randn(classes, 5, generator=g) * 3
    return Data.of([(centres[labels] + 0.1 * torch.randn(rows, 5, generator=g), labels)])


def encoder() -> Any:
    torch.manual_seed(0)
    return load(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6)))


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_separable_classes_are_learnt(classes: int) -> None:
    data, model = blobs(classes), encoder()
    before = model.fingerprint
    headed = fit_head(model, data)
    assert (headed.predict(data[0]).argmax(-1) == data[0].labels).float().mean() == 1.0
    assert headed.predict(data[0]).shape == (60, classes)
    assert headed.task == Classification()
    assert model.fingerprint == before
    assert encoder_of(headed.module) is model.module
    assert fit_head(model, data).fingerprint == headed.fingerprint


@pytest.mark.parametrize("classes", [2, 4])
def test_the_weights_are_scikit_learns_on_scaled_features(classes: int) -> None:
    from sklearn.linear_model import LogisticRegression

    data, model = blobs(classes), encoder()
    features, labels = embeddings(model, data)
    scaled = (features - features.mean(0)) / np.sqrt(features.var(0).mean())
    reference = LogisticRegression(C=0.5, max_iter=2000).fit(scaled, labels)
    ours = fit_head(model, data, strength=0.5).predict(data[0]).softmax(-1).numpy()
    np.testing.assert_allclose(ours, reference.predict_proba(scaled), atol=1e-4)


def test_a_feature_that_hardly_varies_gets_no_huge_weight() -> None:
    """MiniLM has two that are constant up to 1e-33: scaled by that, skipping a layer gave logits of 1e30."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=g)
    x[:, 0] = 1.0 + 1e-7 * x[:, 0]
    headed = fit_head(load(nn.Identity()), Data.of([(x, (x[:, 1] > 0).long())]))
    assert float(headed.module.head.weight.detach().abs().max()) < 1.0  # type: ignore[union-attr]


def test_a_headed_model_is_built_again_from_its_source() -> None:
    model = load(VIT, head=load_data("sklearn:digits", load(VIT), "train", limit=200))
    assert model.source is not None
    again = build(Source.from_dict(json.loads(json.dumps(model.source.to_dict()))))
    assert isinstance(again, EncoderWithHead)
    again.load_state_dict(model.module.state_dict())
    batch = load_data("sklearn:digits", model, "test", limit=8)[0]
    assert torch.equal(again(*batch.args), model.predict(batch))
    assert model.predict(batch).shape == (8, 10)
    assert len(model.layers) == 2


def test_a_head_is_exported_by_torch() -> None:
    model = fit_head(encoder(), blobs())
    program = torch.export.export(model.module, (torch.zeros(2, 5),))
    torch.testing.assert_close(program.module()(torch.ones(2, 5)), model.module(torch.ones(2, 5)))


def test_what_cannot_be_fitted() -> None:
    model, data = encoder(), blobs()
    with pytest.raises(DataError, match=r"LW-D31 .*there are none"):
        fit_head(model, Data.of([data[0].args[0]]))
    with pytest.raises(DataError, match="LW-D34 The class 1 has no row"):
        fit_head(model, Data.of([(torch.zeros(4, 5), torch.tensor([0, 2, 0, 2]))]))
    with pytest.raises(DataError, match="LW-D34 The class 1 has no row"):
        fit_head(model, Data.of([(torch.zeros(4, 5), torch.zeros(4))]))
    with pytest.raises(UserModelError, match=r"LW-U78 .*\(4, 2, 6\)"):
        fit_head(model, Data.of([(torch.zeros(4, 2, 5), torch.zeros(4))]))
