"""What is remembered of the tokens before: per layer one vector each (the vein's coordinates), in a buffer that grows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

SPARE = 64  # tokens of room beyond a quarter of what is held


@runtime_checkable
class Caching(Protocol):
    """A block that remembers tokens; what stands in the place of a dropped one does not."""

    def new_cache(self) -> VeinCache: ...


class VeinCache:
    """One layer's tokens, (B, kept, width): r numbers each with ``scope="latent"``, for all heads, keys and values together.

    `window` > 0 keeps only the last so many. `length` counts all tokens ever seen, `kept` those still there. Holds no gradients.
    """

    def __init__(self, window: int = 0, capacity: int = 0) -> None:
        self.window, self.capacity = window, capacity
        self.length = self.start = self.stop = 0
        self._buffer: Tensor | None = None
        self._made: dict[str, Tensor] = {}

    @property
    def kept(self) -> int:
        return self.stop - self.start

    @property
    def tokens(self) -> Tensor | None:
        """(B, kept, width), a view; None before the first."""
        return None if self._buffer is None else self._buffer[:, self.start : self.stop]

    @property
    def floats(self) -> int:
        """How many numbers are held; the buffer may have room for more."""
        return 0 if self.tokens is None else self.tokens.numel()

    def append(self, new: Tensor) -> Tensor:
        """Adds (B, T, width) and gives all that the new tokens may see; what falls out of the window is let go afterwards."""
        new = new.detach()
        if self._buffer is None or self.stop + new.shape[1] > self._buffer.shape[1]:
            self._grow(new)
        assert self._buffer is not None  # _grow made it
        self._buffer[:, self.stop : self.stop + new.shape[1]] = new
        self.stop += new.shape[1]
        self.length += new.shape[1]
        seen = self._buffer[:, self.start : self.stop]
        if self.window:
            self.start = max(self.start, self.stop - self.window)
        return seen

    def _grow(self, new: Tensor) -> None:
        old = self.tokens
        need = self.kept + new.shape[1]
        size = max(need + need // 4 + SPARE if self._buffer is not None else need, self.capacity)
        buffer = new.new_empty(new.shape[0], size, new.shape[2])
        if old is not None:
            buffer[:, : self.kept] = old
        self._buffer, self.start, self.stop = buffer, 0, self.kept

    def once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What depends on the weights alone, made at the first token: they do not change while a cache is in use."""
        if name not in self._made:
            self._made[name] = make().detach()
        return self._made[name]

    def reorder_(self, order: Tensor) -> None:
        """Row i becomes what row ``order[i]`` was: for beams."""
        if self._buffer is not None:
            self._buffer = self._buffer.index_select(0, order)


@dataclass
class VFTCache:
    """A model's: one cache per layer (None for a dropped one), how many tokens were seen, and which of them count.

    `keep` is (B, length), None where all count.
    """

    layers: list[VeinCache | None]
    length: int = 0
    keep: Tensor | None = None

    @property
    def floats(self) -> int:
        """Numbers held by all layers."""
        return sum(layer.floats for layer in self.layers if layer is not None)

    def see(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """Counts the new tokens x (B, T, d), adds their mask, and gives that of all."""
        before, self.length = self.length, self.length + x.shape[1]
        if self.keep is None and mask is None:
            return None
        old = self.keep if self.keep is not None else torch.ones(len(x), before, dtype=torch.bool, device=x.device)
        new = mask.bool() if mask is not None else torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        self.keep = torch.cat((old, new), 1)
        return self.keep

    def reorder_(self, order: Tensor) -> None:
        """Row i of every layer becomes what row ``order[i]`` was."""
        for layer in (x for x in self.layers if x is not None):
            layer.reorder_(order)
        if self.keep is not None:
            self.keep = self.keep.index_select(0, order)


__all__ = ["Caching", "VFTCache", "VeinCache"]
