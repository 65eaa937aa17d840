"""The groups of architectures that coverage is measured on, and the record of one model."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Mapping
from typing import Any

from layerwise.benchmark.architectures import graph_nets, hugging, timm_families, torchaudio_models, torchvision_models
from layerwise.benchmark.architectures.enlivened import enliven_
from layerwise.benchmark.architectures.made import Group, NotBuilt, brief
from layerwise.benchmark.coverage import judge
from layerwise.errors import LayerwiseError
from layerwise.model import UniversalModel

PLACE = re.compile(r"(/[\w.@+-]+)+/(site-packages|lib/python[\d.]+|layerwise)/")

GROUPS: Mapping[str, Group] = {
    "timm": timm_families.GROUP,
    "transformers": hugging.GROUP,
    "torchvision": torchvision_models.GROUP,
    "torchaudio": torchaudio_models.GROUP,
    "graph": graph_nets.GROUP,
}


def examined(group: str, name: str) -> dict[str, Any]:
    """The record of one model: whether it was built, the figures of its judgement, or the error that stopped it."""
    started = time.monotonic()
    record: dict[str, Any] = {"group": group, "name": name, "kinds": list(GROUPS[group].kinds(name)), "built": True}
    try:
        made = GROUPS[group].make(name)
        enliven_(made.module, made.example)
        record["how"] = made.how
        record |= judge(UniversalModel(made.module, example=made.example, name=name)).to_dict()
    except NotBuilt as error:
        record |= {"built": False, "error": error.what}
    except LayerwiseError as error:
        record["error"] = str(error)
    except Exception as error:  # one model must not stop the run
        record["error"] = brief(error)
    gc.collect()
    return without_places(record) | {"seconds": round(time.monotonic() - started, 1)}


def without_places(value: Any) -> Any:
    """Reasons name the library's file, not where this machine keeps it."""
    if isinstance(value, dict):
        return {key: without_places(inner) for key, inner in value.items()}
    return PLACE.sub("", value) if isinstance(value, str) else value


__all__ = ["GROUPS", "examined", "without_places"]
