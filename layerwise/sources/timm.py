"""``timm:NAME``: any architecture of timm. Nothing is downloaded: weights come from a file, or are random."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from layerwise.errors import UsageError, missing_dependency, nearest
from layerwise.source import SOURCES, ModelSource, Opened, Source
from layerwise.sources._parts import filled_, seeded, with_options


@SOURCES.register("timm")
class TimmSource(ModelSource):
    """``timm:vit_tiny_patch16_224?img_size=8&in_chans=1``: what follows the question mark goes to ``timm.create_model``."""

    def open(self, name: str, *, weights: str | Path | None) -> Opened:
        plain, settings = with_options(name)
        module = _create(plain, settings)
        return Opened(module, Source("timm", plain, settings), notes=filled_(module, weights))

    def build(self, source: Source) -> nn.Module:
        return _create(source.name, source.settings)


def _create(name: str, settings: Mapping[str, Any]) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise missing_dependency("timm", "vision", f"timm:{name}") from error
    architecture = name.partition(".")[0]  # what follows the dot names a set of weights
    if not timm.is_model(architecture):
        raise UsageError(f"timm has no model {name!r}.", remedy=nearest(architecture, timm.list_models()))
    try:
        with seeded():
            return timm.create_model(name, pretrained=False, **settings).eval()
    except (
        TypeError,
        ValueError,
        RuntimeError,
        AssertionError,
        KeyError,
    ) as error:  # whatever the architecture's own code raises
        what = f"timm cannot build {name!r} with {dict(settings)}: {error}"
        raise UsageError(what, remedy="Check the options after the question mark.") from error
