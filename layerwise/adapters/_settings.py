"""Settings beside the weights: our own files, and transformers' descriptions of processors, which have two layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from layerwise.errors import DataError

TOGETHER = "processor_config.json"  # newer transformers: every part of a processor in one file
ALONE = "preprocessor_config.json"


def json_file(path: Path) -> dict[str, Any]:
    """The mapping in `path`; empty where there is none. Raises `DataError` for what is no JSON, naming the file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not readable JSON: {error}", place=str(path.absolute()), remedy="Copy it again.") from error
    return content if isinstance(content, dict) else {}


def processor(folder: Path | None, part: str) -> dict[str, Any]:
    """transformers' settings of the ``image_processor`` or ``feature_extractor`` in `folder`; empty where there are none."""
    if folder is None:
        return {}
    found = json_file(folder / TOGETHER).get(part)
    return found if isinstance(found, dict) else json_file(folder / ALONE)
