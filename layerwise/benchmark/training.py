"""Trains the benchmark's small networks once each; the weights lie in the user's cache under a hash of recipe, code and data."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.benchmark import networks
from layerwise.errors import CorruptRun
from layerwise.files import staged_folder, verify_manifest
from layerwise.progress import tracked
from layerwise.weights import load_into, read_weights, save_weights

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Recipe:
    """AdamW under a one-cycle schedule; `steps` batches in all."""

    name: str
    steps: int
    batch_size: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    seed: int = 0


def trained(
    build: Callable[[], nn.Module], recipe: Recipe, inputs: Tensor, labels: Tensor, loss: Loss | None = None
) -> nn.Module:
    """The network in eval mode, from the cache or trained now on one thread, so that every machine gets the same weights."""
    folder = cache_folder(recipe, inputs, labels)
    with torch.random.fork_rng(devices=[]), ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        torch.manual_seed(recipe.seed)
        module = build()
        if _whole(folder):
            load_into(module, read_weights(folder / "model.safetensors"), source=str(folder))
        else:
            train_(module, recipe, inputs, labels, loss or F.cross_entropy)
            _keep(module, folder)
    return module.eval()


def train_(module: nn.Module, recipe: Recipe, inputs: Tensor, labels: Tensor, loss: Loss) -> None:
    """Trains in place; every batch is drawn anew with the recipe's seed."""
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(module.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=recipe.steps)
    module.train()
    for _ in tracked(range(recipe.steps), f"training {recipe.name}", total=recipe.steps):
        picked = torch.randint(len(inputs), (recipe.batch_size,), generator=generator)
        error = loss(module(inputs[picked]), labels[picked])
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        schedule.step()
    module.eval()


def cache_folder(recipe: Recipe, inputs: Tensor, labels: Tensor) -> Path:
    """Below ``$XDG_CACHE_HOME`` or ``~/.cache``; the name holds the hash of everything that the weights depend on."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(home) if Path(home).is_absolute() else Path.home() / ".cache"
    digest = hashlib.sha256(json.dumps(asdict(recipe)).encode())
    digest.update(Path(networks.__file__).read_bytes())
    for tensor in (inputs, labels):
        digest.update(tensor.contiguous().numpy().tobytes())
    return base / "layerwise" / f"benchmark-{recipe.name}-{digest.hexdigest()[:12]}"


def _whole(folder: Path) -> bool:
    try:
        verify_manifest(folder)
    except (CorruptRun, OSError):
        return False
    return True


def _keep(module: nn.Module, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with staged_folder(folder, force=True) as staged:
        save_weights(staged / "model.safetensors", {k: v.contiguous() for k, v in module.state_dict().items()})
