"""A pruned model of transformers as its own class builds it from a changed configuration.

Decision: no names of models. The numbers of the configuration that equal a size that changed are tried, each kept if it brings
more tensors to the shape they have now; what then has exactly these shapes is written, loaded by ``from_pretrained`` and run.
Where layers differ, or a class works a size out from another one that stays, nothing fits; ``layerwise.json`` says what was cut.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from layerwise.adapter import library_of
from layerwise.compacting import difference, places, set_, shapes_of, write_config
from layerwise.model import UniversalModel
from layerwise.tensors import state, wraps
from layerwise.weights import save_weights

Sizes = Iterable[tuple[int, int]]  # before and after
Setting = tuple[tuple[tuple[Any, ...], ...], int]  # places in the configuration and what they become
MOST = 64  # settings; more would be chance


def write_narrowed(model: UniversalModel, sizes: Sizes, folder: Path) -> str:
    """Writes ``config.json`` and ``model.safetensors`` into `folder` if ``from_pretrained`` then gives this very model; else
    gives the reason in words, and leaves nothing.
    """
    module: Any = model.module
    if "transformers" not in library_of(module):
        return "the class is none of transformers and has no configuration"
    if any(wraps(p) for p in module.parameters()):
        return "its weights are quantized"
    config = _fitting(module, set(sizes))
    if config is None:
        return "no change of the configuration gives these shapes"
    trial = folder / "narrowed"
    trial.mkdir()
    try:
        save_weights(trial / "model.safetensors", {name: tensor.detach() for name, tensor in state(module).items()})
        write_config(module, config, trial)
        if apart := difference(model, trial):
            return apart
        for file in trial.iterdir():
            file.rename(folder / file.name)
    finally:
        shutil.rmtree(trial)
    return ""


def _fitting(module: Any, sizes: set[tuple[int, int]]) -> dict[str, Any] | None:
    """The configuration with which the class has the shapes of `module`; settings are taken as long as one more helps."""
    config = json.loads(module.config.to_json_string(use_diff=False))
    wanted = {name: tuple(t.shape) for name, t in state(module).items()}
    left = list(_settings(config, sizes))[:MOST]
    missing = _missing(module, config, wanted)
    while missing and left:
        tried = [(_missing(module, changed := _with(config, setting), wanted), setting, changed) for setting in left]
        fewest, setting, changed = min(tried, key=lambda t: t[0])
        if fewest >= missing:
            return None
        missing, config = fewest, changed
        left.remove(setting)
    return None if missing else config


def _settings(config: Mapping[str, Any], sizes: set[tuple[int, int]]) -> Iterator[Setting]:
    """Numbers under one key that equal a size from before; numbers of heads also where they are a multiple of it."""
    known = {before: {after for b, after in sizes if b == before} for before, _ in sizes}
    found: dict[tuple[str, int, int], list[tuple[Any, ...]]] = {}
    for value in _values(config):
        for place in places(config, value, ()):
            key = str(place[-1])
            news = set(known.get(value, ()))
            if "head" in key and "dim" not in key:
                news |= {
                    value * after // before for before, after in sizes if value % before == 0 and value * after % before == 0
                }
            for new in news:
                found.setdefault((key, value, new), []).append(place)
    for (_, _, new), spots in found.items():
        yield tuple(spots), new
        if len(spots) > 1:  # towers of one model may be cut differently
            yield from (((spot,), new) for spot in spots)
    for key, value in config.items():
        if value is None:  # a size that the class would work out
            yield from ((((key,),), after) for after in sorted({after for _, after in sizes}, reverse=True)[:3])


def _values(tree: Any) -> set[int]:
    items = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list) else ()
    own = {v for v in items if type(v) is int and v > 1}
    return own.union(*(_values(v) for v in items)) if items else own


def _with(config: Mapping[str, Any], setting: Setting) -> dict[str, Any]:
    changed = copy.deepcopy(dict(config))
    for place in setting[0]:
        set_(changed, place, setting[1])
    return changed


def _missing(module: Any, config: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]]) -> int:
    """How many tensors the class would have of another shape."""
    shapes = shapes_of(module, config)
    return sum(shapes.get(name) != shape for name, shape in wanted.items()) if shapes else len(wanted) + 1


__all__ = ["write_narrowed"]
