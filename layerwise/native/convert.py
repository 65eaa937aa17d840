"""`convert_to_tva`: a pretrained dense transformer's attention and feed-forward in subspaces fitted on its activations.

Attention becomes that of ``TVAAttention(scope="head")`` with the projectors multiplied into the dense matrices: heads of r
instead of d_h numbers, the scale still 1/√d_h, and a cache of r per key and value. The library's own module stays and is told its
new head size, so masks, caches and kernels work as before. The feed-forward's first matrices read, and its last one writes, r
directions.

Where queries and keys are turned by their position, only whole pairs of features can go: a subspace that mixes pairs would have
to be taken after the turn, and relative position would be lost below full rank. So there the pairs with the most energy are kept,
which commutes with the turn at every rank; values have no position and get their principal directions. What stands between
projection and attention (a normalization of queries and keys, a gate) forbids the conversion of that module, and a note says so.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.data import Data
from layerwise.errors import UsageError
from layerwise.factors import in_two, matrix, replace_, two_factors, unfolded_matrix
from layerwise.model import UniversalModel
from layerwise.native.dense import Dense, Subspaces, dense_attention, narrowed
from layerwise.native.gram import fewest, gathered
from layerwise.structure import Layer

LEAST, MOST = 0.5, 2.0  # a layer's rank by its score, as multiples of the rank asked for


@dataclass(frozen=True)
class Conversion:
    """The converted `module`; for each converted attention and matrix its rank; and in words what was left as it was, and why."""

    module: nn.Module
    heads: Mapping[str, int]
    matrices: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def convert_to_tva(
    model: UniversalModel | nn.Module,
    data: Any,
    rank: int | None = None,
    *,
    energy: float = 0.99,
    scores: Mapping[str, float] | None = None,
    feed_forward: bool = True,
) -> Conversion:
    """A converted copy of `model`; the original is left alone. Exact, up to rounding, at full rank (``rank`` = d_h).

    `rank`: numbers per head; without it, per layer the fewest that keep the share `energy` of the squared activations in every
    head. `scores` (block → importance, such as a report's) give important blocks more: `rank` times score / mean, between half
    and double; of the energy that may be lost likewise less. The feed-forward's ranks are the same share of the width; what
    would not shrink stays dense. Raises `UsageError` for settings outside, and where nothing can be converted.
    """
    if (rank is not None and rank < 1) or not 0 < energy <= 1:
        raise UsageError(f"rank = {rank} and energy = {energy} must be at least 1 and in (0, 1].", code="LW-C09")
    original = model if isinstance(model, UniversalModel) else UniversalModel(model)
    batches = Data.of(data)
    original.see(batches[0])
    original.blocks  # noqa: B018  # the copy takes them over, and keeps them when its weights change shape
    new = original.changed(copy.deepcopy(original.module), source=None)
    found = convert_(new, new.blocks, batches, Wish(rank, energy, feed_forward, _shares(new.blocks, scores)))
    if not found.heads:
        raise UsageError(f"No attention of {original.name} can be converted. {' '.join(found.notes)}", remedy="See docs/vft.md.")
    found.module.eval()
    return found


@dataclass(frozen=True)
class Wish:
    """How many numbers per head: `rank`, or the fewest with the share `energy`, by block times or by ``shares[block]``.

    `heads` and `matrices` (instead): the ranks by dotted path; what they do not name stays as it is.
    """

    rank: int | None
    energy: float
    feed_forward: bool = True
    shares: Mapping[str, float] = field(default_factory=dict)
    heads: Mapping[str, int] = field(default_factory=dict)
    matrices: Mapping[str, int] = field(default_factory=dict)

    @property
    def fixed(self) -> bool:
        return bool(self.heads or self.matrices)

    def rank_in(self, block: Layer) -> int | None:
        return None if self.rank is None else max(1, round(self.rank * self.shares.get(block.name, 1.0)))

    def energy_in(self, block: Layer) -> float:
        return 1 - (1 - self.energy) / self.shares.get(block.name, 1.0)


def convert_(model: UniversalModel, blocks: Sequence[Layer], batches: Data, wish: Wish) -> Conversion:
    """Converts the `blocks` of `model` in place."""
    work = _Work(model, blocks, wish)
    work.attention(batches)
    if wish.matrices or (wish.feed_forward and not wish.fixed):
        work.feed_forward(batches)
    return Conversion(model.module, work.heads, work.matrices, tuple(work.notes))


@torch.no_grad()
def reshaped_(root: nn.Module, heads: Mapping[str, int], matrices: Mapping[str, int]) -> None:
    """What a conversion to these ranks does to the structure, with weights of no matter."""
    for path, r in heads.items():
        attention = dense_attention(root, path, root.get_submodule(path))
        if not isinstance(attention, Dense):
            raise UsageError(f"{path} is no attention that can be narrowed.")
        narrowed(root, attention, attention.unfitted(), r)
    for name, r in matrices.items():
        module = root.get_submodule(name)
        like = unfolded_matrix(module).detach()
        outputs, inputs = like.shape
        replace_(root, module, two_factors(module, like.new_zeros(r, inputs), like.new_zeros(outputs, r)))


class _Work:
    """The model, changed in place, and what was done to it."""

    def __init__(self, model: UniversalModel, blocks: Sequence[Layer], wish: Wish) -> None:
        self.model, self.wish = model, wish
        self.heads: dict[str, int] = {}
        self.matrices: dict[str, int] = {}
        self.notes: list[str] = []
        self.attentions: dict[str, tuple[Layer, Dense]] = {}
        for block in blocks:
            for name, module in block.module.named_modules():
                path = f"{block.name}.{name}" if name else block.name
                found = dense_attention(model.module, path, module)
                if isinstance(found, str):
                    self.notes.append(f"{path} stays as it is: {found}.")
                elif found is not None:
                    self.attentions[path] = (block, found)

    def attention(self, batches: Data) -> None:
        """Fits, and narrows every attention. All are fitted before the first is changed: they see the original's activations."""
        fits = fitted(self.model, {path: a for path, (_, a) in self.attentions.items()}, batches)
        for path, (block, attention) in self.attentions.items():
            if self.wish.fixed and path not in self.wish.heads:
                continue
            fit = fits[path]
            r = self.wish.heads.get(path) or fit.rank(self.wish.rank_in(block), self.wish.energy_in(block))
            narrowed(self.model.module, attention, fit, r)
            self.heads[path] = r

    def feed_forward(self, batches: Data) -> None:
        """The matrices of converted blocks that read or write the stream's width, attention's own apart."""
        blocks = {block.name: block for block, _ in self.attentions.values()}
        own = [*self.attentions, *(a.out_name for _, a in self.attentions.values())]
        found = {
            f"{block.name}.{name}": (block, module)
            for block in blocks.values()
            for name, module in block.module.named_modules()
            if matrix(module) is not None and not _inside(f"{block.name}.{name}", own)
        }
        if self.wish.fixed:
            found = {name: pair for name, pair in found.items() if name in self.wish.matrices}
        reads = {n: m for n, (b, m) in found.items() if m_in(m) == b.shape[-1] < m_out(m)}
        writes = {n: m for n, (b, m) in found.items() if m_out(m) == b.shape[-1] < m_in(m)}
        grams = gathered(self.model, batches, outputs=writes, inputs=reads)
        for name in (*reads, *writes):
            block, module = found[name]
            self._factor(name, module, grams[name][0], block, reading=name in reads)

    def _factor(self, name: str, module: nn.Module, gram: Tensor, block: Layer, *, reading: bool) -> None:
        values, vectors = torch.linalg.eigh(gram)
        width = len(values)
        size = next(a for b, a in self.attentions.values() if b is block).size
        wanted = self.wish.rank_in(block)
        r = min(width, round(width * wanted / size)) if wanted else fewest(values.flip(0), self.wish.energy_in(block))
        r = self.wish.matrices.get(name, r)
        if r * (m_in(module) + m_out(module)) >= m_in(module) * m_out(module):
            self.notes.append(f"{name} stays dense: {r} directions would not make it smaller.")
            return
        replace_(self.model.module, module, in_two(module, vectors.flip(1)[:, :r].T, reading=reading))
        self.matrices[name] = r


def fitted(model: UniversalModel, attentions: Mapping[str, Dense], batches: Data) -> dict[str, Subspaces]:
    """Path → the subspaces of each attention on `batches`."""
    wanted = {part.name: part.module for a in attentions.values() for part in a.reads}
    sizes = {name: a.size for a in attentions.values() for name in a.names}
    grams = gathered(model, batches, outputs=wanted, sizes=sizes)
    return {path: a.fitted(grams) for path, a in attentions.items()}


def _inside(name: str, paths: list[str]) -> bool:
    return any(name == path or name.startswith(f"{path}.") for path in paths)


def _shares(blocks: list[Layer], scores: Mapping[str, float] | None) -> dict[str, float]:
    """Block → its score over the mean, between `LEAST` and `MOST`; 1 for all without scores."""
    if scores is None:
        return {b.name: 1.0 for b in blocks}
    missing = [b.name for b in blocks if b.name not in scores]
    if missing:
        raise UsageError(f"There is no score for the block {missing[0]}.", remedy="Give a score for every block, or none.")
    mean = sum(max(scores[b.name], 0.0) for b in blocks) / len(blocks) or 1.0
    return {b.name: min(max(max(scores[b.name], 0.0) / mean, LEAST), MOST) for b in blocks}


def m_in(module: nn.Module) -> int:
    """Inputs of a matrix module."""
    return int(matrix(module).shape[1])  # type: ignore[union-attr]  # asked for matrices only


def m_out(module: nn.Module) -> int:
    """Outputs of a matrix module."""
    return int(matrix(module).shape[0])  # type: ignore[union-attr]


__all__ = ["Conversion", "Wish", "convert_", "convert_to_tva", "fitted", "reshaped_"]
