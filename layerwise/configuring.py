"""A changed model of transformers as its own class loads it: ``config.json`` and ``model.safetensors``.

Dropped layers are taken out of the configuration (`layerwise.compacting`), then sizes that changed are written into it
(`layerwise.narrowing`). Whether the class then computes the same is tried: the written folder is loaded by ``from_pretrained``
and run. Where nothing fits, the reason is given, and the folder is left without these files.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerwise.compacting import Compact, compacted, quiet, renumbered
from layerwise.method import method_of, unfolded
from layerwise.model import UniversalModel
from layerwise.narrowing import narrowed
from layerwise.tensors import state
from layerwise.weights import save_weights

BOUND = 1e-5  # of the largest output: the library may choose another attention kernel


def sizes_of(model: UniversalModel) -> set[tuple[int, int]]:
    """The sizes that steps changed, before and after."""
    return {size for step in unfolded(model.source)[1] for size in method_of(step).resized()}


def write_configured(model: UniversalModel, folder: Path) -> Compact | str:
    """Writes ``config.json``, ``generation_config.json`` and ``model.safetensors`` into `folder`, loads them by
    ``from_pretrained`` and compares; or gives the reason in words, and leaves nothing.
    """
    found = configured(model)
    if isinstance(found, str):
        return found
    module: Any = model.module
    trial = folder / "configured"
    trial.mkdir()
    try:
        tensors = {name: tensor.detach() for name, tensor in state(module).items()}
        save_weights(trial / "model.safetensors", {new: tensors[old] for old, new in renumbered(tensors, found.kept).items()})
        _write_config(module, found.config, trial)
        if apart := difference(model, trial):
            return apart
        for file in trial.iterdir():
            file.rename(folder / file.name)
    finally:
        shutil.rmtree(trial)
    return found


def configured(model: UniversalModel) -> Compact | str:
    """The configuration with which the class has the tensors that are left, or in words why there is none."""
    module: Any = model.module
    compact = compacted(module)
    if isinstance(compact, str):
        return compact
    left = {name: tuple(tensor.shape) for name, tensor in state(module).items()}
    wanted = {new: left[old] for old, new in renumbered(left, compact.kept).items()}
    config = narrowed(module, compact.config, wanted, sizes_of(model))
    if config is None:
        return "the tensors that are left are not those of the class, whatever its configuration says"
    return Compact(config, compact.kept)


def _write_config(module: Any, config: Mapping[str, Any], folder: Path) -> None:
    """``config.json`` as the library itself reads this configuration, and how the model generates."""
    dtype = str(next(iter(module.parameters())).dtype).removeprefix("torch.")
    whole = json.loads(type(module.config).from_dict(copy.deepcopy(dict(config))).to_json_string(use_diff=False))
    whole |= {"architectures": [type(module).__name__], "dtype": dtype}
    (folder / "config.json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    if getattr(module, "generation_config", None) is not None:
        module.generation_config.save_pretrained(folder)


def difference(model: UniversalModel, folder: Path) -> str:
    """'' if ``from_pretrained`` gives a model with these outputs on the example, or what it gives in words."""
    example = model.example
    try:
        with quiet():
            again = type(model.module).from_pretrained(folder, local_files_only=True).eval().to(model.device)  # type: ignore[attr-defined]
        found = model.around(again, source=None).predict(example).double()
    except Exception as error:  # what it does with a folder of its own layout is the question
        return f"from_pretrained fails: {error}"
    wanted = model.predict(example).double()
    if found.shape != wanted.shape:
        return f"from_pretrained gives outputs of another shape, {tuple(found.shape)}"
    apart = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
    return "" if apart <= BOUND else f"what from_pretrained gives differs by {apart:.2g} of the largest output"


__all__ = ["configured", "difference", "sizes_of", "write_configured"]
