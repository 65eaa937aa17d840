"""An encoder with a fitted linear head: built again from the encoder's own source."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from layerwise.errors import UsageError
from layerwise.heads import EncoderWithHead
from layerwise.source import SOURCES, ModelSource, Opened, Source, build
from layerwise.sources._parts import seeded


@SOURCES.register("head")
class HeadSource(ModelSource):
    """Comes from `layerwise.heads.fit_head`; it has no spec of its own."""

    def open(self, name: str, *, weights: str | Path | None) -> Opened:
        raise UsageError("A head is fitted, not opened.", remedy="Use load(encoder, head=data), or the folder it was saved to.")

    def build(self, source: Source) -> nn.Module:
        encoder = build(Source.from_dict(source.settings["encoder"]))
        with seeded():
            return EncoderWithHead(encoder, source.settings["width"], source.settings["classes"]).eval()
