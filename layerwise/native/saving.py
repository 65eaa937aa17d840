"""A `VFTModel` on disk in Hugging Face layout: ``config.json`` and ``model.safetensors``, written whole or not at all."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from layerwise.errors import ModelFormatError
from layerwise.files import staged_folder
from layerwise.native.model import VFTModel
from layerwise.native.settings import VFTSettings
from layerwise.weights import load_into, read_weights, save_weights

MODEL_TYPE = "vft"


def architecture(settings: VFTSettings) -> str:
    """The name of the transformers class that reads these settings, see `layerwise.native.hugging`."""
    if settings.classes:
        return "VFTForSequenceClassification"
    return "VFTForCausalLM" if settings.causal and settings.vocab_size else "VFTPreTrainedEncoder"


def save_pretrained(model: VFTModel, folder: str | os.PathLike[str]) -> Path:
    """Writes the folder; one that is there is exchanged as a whole. Raises as `layerwise.files.staged_folder` does."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config = {"model_type": MODEL_TYPE, "architectures": [architecture(model.settings)], "dtype": dtype}
    with staged_folder(folder, force=True) as staged:
        save_weights(staged / "model.safetensors", model)
        (staged / "config.json").write_text(json.dumps(config | model.settings.to_dict(), indent=1) + "\n", encoding="utf-8")
    return Path(folder)


def from_pretrained(folder: str | os.PathLike[str], weights: str | os.PathLike[str] | None = None) -> VFTModel:
    """The model of a folder (with other `weights`, if given), in eval mode.

    Raises `ModelFormatError` for a configuration or weights of something else.
    """
    path = Path(folder) / "config.json"
    config = _config(path)
    if config.get("model_type") != MODEL_TYPE:
        what = f"describes a {config.get('model_type')!r}, not a {MODEL_TYPE!r}."
        raise ModelFormatError(what, place=str(path.absolute()), remedy="Load it with layerwise.load.")
    model = VFTModel(VFTSettings.of({f.name: config[f.name] for f in fields(VFTSettings) if f.name in config}))
    tensors = {name.removeprefix("vft."): t for name, t in read_weights(Path(weights or folder)).items()}
    model.to(next(iter(tensors.values())).dtype)
    load_into(model, tensors, source=str(Path(weights or folder).absolute()))
    return model.eval()


def _config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFormatError(f"cannot be read: {error}", place=str(path.absolute())) from error
    if not isinstance(found, dict):
        raise ModelFormatError("holds no object.", place=str(path.absolute()))
    return found


__all__ = ["MODEL_TYPE", "architecture", "from_pretrained", "save_pretrained"]
