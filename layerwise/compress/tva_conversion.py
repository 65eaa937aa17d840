"""Attention with fewer numbers per head, and feed-forward matrices in two, fitted on activations (`layerwise.native.convert`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from layerwise.errors import UsageError
from layerwise.factors import TwoFactors, why_whole
from layerwise.method import METHODS, Check, CompressionMethod, exactly
from layerwise.model import UniversalModel
from layerwise.native.convert import Conversion, Wish, convert_, fitted, reshaped_
from layerwise.native.dense import NARROWED, Dense, dense_attention
from layerwise.native.projected import Kept, converted, kept_by, lost_beyond, projected, projected_matrix, uneven
from layerwise.structure import Layer
from layerwise.supplies import NOTHING, Supplies
from layerwise.swapping import swapped
from layerwise.tensors import state

EXACT = 1e-4  # the directions are read off float32 weights by least squares


@METHODS.register("tva_conversion")
@dataclass(frozen=True)
class TVAConversion(CompressionMethod):
    """Dense attention in TVA form, its key-value cache smaller by the same share; with `feed_forward` its block's other matrices
    too. `rank`: numbers per head; without it the fewest with the share `energy` in every head, on the first `samples`
    calibration samples. `heads` and `matrices` (instead): ranks by dotted path, which `fitted` sets.
    """

    rank: int | None = None
    energy: float = 0.95
    feed_forward: bool = True
    heads: Mapping[str, int] = field(default_factory=dict, hash=False)
    matrices: Mapping[str, int] = field(default_factory=dict, hash=False)
    samples: int = 512
    name: ClassVar[str] = "tva_conversion"
    shrinks: ClassVar[frozenset[str]] = frozenset({"params", "size", "macs"})
    structural: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})

    def __post_init__(self) -> None:
        if not 0 < self.energy <= 1 or self.samples < 1 or (self.rank is not None and self.rank < 1):
            raise UsageError("tva_conversion: energy must lie above 0 and at most at 1, samples and rank be at least 1.")

    @classmethod
    def variants(cls) -> tuple[CompressionMethod, ...]:
        return cls(energy=0.9), cls(energy=0.99)

    def treats(self, layer: Layer) -> str:
        modules = dict(layer.module.named_modules())
        if any(NARROWED in vars(m) or isinstance(m, TwoFactors) for m in modules.values()):
            return "its heads or matrices are in subspaces already"
        found = [dense_attention(layer.module, name, m) for name, m in modules.items()]
        known = [a for a in found if isinstance(a, Dense)]
        if not known:
            return next((f"its attention stays: {a}" for a in found if isinstance(a, str)), "holds no attention of a known form")
        return next((f"its attention {why}" for a in known for p in a.reads if (why := why_whole(p.module))), "")

    def fitted(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies) -> TVAConversion:
        if self.heads or self.matrices:
            return self
        trial = model.clone()
        sizes = {path: a.size for path, a in _attentions(model, layers).items()}
        found = self._convert(trial, layers, supplies)
        heads = {path: rank for path, rank in found.heads.items() if rank < sizes[path]}
        if not heads and not found.matrices:
            raise UsageError("tva_conversion: nothing would shrink.", place=", ".join(layers[:3]), remedy="Ask for less energy.")
        return replace(self, heads=heads, matrices=dict(found.matrices))

    def apply_(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies = NOTHING) -> None:
        self.fitted(model, layers, supplies)._convert(model, layers, supplies)

    def _convert(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies) -> Conversion:
        assert supplies.calibration is not None  # what it needs
        wish = Wish(self.rank, self.energy, self.feed_forward, heads=self.heads, matrices=self.matrices)
        return convert_(model, [model.layer(n) for n in layers], supplies.calibration.head(self.samples), wish)

    def reshape_(self, model: UniversalModel, layers: Sequence[str]) -> None:
        reshaped_(model.module, self.heads, self.matrices)

    def masked_like(self, model: UniversalModel, cut: UniversalModel, layers: Sequence[str]) -> AbstractContextManager[None]:
        """The dense model with queries, values and what the other matrices read or give projected onto what was kept."""
        values = list[tuple[Tensor, Tensor]]()
        for _, attention, kept in self._kept(model, cut):
            values += projected(attention, kept, model.module)
        for name, factors in self._factors(cut):
            values += projected_matrix(model.module.get_submodule(name), factors)
        return swapped(values)

    def check(self, before: UniversalModel, after: UniversalModel, layers: Sequence[str]) -> Check:
        """All that was not converted is as it was; what was lies in orthonormal directions, as many as the plan says."""
        old = state(before.module)
        attentions = _attentions(before, layers, self.heads)
        gone = {f"{n}." for a in attentions.values() for n in (*a.names, a.out_name)} | {f"{n}." for n in self.matrices}
        biases: dict[str, Any] = {f"{a.out_name}.bias": converted(after.module, a, a.out_name).bias for a in attentions.values()}
        biases |= {f"{name}.bias": factors.bias for name, factors in self._factors(after)}
        inner = tuple(f"{path}.inner." for path in attentions)
        new = {n.replace(".inner.", ".", 1) if n.startswith(inner) else n: t for n, t in state(after.module).items()}
        picked = {f"{path}.columns" for path in attentions}
        kept = {n: t for n, t in old.items() if not n.startswith(tuple(gone))} | {n: old[n] for n in biases if n in old}
        found = {n: t for n, t in new.items() if not n.startswith(tuple(gone)) and n not in picked}
        check = exactly(kept, found | {n: b for n, b in biases.items() if b is not None}, "those of the dense model")
        if not check.passed:
            return check
        fits = [(kept.off, path) for path, _, kept in self._kept(before, after)]
        fits += [(min(uneven(f.first.weight.T), uneven(f.second.weight)), n) for n, f in self._factors(after)]
        off, place = max(fits)
        return check if off <= EXACT else Check(off, EXACT, "weights that do not lie in orthonormal directions", place)

    def check_on(self, before: UniversalModel, after: UniversalModel, layers: Sequence[str], supplies: Supplies) -> Check:
        """And no other directions of these ranks would lose less of the heads' calibration energy."""
        check = self.check(before, after, layers)
        if not check.passed or supplies.calibration is None or not self.heads:
            return check
        best = fitted(before, _attentions(before, layers, self.heads), supplies.calibration.head(self.samples))
        excess = [
            (max(lost_beyond(best[path].scores, kept.scores), lost_beyond(best[path].content, kept.content)), path)
            for path, _, kept in self._kept(before, after)
        ]
        worst, place = max(excess)
        return Check(worst, EXACT, "of a head's energy lost beyond the least that this rank can lose", place)

    def _kept(self, before: UniversalModel, after: UniversalModel) -> Iterator[tuple[str, Dense, Kept]]:
        for path, rank in self.heads.items():
            attention = _attention(before, path)
            yield path, attention, kept_by(attention, before.module, after.module, rank)

    def _factors(self, model: UniversalModel) -> Iterator[tuple[str, TwoFactors]]:
        """Raises `UsageError` where the converted model holds no two factors of the rank in the plan."""
        for name, rank in self.matrices.items():
            module: Any = model.module.get_submodule(name)
            if not isinstance(module, TwoFactors) or module.rank != rank:
                raise UsageError(f"{name} is a {type(module).__name__} and not in two factors of rank {rank}.")
            yield name, module


def _attention(model: UniversalModel, path: str) -> Dense:
    found = dense_attention(model.module, path, model.module.get_submodule(path))
    if not isinstance(found, Dense):
        raise UsageError(f"tva_conversion: {path} is no attention of a known form.")
    return found


def _attentions(model: UniversalModel, layers: Sequence[str], wanted: Mapping[str, int] | None = None) -> dict[str, Dense]:
    """Path → each attention in `layers`, or those that are wanted."""
    paths = [
        f"{name}.{inner}" if inner else name for name in layers for inner, _ in model.module.get_submodule(name).named_modules()
    ]
    found = {path: dense_attention(model.module, path, model.module.get_submodule(path)) for path in paths}
    return {p: a for p, a in found.items() if isinstance(a, Dense) and (wanted is None or p in wanted)}
