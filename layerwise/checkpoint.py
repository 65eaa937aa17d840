"""What a pass over the data has done so far, on disk: whole or not at all, read back only into the same work."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from layerwise.errors import CorruptRun
from layerwise.feeding import Feeder, State
from layerwise.files import newest_intact, staged_folder
from layerwise.merging import Place
from layerwise.weights import read_weights, save_weights

NODE = re.compile(r"(\d+)\.(\d+)\.(.+)")  # level.position.key


def save(folder: Path, feeder: Feeder) -> None:
    """Writes ``batch-<n>`` beside the older ones, then removes all but the last two."""
    folder.mkdir(parents=True, exist_ok=True)
    with staged_folder(folder / f"batch-{len(feeder.done):09d}", force=True) as stage:
        for name, nodes in feeder.nodes().items():
            save_weights(stage / f"{name}.safetensors", flattened(nodes))
        observation = feeder.observation
        progress = {"done": sorted(feeder.done), "key": key(feeder), "counts": vars(observation.counts)}
        (stage / "progress.json").write_text(json.dumps(progress), encoding="utf-8")
    for old in sorted(folder.glob("batch-*"))[:-2]:
        for file in old.iterdir():
            file.unlink()
        old.rmdir()


def resume(folder: Path, feeder: Feeder) -> None:
    """Gives `feeder` what the newest intact state holds; nothing where there is none.

    Raises `CorruptRun` (LW-R11) when it belongs to another model, data set, seed or set of methods.
    """
    if not folder.is_dir():
        return
    newest, skipped = newest_intact(sorted(folder.glob("batch-*")))
    feeder.observation.notes.extend(f"A damaged checkpoint was skipped: {path.name}: {why}" for path, why in skipped)
    if newest is None:
        return
    progress = json.loads((newest / "progress.json").read_text(encoding="utf-8"))
    if progress["key"] != key(feeder):
        raise CorruptRun(
            "The checkpoint belongs to another model, data set, seed or set of methods.",
            place=str(newest),
            remedy="Remove the folder to start afresh.",
        )
    feeder.absorb(
        progress["done"], {name: unflattened(read_weights(newest / f"{name}.safetensors")) for name in feeder.statistics}
    )
    for name, value in progress["counts"].items():
        setattr(feeder.observation.counts, name, value)


def key(feeder: Feeder) -> str:
    """What a checkpoint must agree with: the model, its layers, the data, the seed and the methods."""
    parts = [
        feeder.model.fingerprint,
        feeder.data.fingerprint,
        str(feeder.seed),
        str(len(feeder.data)),
        *sorted(feeder.statistics),
        *(f"{g}={n}" for g, n in Counter(x.granularity for x in feeder.model.layers).items()),
    ]
    return "|".join(parts)


def flattened(nodes: Mapping[Place, State]) -> dict[str, Tensor]:
    """``level.position.key`` → tensor on the CPU."""
    return {
        f"{level}.{position}.{name}": tensor.cpu().contiguous()
        for (level, position), state in nodes.items()
        for name, tensor in state.items()
    }


def unflattened(tensors: Mapping[str, Tensor]) -> dict[Place, dict[str, Tensor]]:
    """The inverse of `flattened`."""
    nodes: dict[Place, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        found = NODE.fullmatch(path)
        if found is None:
            raise CorruptRun(f"The checkpoint holds a tensor named {path!r}.", remedy="Remove the folder to start afresh.")
        nodes.setdefault((int(found[1]), int(found[2])), {})[found[3]] = tensor
    return nodes
