"""``compressed:FOLDER``: a model saved by layerwise. It is built from its own source, and its steps are replayed."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from layerwise.errors import UsageError
from layerwise.packing import stand_in
from layerwise.saved import load_saved, rebuilt
from layerwise.source import SOURCES, ModelSource, Opened, Source


@SOURCES.register("compressed")
class CompressedSource(ModelSource):
    """What `layerwise.saved.save_model` wrote; the source of a compressed model holds that of the uncompressed one."""

    def open(self, name: str, *, weights: str | Path | None) -> Opened:
        if weights is not None:
            raise UsageError("A saved folder brings its own weights.", place=name, remedy="Leave the weights out.")
        model = load_saved(name)
        source = model.source
        assert source is not None  # load_saved refuses a folder without
        return Opened(model.module, source, Path(name))

    def build(self, source: Source) -> nn.Module:
        example = source.settings["example"]
        return rebuilt(source, example=stand_in(example) if example else None).module
