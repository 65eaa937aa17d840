"""The Vein-Flow Transformer: a native architecture whose blocks compute in a low-dimensional subspace. Plain torch.

See docs/vft.md for the mathematics and for what was measured.
"""

from __future__ import annotations

from layerwise.native.attention import AttentionOptions, TVAAttention
from layerwise.native.block import BlockOptions, VeinStatistics, VFTBlock
from layerwise.native.cache import VeinCache, VFTCache
from layerwise.native.compensation import NormalCompensator, adapt_threshold_
from layerwise.native.convert import Conversion, convert_to_tva
from layerwise.native.feedforward import VFTFeedForward
from layerwise.native.model import VFTModel
from layerwise.native.projector import VeinProjector
from layerwise.native.settings import VFTSettings

__all__ = [
    "AttentionOptions",
    "BlockOptions",
    "Conversion",
    "NormalCompensator",
    "TVAAttention",
    "VFTBlock",
    "VFTCache",
    "VFTFeedForward",
    "VFTModel",
    "VFTSettings",
    "VeinCache",
    "VeinProjector",
    "VeinStatistics",
    "adapt_threshold_",
    "convert_to_tva",
]
