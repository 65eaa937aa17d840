"""An 8-block vision transformer for the demo, trained on scikit-learn's handwritten digits and cached as safetensors.

Decision: the model is a plain timm spec, so that everything after the training treats it like any other model.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.errors import CorruptRun
from layerwise.files import staged_folder, verify_manifest
from layerwise.model import UniversalModel
from layerwise.weights import save_weights

SPEC = "timm:vit_tiny_patch16_224?img_size=8&patch_size=2&in_chans=1&embed_dim=64&depth=8&num_heads=4&num_classes=10"
DATA = "sklearn:digits"


@dataclass(frozen=True)
class Recipe:
    """How the network is trained; part of the cache's name."""

    epochs: int = 24
    batch_size: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    seed: int = 0


def cache_folder(recipe: Recipe) -> Path:
    """Where the weights trained by `recipe` lie: below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(home) if Path(home).is_absolute() else Path.home() / ".cache"
    digest = hashlib.sha256(json.dumps([SPEC, asdict(recipe)]).encode()).hexdigest()[:12]
    return base / "layerwise" / f"digits-{digest}"


def cached_weights(recipe: Recipe) -> Path | None:
    """The weights file of an earlier training, if it is there and whole."""
    folder = cache_folder(recipe)
    try:
        verify_manifest(folder)
    except (CorruptRun, OSError):
        return None
    return folder / "model.safetensors"


def keep_weights(module: nn.Module, recipe: Recipe) -> Path:
    """Saves the trained weights in the cache, whole or not at all, and gives their file."""
    folder = cache_folder(recipe)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with staged_folder(folder, force=True) as staged:
        save_weights(staged / "model.safetensors", dict(module.state_dict()))
    return folder / "model.safetensors"


def train_(model: UniversalModel, images: Tensor, labels: Tensor, recipe: Recipe, progress: Callable[[int, int], None]) -> None:
    """Trains ``model.module`` in place on `images` (samples, 1, 8, 8) and `labels` (samples,): AdamW, one learning rate cycle.

    Call it inside `one_thread`, so that every machine with the same software gets the same weights.
    """
    module = model.module
    generator = torch.Generator().manual_seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    _fresh_(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    steps = -(-len(images) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=recipe.epochs * steps)
    module.train()
    for epoch in range(recipe.epochs):
        for picked in torch.randperm(len(images), generator=generator).split(recipe.batch_size):
            loss = F.cross_entropy(module(images[picked]), labels[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        progress(epoch + 1, recipe.epochs)
    module.eval()


@contextmanager
def one_thread() -> Iterator[None]:
    """The same sums whatever the number of cores; and work this small costs less than threads that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fresh_(module: nn.Module) -> None:
    """Weights scaled to the width (Glorot and Bengio 2010): timm's own start is made for wide networks and learns slowly here."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(part.weight.view(len(part.weight), -1))


def accuracy(model: UniversalModel, images: Tensor, labels: Tensor) -> float:
    """The share of `images` that are read as their label."""
    return float((model.predict(images).argmax(-1) == labels).double().mean())
