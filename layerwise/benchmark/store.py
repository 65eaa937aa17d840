"""What a run has finished: one JSON file per piece of work, whole or absent, so that an interrupted run goes on where it was."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerwise.files import write_atomic


@dataclass(frozen=True)
class Store:
    """Pieces below `folder`; a piece made under another `key` (protocol, sizes, code) is made again."""

    folder: Path
    key: str

    def once(self, name: str, make: Callable[[], Any], key: str = "") -> Any:
        """The piece `name`: read if it is there under the same key, else made and written."""
        found = _read(self._path(name))
        if found is not None and found["key"] == f"{self.key}|{key}":
            return found["value"]
        value = make()
        self.replace(name, value, key)
        return value

    def replace(self, name: str, value: Any, key: str = "") -> None:
        """Writes the piece `name` over whatever was there."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({"key": f"{self.key}|{key}", "value": value}))

    def _path(self, name: str) -> Path:
        return self.folder / f"{re.sub(r'[^A-Za-z0-9_.=-]+', '_', name)}.json"

    def below(self, name: str) -> Store:
        """A store of its own in a folder of this one."""
        return Store(self.folder / name, self.key)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
