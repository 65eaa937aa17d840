"""Compressed models on disk: plan + safetensors, no pickle, no code.

::

    config.json          only where transformers' from_pretrained gives this very model from it (without the dropped layers)
    model.safetensors    the weights (weights.safetensors where from_pretrained would fill what was cut with noise)
    layerwise.json       source, steps, task, modality, fingerprint, versions; of a result also figures and proofs
    …                    what the adapter needs (tokenizer, transform)
    manifest.json        SHA-256 of everything, written last, verified before anything is read

The source builds the class, the steps are replayed on it, and the weights are put in: the module that comes out is the one that
was saved, bit for bit.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.adapter import adapter_for, library_of
from layerwise.compacting import Compact, chains, original_names
from layerwise.configuring import sizes_of, write_configured
from layerwise.data import Batch
from layerwise.errors import ModelFormatError, UsageError
from layerwise.files import staged_folder, verify_manifest
from layerwise.method import method_of, outlined, replay_, unfolded
from layerwise.model import UniversalModel
from layerwise.packing import stand_in
from layerwise.recurrent import Unstacked
from layerwise.result import CompressionResult
from layerwise.source import Source, build
from layerwise.task import Task, task_named
from layerwise.tensors import flattened, state, wraps
from layerwise.weights import read_weights, save_weights
from layerwise.weights.problems import bad, listed

FORMAT = 1
DESCRIPTION = "layerwise.json"
PACKAGES = ("layerwise", "torch", "transformers", "timm", "torchao", "safetensors")


def save_model(saved: UniversalModel | CompressionResult, folder: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Writes the folder whole or not at all. Raises `UsageError` LW-C07 when it exists and not `force`, `DiskFull`."""
    model = saved if isinstance(saved, UniversalModel) else saved.model
    with staged_folder(folder, force=force) as staged:
        description = _description(model)
        if isinstance(saved, CompressionResult):
            description |= {"result": saved.to_dict()}
        model.adapter.save(staged)
        cut = bool(chains(model.module) or sizes_of(model))
        written = write_configured(model, staged) if cut else "it is as its class builds it"
        if isinstance(written, Compact):
            description |= {"weights": "model.safetensors"} | ({"kept": written.kept} if written.kept else {})
        else:
            save_weights(staged / description["weights"], _flat(model.module))
            description |= {"unconfigured": written} if cut else {}  # why `from_pretrained` cannot read it
        if (
            description["weights"] == "model.safetensors"
            and not (staged / "config.json").exists()
            and "transformers" in library_of(model.module)
        ):
            (staged / "config.json").write_text(json.dumps(_config(model.module), indent=2) + "\n", encoding="utf-8")
        (staged / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    return Path(folder)


def load_saved(folder: str | os.PathLike[str], *, module: nn.Module | None = None, applied: int = 0) -> UniversalModel:
    """The model saved in `folder`, in eval mode on the CPU.

    `module` is one of the original class, for a model that was given as a plain object; it is left alone, and its weights are
    of no matter. If it has some of the steps behind it already, `applied` is how many. Raises `CorruptRun` when a file changed,
    `ModelFormatError` (newer format, weights that do not fit), `UsageError` for a source that is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError("There is no such folder.", place=str(folder.absolute()), code="LW-C04")
    verify_manifest(folder)
    about = _read_description(folder)
    source = Source.from_dict(about["source"]) if about["source"] else None
    example = stand_in(about["example"]) if about["example"] else None
    model = rebuilt(source, module, applied=applied, example=example, place=folder)
    _cast_tables_(model.module, about["tables"])
    found = read_weights(folder / about["weights"], finite=False)  # the manifest vouches that they are those of the model
    tensors = original_names(found, about.get("kept", {}))
    _put_(model.module, tensors, folder / about["weights"])
    model.module.eval()
    model.adapter, model.task, model.name = adapter_for(model.module, folder), _task(about["task"]), about["name"]
    return model


def rebuilt(
    source: Source | None,
    module: nn.Module | None = None,
    *,
    applied: int = 0,
    example: Batch | None = None,
    place: str | os.PathLike[str] = "",
) -> UniversalModel:
    """The class that `source` describes, compressed as it says, with weights yet to come; from a copy of `module` if given.

    Raises `UsageError` when neither says how to build it.
    """
    inner, steps = unfolded(source)
    if module is None and inner is None:
        raise UsageError(
            "The model was given as a plain object, so its class cannot be built from the folder alone.",
            place=str(place),
            remedy="Give a module of the same class: load_saved(folder, module=...).",
        )
    base = copy.deepcopy(module) if module is not None else build(inner)  # type: ignore[arg-type]  # one of them is there
    model = replay_(UniversalModel(base, source=inner, example=example), steps[applied:])
    model.source = source
    return model


def _description(model: UniversalModel) -> dict[str, Any]:
    saved = {id(t) for t in state(model.module).values()}
    return {
        "format": FORMAT,
        "name": model.name,
        "modality": model.domain,
        "task": {"name": model.task.name, **asdict(model.task)} if model.task else None,  # type: ignore[call-overload]  # tasks are dataclasses
        "source": model.source.to_dict() if model.source else None,
        "example": outlined(model),
        "weights": "model.safetensors" if _plain(model) else "weights.safetensors",
        # tensors that the class computes and a state dict leaves out; only their type can have changed
        "tables": {n: _dtype(b) for n, b in model.module.named_buffers() if id(b) not in saved},
        "fingerprint": model.fingerprint,
        "versions": {p: v for p in PACKAGES if (v := _version(p))},
    }


def _plain(model: UniversalModel) -> bool:
    """Whether the class takes these weights as it is."""
    _, steps = unfolded(model.source)
    quantized = any(wraps(t) for t in model.module.parameters())
    taken_apart = any(isinstance(m, Unstacked) for m in model.module.modules())
    return not quantized and not taken_apart and not any(method_of(step).structural for step in steps)


def _config(module: Any) -> dict[str, Any]:
    config = json.loads(module.config.to_json_string(use_diff=False))
    return config | {"architectures": [type(module).__name__], "dtype": _dtype(next(iter(module.parameters())))}


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    if not path.is_file():
        raise ModelFormatError(f"holds no {DESCRIPTION}: layerwise did not save a model here.", place=str(folder.absolute()))
    about = json.loads(path.read_text(encoding="utf-8"))  # the manifest vouches for it
    if about["format"] > FORMAT:
        raise ModelFormatError(
            f"was saved in format {about['format']}; this version reads up to {FORMAT}.",
            place=str(path.absolute()),
            remedy="Update layerwise.",
        )
    return about


def _task(data: Mapping[str, Any] | None) -> Task | None:
    if data is None:
        return None
    settings = {k: v for k, v in data.items() if k != "name"}
    return type(task_named(data["name"]))(**settings)


def _flat(module: nn.Module) -> dict[str, Tensor]:
    """Name → plain tensor of everything that is saved; quantized weights by their inner tensors."""
    return {key: plain for name, t in state(module).items() for key, plain in flattened(name, t).items()}


def _put_(module: nn.Module, tensors: Mapping[str, Tensor], place: Path) -> None:
    """Exchanges the data of every saved tensor. Raises `ModelFormatError` LW-M55, 56 or 57 with all the names."""
    own = _flat(module)
    remedy = "The folder belongs to another version of the model's class."
    if missing := own.keys() - tensors.keys():
        raise bad(55, place, f"lacks {len(missing):,} tensors: {listed(sorted(missing))}.", remedy)
    if unexpected := tensors.keys() - own.keys():
        raise bad(
            56, place, f"holds {len(unexpected):,} tensors that the model does not have: {listed(sorted(unexpected))}.", remedy
        )
    if wrong := [n for n, t in own.items() if t.shape != tensors[n].shape]:
        raise bad(57, place, f"has {len(wrong):,} tensors of another shape: {listed(wrong)}.", remedy)
    live = {key: t for name, tensor in state(module).items() for key, t in _live(name, tensor).items()}
    for key, tensor in live.items():
        tensor.data = tensors[key].clone()  # its type as well: the plan may say float16


def _live(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """As `flattened`, but a parameter comes as itself and not as its data, so that it can be given another type."""
    return flattened(name, tensor) if wraps(tensor) else {name: tensor}


def _cast_tables_(module: nn.Module, types: Mapping[str, str]) -> None:
    for name, buffer in module.named_buffers():
        if name in types:
            buffer.data = buffer.data.to(getattr(torch, types[name]))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
