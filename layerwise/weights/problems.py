"""How a bad model file is reported: one code per kind, the file, the tensors, and the way to mend it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from layerwise.errors import ModelFormatError

SHOWN = 10
AGAIN = "Download or copy the file again, and compare its size with the source."
RESAVE = "In an environment that you trust, save it again with safetensors.torch.save_file(tensors, 'model.safetensors')."


def bad(case: int, path: Path | str, what: str, remedy: str = "") -> ModelFormatError:
    """The error LW-M<case> for the file at `path`."""
    place = str(path.absolute()) if isinstance(path, Path) else path
    return ModelFormatError(what, place=place, remedy=remedy, code=f"LW-M{case}")


def listed(names: Iterable[str]) -> str:
    """The names, quoted; of a long list the first ten and how many more."""
    every = list(names)
    text = ", ".join(repr(short(name)) for name in every[:SHOWN])
    return text if len(every) <= SHOWN else f"{text} and {len(every) - SHOWN:,} more"


def short(text: str, size: int = 200) -> str:
    """`text`, its middle left out where it is longer than `size`: a name in a hostile file may have a million letters."""
    return text if len(text) <= size else f"{text[: size // 2]}…{text[-size // 2 :]}"


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``json.loads(object_pairs_hook=…)``: raises `DuplicateKey` where the JSON module would keep the last value."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise DuplicateKey(key)
        found[key] = value
    return found


class DuplicateKey(ValueError):
    """A JSON object names a key twice; `args[0]` is the key."""
