"""Layers from the names of tensors alone, for files that no class is known for.

Decision: what structure reading finds by running a model is found here by the names it gives its tensors. A *chain* is a
container with numbered members (``model.layers.3``) of which at least two hold more than one weight matrix and are alike: the
tensor names of one are among those of the other. Its members are layers, but a member that holds a chain itself (a stage of
blocks) is opened. Alike parts that work side by side, the experts of a mixture, are no chain. Where no chain is found, a single
numbered member with several matrices is a layer, and else every name that owns a matrix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

PARALLEL = frozenset({"experts", "local_experts", "heads"})  # numbered members that all take the same input
BUFFERS = re.compile(
    r"(^|\.)(running_mean|running_var|num_batches_tracked|position_ids|token_type_ids|inv_freq|masked_bias|"
    r"relative_position_index|relative_coords_table|attn_mask)$"
)
EMBEDDING = re.compile(r"embed|(^|\.)(wte|wpe|shared)\.")

Shapes = Mapping[str, tuple[int, ...]]


def layers_of(shapes: Shapes) -> dict[str, list[str]]:
    """Layer name → the names of its tensors, layers in natural order; `shapes` holds every parameter of the model."""
    prefixes = _chains(shapes, "") or _singles(shapes) or _owners(shapes)
    found: dict[str, list[str]] = {prefix: [] for prefix in sorted(prefixes, key=natural)}
    for name in shapes:
        for prefix in found.keys() & set(_ancestors(name)):
            found[prefix].append(name)
    return found


def is_parameter(name: str, tensor: Tensor) -> bool:
    """Whether a tensor of a file is a parameter and not a buffer: whole numbers and the usual names of buffers are none."""
    causal_mask = name.endswith("attn.bias") and tensor.dim() == 4  # of old GPT-2 files
    return tensor.is_floating_point() and not BUFFERS.search(name) and not causal_mask


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key that puts ``layers.10`` behind ``layers.9``."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split("."))


def _ancestors(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:i]) for i in range(1, len(parts) + 1))


def _children(shapes: Shapes, prefix: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """Path of each child of `prefix` → its tensors."""
    skip = len(prefix) + 1 if prefix else 0
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        key, dot, _ = name[skip:].partition(".")
        if dot:  # a tensor of the container itself is no child
            found.setdefault(name[:skip] + key, {})[name] = shape
    return found


def _chains(shapes: Shapes, prefix: str) -> list[str]:
    """The layers at or below `prefix`."""
    children = _children(shapes, prefix)
    numbered = {path: tensors for path, tensors in children.items() if path.rpartition(".")[2].isdigit()}
    if prefix.rpartition(".")[2] in PARALLEL and numbered:
        return []
    deeper = {path: _chains(tensors, path) for path, tensors in children.items()}
    blocks = {path: tensors for path, tensors in numbered.items() if _matrices(tensors) > 1}
    if not _alike(blocks):
        return [layer for path in children for layer in deeper[path]]
    return [layer for path, tensors in blocks.items() for layer in deeper[path] or [_unwrapped(path, tensors)]]


def _matrices(tensors: Shapes) -> int:
    return sum(len(shape) > 1 for shape in tensors.values())


def _alike(blocks: Mapping[str, Shapes]) -> bool:
    """Whether the tensor names of one member are among those of another."""
    kinds = [{name[len(path) :] for name in tensors} for path, tensors in blocks.items()]
    return any(a <= b or b <= a for i, a in enumerate(kinds) for b in kinds[i + 1 :])


def _unwrapped(path: str, tensors: Shapes) -> str:
    """The only numbered child of a container of one: ``blocks.0`` → ``blocks.0.0``."""
    children = _children(tensors, path)
    while len(children) == 1 and (only := next(iter(children))).rpartition(".")[2].isdigit():
        path, children = only, _children(tensors, only)
    return path


def _singles(shapes: Shapes) -> list[str]:
    """Outermost numbered names that hold several matrices: the one layer of a model of one layer, or one that all share."""
    numbered = {path for name in shapes for path in _ancestors(name) if path.rpartition(".")[2].isdigit()}
    several = {p for p in numbered if _matrices({n: s for n, s in shapes.items() if n.startswith(p + ".")}) > 1}
    return [p for p in several if not several & set(_ancestors(p.rpartition(".")[0]))]


def _owners(shapes: Shapes) -> list[str]:
    owners: Iterable[str] = (name.rpartition(".")[0] for name, s in shapes.items() if len(s) > 1 and not EMBEDDING.search(name))
    return [owner for owner in dict.fromkeys(owners) if owner]


__all__ = ["is_parameter", "layers_of", "natural"]
