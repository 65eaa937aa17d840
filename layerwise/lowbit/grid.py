"""`Grid`: the values that a weight of a few bits can take, and the codes that name them. Plain functions of matrices.

Decision: the rows of a matrix are outputs, so a group is a run of inputs of one output. Codes are counted from 0; a group's value
is ``(code − zero) · scale``. Scales are rounded up to float16, so that the range is still covered and the step is what is stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.errors import UsageError

FINEST_HALF = 2.0**-14  # below, float16 loses digits
LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class Levels:
    """`scale` (rows, groups), float16 or where that is too coarse float32, and `zero` (rows, groups), uint8."""

    scale: Tensor
    zero: Tensor

    def columns(self, size: int, columns: int) -> tuple[Tensor, Tensor]:
        """Scale and zero of each element, (rows, columns), as the values are computed with: float32."""
        scale, zero = self.scale.float(), self.zero.float()
        return tuple(x.repeat_interleave(size, 1)[:, :columns] for x in (scale, zero))  # type: ignore[return-value]  # two


@dataclass(frozen=True)
class Grid:
    """`bits` per weight (2 … 8), one scale per `group` inputs of an output (0: all of them; the last group may be shorter).

    `symmetric` about zero, or from the smallest to the largest weight of the group, zero always among the values.
    """

    bits: int = 4
    group: int = 32
    symmetric: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise UsageError(f"bits is {self.bits!r}; it is a whole number from 2 to 8.")
        if isinstance(self.group, bool) or not isinstance(self.group, int) or self.group < 0:
            raise UsageError(f"group is {self.group!r}; it is a number of inputs, or 0 for all inputs of an output.")

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def size(self, columns: int) -> int:
        """How many inputs share a scale."""
        return min(self.group or columns, columns)

    def groups(self, columns: int) -> int:
        return -(-columns // self.size(columns))

    def levels(self, matrix: Tensor) -> Levels:
        """The levels that just cover each group of `matrix` (rows, columns)."""
        padded = self._grouped(matrix.detach().float())
        low, high = padded.amin(-1).clamp_max(0), padded.amax(-1).clamp_min(0)
        if self.symmetric:
            return Levels(stored(torch.maximum(-low, high) / (self.top / 2)), torch.full_like(low, 2 ** (self.bits - 1)).byte())
        scale = stored((high - low) / self.top)
        return Levels(scale, (-low / scale.float()).round().clamp(0, self.top).byte())

    def codes(self, matrix: Tensor, levels: Levels) -> Tensor:
        """The code of the level nearest to each element, (rows, columns) uint8."""
        scale, zero = levels.columns(self.size(matrix.shape[1]), matrix.shape[1])
        return (matrix.detach().float() / scale).round_().add_(zero).clamp_(0, self.top).byte()

    def values(self, codes: Tensor, levels: Levels) -> Tensor:
        """What the codes stand for, float32."""
        padded = self._grouped(codes).float()
        values = (padded - levels.zero.float()[..., None]) * levels.scale.float()[..., None]
        return values.flatten(1)[:, : codes.shape[1]]

    def stored_bytes(self, rows: int, columns: int) -> int:
        """Codes, scales and zeros as they lie in the file, scales in float16."""
        groups = self.groups(columns)
        zeros = 0 if self.symmetric else packed_width(groups, self.bits)
        return rows * (packed_width(columns, self.bits) + 2 * groups + zeros)

    def _grouped(self, matrix: Tensor) -> Tensor:
        """(rows, groups, size), the last group filled up with zeros, which no range notices."""
        rows, columns = matrix.shape
        size = self.size(columns)
        return F.pad(matrix, (0, -columns % size)).view(rows, -1, size)


def stored(scale: Tensor) -> Tensor:
    """`scale` rounded up to float16, or in float32 where float16 has no such numbers; 1 for a group of zeros."""
    scale = torch.where(scale > 0, scale, 1.0)
    if float(scale.min()) < FINEST_HALF or float(scale.max()) > LARGEST_HALF / 2:
        return scale
    return (scale * (1 + 2.0**-10)).half()


def packed_width(columns: int, bits: int) -> int:
    """Bytes per row of `columns` codes."""
    return sum(-(-columns * part // 8) for part in parts(bits))


def parts(bits: int) -> list[int]:
    """`bits` as powers of two, so that each part of a code fits evenly into bytes: 3 = 2 + 1."""
    return [part for part in (8, 4, 2, 1) if bits & part]


def pack(codes: Tensor, bits: int) -> Tensor:
    """`codes` (rows, columns) uint8 below ``2**bits`` as (rows, `packed_width`) bytes, the first code in the lowest bits."""
    found, shift = [], 0
    for part in parts(bits):
        piece = (codes >> shift) & (2**part - 1)
        piece = F.pad(piece, (0, -piece.shape[1] % (8 // part))).view(len(codes), -1, 8 // part)
        found.append((piece << _shifts(part, codes.device)).sum(-1, dtype=torch.uint8))
        shift += part
    return torch.cat(found, 1)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`."""
    codes, start, shift = None, 0, 0
    for part in parts(bits):
        width = -(-columns * part // 8)
        piece = (packed[:, start : start + width, None] >> _shifts(part, packed.device)) & (2**part - 1)
        piece = piece.flatten(1)[:, :columns]
        codes = piece if codes is None else codes | (piece << shift)
        start, shift = start + width, shift + part
    assert codes is not None  # every number of bits has parts
    return codes


def _shifts(part: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, part, dtype=torch.uint8, device=device)
