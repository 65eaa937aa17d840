"""Encoders: pooled to one embedding per sample, and with a linear classifier on top, fitted while the encoder stays frozen."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from layerwise.data import Batch, Data
from layerwise.errors import DataError, UserModelError
from layerwise.model import UniversalModel
from layerwise.progress import tracked
from layerwise.source import Source
from layerwise.task import Classification, token_mask


class PooledEncoder(nn.Module):
    """The mean of a Hugging Face encoder's last hidden state over the tokens that count: ``(samples, width)``.

    A module of its own, because pooling needs the batch's mask, which an output alone does not carry.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None) -> Tensor:
        segments = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **segments)[0]
        if attention_mask is None:
            return hidden.mean(1)
        mask = attention_mask.to(hidden.dtype)[..., None]
        return (hidden * mask).sum(1) / mask.sum(1).clamp_min(1)


class PooledFrames(nn.Module):
    """The mean of a Hugging Face speech encoder's last hidden state over the frames that hold sound: ``(samples, width)``."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_values: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.encoder(input_values=input_values, attention_mask=attention_mask)[0]
        masks = {} if attention_mask is None else {"attention_mask": attention_mask}
        keep = token_mask(Batch((), {"input_values": input_values, **masks}), hidden[..., 0]).to(hidden.dtype)[..., None]
        return (hidden * keep).sum(1) / keep.sum(1).clamp_min(1)


class EncoderWithHead(nn.Module):
    """Any module that gives embeddings ``(samples, width)``, and a linear layer that turns them into `classes` logits."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        return self.head(self.encoder(*inputs, **named))


def encoder_of(module: nn.Module) -> nn.Module:
    """The library's own model inside the wrappers of this file."""
    while isinstance(module, PooledEncoder | PooledFrames | EncoderWithHead):
        module = module.encoder
    return module


def fit_head(model: UniversalModel, data: Data, *, seed: int = 0, strength: float = 0.01) -> UniversalModel:
    """`model`, which gives embeddings, with a linear head fitted on labelled `data`; the encoder is shared and unchanged.

    Logistic regression, L2 with inverse `strength`, on features that are centred and divided by one common standard deviation;
    both are folded into the weights. Scaled one by one, a feature that hardly varies would get a huge weight, and with it the
    slightest change of the encoder a huge effect.
    Raises `DataError` without labels or for a class without rows, `UserModelError` if the outputs are no embeddings.
    """
    features, labels = embeddings(model, data)
    weight, bias = _logistic(features, labels, seed, strength)
    device, dtype = model.device, next((p.dtype for p in model.module.parameters()), torch.float32)
    with torch.random.fork_rng(devices=[]):  # nn.Linear draws weights that are overwritten at once
        module = EncoderWithHead(model.module, features.shape[1], len(weight)).to(device=device, dtype=dtype)
    with torch.no_grad():
        module.head.weight.copy_(torch.from_numpy(weight))
        module.head.bias.copy_(torch.from_numpy(bias))
    module.train(model.module.training)
    headed = model.around(module, source=headed_source(model.source, features.shape[1], len(weight)))
    headed.task = Classification()
    return headed


def headed_source(encoder: Source | None, width: int, classes: int) -> Source | None:
    """How to build the encoder with its head again; None where the encoder cannot be built."""
    if encoder is None:
        return None
    return Source("head", encoder.name, {"encoder": encoder.to_dict(), "width": width, "classes": classes})


def embeddings(model: UniversalModel, data: Data) -> tuple[np.ndarray, np.ndarray]:
    """Features ``(samples, width)`` in float64 and integer labels ``(samples,)``."""
    features, labels = [], []
    for batch in tracked(data, "embedding", total=len(data)):
        if batch.labels is None:
            raise DataError("A head is fitted on labels, and there are none.", place=data.name, code="LW-D31")
        output = model.predict(batch)
        if output.dim() != 2:
            raise UserModelError(
                f"A head needs one embedding per sample, (samples, width); the model gives {tuple(output.shape)}.",
                remedy="Pool the outputs in the model's forward, or load it by hf:DIR, which pools them.",
                code="LW-U78",
            )
        features.append(output.double().cpu().numpy())
        labels.append(torch.as_tensor(batch.labels).cpu().numpy())
    return np.concatenate(features), np.concatenate(labels).astype(np.int64)


def _logistic(features: np.ndarray, labels: np.ndarray, seed: int, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights ``(classes, width)`` and biases ``(classes,)`` for raw features."""
    from sklearn.linear_model import LogisticRegression

    counts = np.bincount(labels)
    if len(counts) < 2 or not counts.all():
        empty = [i for i, n in enumerate(counts) if not n] or [1]
        raise DataError(f"The class {empty[0]} has no row to fit a head on.", remedy="Give rows of every class.", code="LW-D34")
    mean, scale = features.mean(0), float(np.sqrt(features.var(0).mean())) or 1.0
    fitted = LogisticRegression(C=strength, max_iter=2000, random_state=seed).fit((features - mean) / scale, labels)
    weight, bias = fitted.coef_ / scale, fitted.intercept_
    if len(weight) == 1:  # two classes: scikit-learn keeps the difference of the two logits
        weight, bias = np.concatenate([-weight / 2, weight / 2]), np.concatenate([-bias / 2, bias / 2])
    return weight, bias - weight @ mean


__all__ = ["EncoderWithHead", "PooledEncoder", "PooledFrames", "embeddings", "encoder_of", "fit_head", "headed_source"]
