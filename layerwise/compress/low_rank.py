"""Each matrix as the product of two thin ones that keep most of what it gives (SVD; with calibration data SVD-LLM, Wang 2024)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layerwise.errors import UsageError, nearest
from layerwise.factors import TwoFactors, factorable, in_two, replace_, two_factors, unfolded_matrix, why_whole
from layerwise.method import METHODS, Check, CompressionMethod, exactly
from layerwise.model import UniversalModel
from layerwise.native.gram import fewest
from layerwise.structure import Layer
from layerwise.subspaces import Spectrum, spectra
from layerwise.supplies import NOTHING, Supplies
from layerwise.swapping import swapped
from layerwise.tensors import state

EXACT = 1e-5  # float32 leaves 1e-7 in what should be orthonormal or equal


@METHODS.register("low_rank")
@dataclass(frozen=True)
class LowRank(CompressionMethod):
    """Every `nn.Linear`, ``Conv1D`` and ungrouped `nn.Conv2d` in the layers that shrinks by it, under its name (`TwoFactors`).

    `ratio`: the share of its parameters that each matrix may keep. `energy` (instead): the least rank that keeps this share of
    the squared outputs. `ranks` (instead): by dotted path; the others stay. `aware`: energy is that of the outputs on the first
    `samples` calibration samples; otherwise, and where there are none, that of the weights. `fitted` sets `ranks` and `aware`.
    """

    ratio: float = 0.5
    energy: float | None = None
    ranks: Mapping[str, int] = field(default_factory=dict, hash=False)
    aware: bool = True
    samples: int = 512
    name: ClassVar[str] = "low_rank"
    shrinks: ClassVar[frozenset[str]] = frozenset({"params", "size", "macs"})
    structural: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for what, value in (("ratio", self.ratio), ("energy", self.energy)):
            if value is not None and not 0 < value <= 1:
                raise UsageError(f"low_rank: {what} is {value!r}, and must lie above 0 and at most at 1.")
        if self.samples < 1 or any(rank < 1 for rank in self.ranks.values()):
            raise UsageError("low_rank: samples and every rank must be at least 1.")

    @classmethod
    def variants(cls) -> tuple[CompressionMethod, ...]:
        return tuple(cls(ratio) for ratio in (0.5, 0.75, 0.25))

    def treats(self, layer: Layer) -> str:
        if any(isinstance(m, TwoFactors) for m in layer.module.modules()):
            return "its matrices are in two factors already"
        if any(shrinks(m, self._ceiling(m)) for m in factorable(layer.module).values()):
            return ""
        reasons = sorted({f"{type(m).__name__} {why_whole(m)}" for m in _weighty(layer.module) if why_whole(m)})
        return f"holds no matrix that would shrink: {'; '.join(reasons) or 'rank 1 is as large'}"

    def remarks(self, layer: Layer) -> tuple[str, ...]:
        paths = {id(m): _joined(layer.name, n) for n, m in layer.module.named_modules()}
        chosen = {id(m) for n, m in factorable(layer.module).items() if self._goes(_joined(layer.name, n), m)}
        left = [f"{paths[id(m)]} ({_why(m)})" for m in _weighty(layer.module) if id(m) not in chosen]
        return (f"low_rank leaves {', '.join(left)} whole",) if left else ()

    def fitted(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies) -> LowRank:
        found = _found(model, layers)
        aware = self.aware and supplies.calibration is not None
        if unknown := self.ranks.keys() - found.keys():
            name = min(unknown)
            raise UsageError(f"low_rank: there is no matrix {name!r} to take apart.", remedy=nearest(name, found))
        ranks = dict(self.ranks) or self._ranks(model, found, supplies if aware else NOTHING)
        ranks = {name: rank for name, rank in ranks.items() if shrinks(found[name], rank)}
        if not ranks:
            raise UsageError("low_rank: no matrix would shrink.", place=", ".join(layers[:3]), remedy="Ask for less energy.")
        return replace(self, ranks=ranks, aware=aware)

    def apply_(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies = NOTHING) -> None:
        method = self if self.ranks else self.fitted(model, layers, supplies)
        found = {name: m for name, m in _found(model, layers).items() if name in method.ranks}
        for name, spectrum in method._spectra(model, found, supplies).items():
            directions = spectrum.vectors[:, : method.ranks[name]].T
            replace_(model.module, found[name], in_two(found[name], directions, reading=False))

    def reshape_(self, model: UniversalModel, layers: Sequence[str]) -> None:
        for name, rank in self.ranks.items():
            module = model.module.get_submodule(name)
            outputs, inputs = unfolded_matrix(module).shape
            like = unfolded_matrix(module).detach()
            replace_(model.module, module, two_factors(module, like.new_zeros(rank, inputs), like.new_zeros(outputs, rank)))

    def masked_like(self, model: UniversalModel, cut: UniversalModel, layers: Sequence[str]) -> AbstractContextManager[None]:
        """The uncut model with each weight W as UUᵀW in float64; of the cut one only U is taken."""
        values = list[tuple[Tensor, Tensor]]()
        for name, factors in _factors(cut, self.ranks):
            module: Any = model.module.get_submodule(name)
            W, U = (t.detach().double() for t in (unfolded_matrix(module), factors.second.weight.flatten(1)))
            product = U @ (U.T @ W)
            shaped = product.view(module.weight.shape) if isinstance(module, nn.Conv2d) else product
            transposed = type(module).__name__ == "Conv1D"
            values.append((module.weight, (shaped.T.contiguous() if transposed else shaped).to(module.weight)))
        return swapped(values)

    def check(self, before: UniversalModel, after: UniversalModel, layers: Sequence[str]) -> Check:
        """Biases and all other tensors are as they were; the directions are orthonormal, and as many as the plan says."""
        old, new = state(before.module), state(after.module)
        gone = [f"{name}." for name, _ in _every(before.module, self.ranks)]
        biases = [(f"{name}bias", f"{name}1.bias") for name in gone if f"{name}bias" in old]
        kept = {n: t for n, t in old.items() if not n.startswith(tuple(gone))}
        found = {n: t for n, t in new.items() if not n.startswith(tuple(gone))}
        check = exactly(
            kept | {a: old[a] for a, _ in biases},
            found | {a: new[b] for a, b in biases if b in new},
            "those of the uncut model",
        )
        return check if not check.passed else _orthonormal(after, self.ranks) or check

    def check_on(self, before: UniversalModel, after: UniversalModel, layers: Sequence[str], supplies: Supplies) -> Check:
        """And no other factors of these ranks would lose less on the calibration data (Eckart–Young)."""
        check = self.check(before, after, layers)
        if not check.passed or (self.aware and supplies.calibration is None):
            return check
        found = {name: before.module.get_submodule(name) for name in self.ranks}
        best = self._spectra(before, found, supplies)
        excess = {
            name: best[name].lost_by(factors.second.weight.detach().flatten(1)) - best[name].lost(self.ranks[name])
            for name, factors in _factors(after, self.ranks)
        }
        worst = max(excess, key=lambda n: excess[n])
        what = f"of the outputs' energy lost beyond the least that rank {self.ranks[worst]} can lose"
        return Check(excess[worst], EXACT, what, worst)

    def _spectra(self, model: UniversalModel, found: Mapping[str, nn.Module], supplies: Supplies) -> dict[str, Spectrum]:
        data = supplies.calibration if self.aware else None
        if self.aware and data is None:
            raise UsageError("low_rank needs the calibration data that it was fitted on.", remedy="Give calibration=...")
        return spectra(model, found, data and data.head(self.samples))

    def _ranks(self, model: UniversalModel, found: Mapping[str, nn.Module], supplies: Supplies) -> dict[str, int]:
        if self.energy is None:
            return {name: self._ceiling(m) for name, m in found.items()}
        best = replace(self, aware=supplies.calibration is not None)._spectra(model, found, supplies)
        return {name: fewest(spectrum.values, self.energy) for name, spectrum in best.items()}

    def _ceiling(self, module: nn.Module) -> int:
        """The rank by `ratio`; the least there is where data will choose it."""
        outputs, inputs = unfolded_matrix(module).shape
        return 1 if self.energy is not None or self.ranks else max(1, int(self.ratio * outputs * inputs / (outputs + inputs)))

    def _goes(self, path: str, module: nn.Module) -> bool:
        return path in self.ranks if self.ranks else shrinks(module, self._ceiling(module))


def shrinks(module: nn.Module, rank: int) -> bool:
    """Whether two factors of this rank have fewer parameters than the one matrix."""
    outputs, inputs = unfolded_matrix(module).shape
    return rank * (outputs + inputs) < outputs * inputs


def _found(model: UniversalModel, layers: Iterable[str]) -> dict[str, nn.Module]:
    """Dotted path → module of what can be taken apart in `layers`; no weight that a module elsewhere shares."""
    owners = Counter(id(p) for m in model.module.modules() for p in m.parameters(recurse=False))
    found = {_joined(layer, n): m for layer in layers for n, m in factorable(model.layer(layer).module).items()}
    return {name: m for name, m in found.items() if owners[id(m.weight)] == 1}


def _joined(layer: str, name: str) -> str:
    return f"{layer}.{name}" if name else layer


def _weighty(module: nn.Module) -> list[nn.Module]:
    """The modules that own a weight matrix or kernel themselves."""
    return [m for m in module.modules() if any(p.dim() > 1 for p in m.parameters(recurse=False))]


def _why(module: nn.Module) -> str:
    return why_whole(module) or "two factors would not be smaller, or others share its weight"


def _factors(model: UniversalModel, ranks: Mapping[str, int]) -> Iterator[tuple[str, TwoFactors]]:
    """Raises `UsageError` where the cut model does not hold two factors."""
    for name in ranks:
        module = model.module.get_submodule(name)
        if not isinstance(module, TwoFactors):
            raise UsageError(f"{name} is a {type(module).__name__} and not in two factors.")
        yield name, module


def _every(root: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, nn.Module]]:
    """Every dotted path at which the modules called `names` stand."""
    wanted = {id(root.get_submodule(name)) for name in names}
    yield from ((n, m) for n, m in root.named_modules(remove_duplicate=False) if id(m) in wanted)


def _orthonormal(model: UniversalModel, ranks: Mapping[str, int]) -> Check | None:
    """The failed check, if there is one."""
    for name, factors in _factors(model, ranks):
        if factors.rank != ranks[name]:
            return Check(abs(factors.rank - ranks[name]), 0, f"the rank is {factors.rank} and not {ranks[name]}", name)
        U: Tensor = factors.second.weight.detach().flatten(1).double()
        off = float((U.T @ U - torch.eye(U.shape[1], dtype=U.dtype, device=U.device)).abs().max())
        if not off <= EXACT:
            return Check(off, EXACT, "directions that are not orthonormal", name)
    return None
