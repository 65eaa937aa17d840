"""`VFTSettings`: a whole model as plain data, from which it is built again in another process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from layerwise.errors import UsageError, nearest
from layerwise.native.attention import AttentionOptions
from layerwise.native.block import BlockOptions

POSITIONS = ("learned", "rope", "none")


@dataclass(frozen=True)
class VFTSettings:
    """What a `VFTModel` is made of. Inputs are those with a size: `vocab_size` (tokens), `image` (channels, height, width, patch
    side), `frame` (numbers per audio frame); several make a multimodal model.

    `classes` > 0: logits (B, classes). Else, `causal` with a vocabulary: next-token logits (B, T, vocabulary) through the
    transposed embedding. Else hidden states (B, T, d). `rope_base`, `kv_heads`, `window`, `hidden` (0: 2·rank), `normals`, …: see
    `AttentionOptions` and `BlockOptions`. Raises `UsageError` for values that make no model.
    """

    d_model: int = 768
    n_layers: int = 12
    n_heads: int = 12
    rank: int = 64
    hidden: int = 0
    scope: str = "latent"
    head_rank: int = 0
    kv_heads: int = 0
    causal: bool = False
    positions: str = "learned"
    max_positions: int = 1024
    rope_base: float = 10_000.0
    window: int = 0
    vocab_size: int = 0
    image: tuple[int, ...] = ()
    frame: int = 0
    classes: int = 0
    act: str = "silu"
    stabilizer: str | None = None
    normals: int = 1
    threshold: float = 0.18
    fraction: float | None = None
    tied: bool = False
    orthogonal: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "image", tuple(int(n) for n in self.image))
        if self.positions not in POSITIONS:
            raise UsageError(f"Unknown positions {self.positions!r}.", remedy=nearest(self.positions, POSITIONS))
        if not (self.vocab_size or self.image or self.frame):
            raise UsageError(
                "The model reads nothing.", remedy="Give vocab_size, image=(channels, height, width, patch) or frame."
            )
        if self.image and (len(self.image) != 4 or self.image[1] % self.image[3] or self.image[2] % self.image[3]):
            what = f"image is {self.image}, not (channels, height, width, patch) with sides that the patch divides."
            raise UsageError(what, code="LW-C09")
        if self.causal and self.fraction is not None:
            raise UsageError("A causal model must not choose a share of the sequence's tokens.", remedy="Leave fraction out.")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> VFTSettings:
        """From plain data. Raises `UsageError` with the nearest name for a setting that there is not."""
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise UsageError(f"VFTModel has no setting {name!r}.", remedy=nearest(name, known))
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `of` is the inverse."""
        return asdict(self) | {"image": list(self.image)}

    def block(self) -> BlockOptions:
        """What each block is made with."""
        rope = self.rope_base if self.positions == "rope" else None
        attention = AttentionOptions(kv_heads=self.kv_heads, rope_base=rope, window=self.window)
        names = ("scope", "head_rank", "hidden", "act", "stabilizer", "normals", "threshold", "fraction", "tied", "orthogonal")
        return BlockOptions(attention=attention, dropout=self.dropout, **{name: getattr(self, name) for name in names})

    @property
    def patches(self) -> int:
        """How many tokens an image becomes."""
        return (self.image[1] // self.image[3]) * (self.image[2] // self.image[3]) if self.image else 0

    @property
    def modalities(self) -> tuple[str, ...]:
        """What it reads, in the order in which the tokens stand."""
        sizes = {"vision": self.image, "audio": self.frame, "text": self.vocab_size}
        return tuple(name for name, size in sizes.items() if size)


__all__ = ["POSITIONS", "VFTSettings"]
