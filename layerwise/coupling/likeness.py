"""What makes modules, and groups of units in them, alike: what was found out for one then holds for all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from torch import Tensor, nn

from layerwise.coupling.groups import Group, live


def likeness(block: nn.Module, name: str, group: Group) -> str:
    """Equal for groups that are alike in blocks that are alike: what was found for one holds for all."""
    places = [
        (p.name.removeprefix(f"{name}."), p.dim, p.size, p.indices.tolist() if group.units < 64 else p.indices.shape)
        for p in group.places
    ]
    return structure(block) + hashlib.sha256(repr(places).encode()).hexdigest()


def structure(module: nn.Module, *, skip: Iterable[str] = ("layer_idx", "layer_id", "layer_index", "idx")) -> str:
    """A digest of classes, shapes, plain settings and what the forwards do, without the weights."""
    left = frozenset(skip)
    digest = hashlib.sha256()
    for name, tensor in live(module).items():
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
    seen: dict[int, str] = {}
    for name, part in module.named_modules():
        plain = {
            k: v for k, v in vars(part).items() if k not in left and isinstance(v, int | float | str | tuple) and k != "training"
        }
        digest.update(f"{name}{type(part).__module__}{type(part).__qualname__}{sorted(plain.items(), key=str)}".encode())
        code = getattr(type(part).forward, "__code__", None)  # a class may be written anew under its name
        digest.update(f"{code.co_code!r}{code.co_names}".encode() if code else b"")
        for key, value in vars(part).items():
            if (
                not key.startswith("_")
                and hasattr(value, "__dict__")
                and not isinstance(value, nn.Module | Tensor | type)
                and not callable(value)
            ):
                if id(value) not in seen:
                    seen[id(value)] = str(
                        sorted(((k, v) for k, v in vars(value).items() if isinstance(v, int | float | str)), key=str)
                    )
                digest.update(seen[id(value)].encode())
    return digest.hexdigest()


__all__ = ["likeness", "structure"]
