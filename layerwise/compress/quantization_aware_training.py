"""Train with the rounding in place, so that the weights learn to stand it (Jacob et al. 2018), by torchao's fake quantization."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from layerwise.errors import UsageError, missing_dependency
from layerwise.method import METHODS, Check, CompressionMethod
from layerwise.model import UniversalModel
from layerwise.quiet import silence_import_noise
from layerwise.structure import Layer
from layerwise.supplies import NOTHING, Supplies
from layerwise.training import kept_zeros, recipe_of, train_, untrainable, zeros_kept

LEAST, MOST = 2, 8


@METHODS.register("quantization_aware_training")
@dataclass(frozen=True)
class QuantizationAwareTraining(CompressionMethod):
    """Every forward of training rounds the `nn.Linear` weights of the layers to `bits`, symmetric, in groups of `group` inputs (a
    whole row where that does not divide them); gradients pass the rounding as if it were not there. Afterwards the weights are
    floats again: ``weight_only(bits=…, group=…, symmetric=True)`` as the next step packs them. The rest is the recipe, see
    `TrainingSettings`; early stopping judges the rounded model. Zeros of pruned matrices are kept.
    """

    bits: int = 4
    group: int = 32
    epochs: int = 3
    learning_rate: float = 1e-4
    optimizer: str = "adamw"
    momentum: float = 0.9
    weight_decay: float = 0.01
    schedule: str = "cosine"
    warm_up: float = 0.1
    clip: float = 1.0
    patience: int = 0
    keep_best: bool = True
    monitor: str = "quality"
    seed: int = 0
    name: ClassVar[str] = "quantization_aware_training"
    needs: ClassVar[frozenset[str]] = frozenset({"training"})
    trains: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not LEAST <= self.bits <= MOST:
            raise UsageError(f"quantization_aware_training: bits is {self.bits!r}, and must lie in {LEAST} … {MOST}.")
        if self.group < 1:
            raise UsageError(f"quantization_aware_training: group is {self.group!r}, and must be at least 1.")
        recipe_of(self)

    @property
    def whole(self) -> bool:
        return True

    def treats(self, layer: Layer) -> str:
        return untrainable(layer.module) or ("" if linears(layer.module) else "holds no nn.Linear, which is all that is rounded")

    def apply_(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies = NOTHING) -> None:
        names = list(layers) or [layer.name for layer in model.layers if not self.treats(layer)]
        with rounded(model.module, names, self.bits, self.group):
            train_(model, supplies, settings=recipe_of(self), after_step=kept_zeros(model.module))

    def reshape_(self, model: UniversalModel, layers: Sequence[str]) -> None:
        """Nothing: the structure stays, and what was learned comes with the weights."""

    def check(self, before: UniversalModel, after: UniversalModel, layers: Sequence[str]) -> Check:
        return Check(*zeros_kept(before.module, after.module))


def linears(module: nn.Module) -> Mapping[str, nn.Linear]:
    """Those of exactly this class: attention's own subclass hands its weight to a fused kernel that would not round it."""
    return {name: m for name, m in module.named_modules() if type(m) is nn.Linear}


@contextmanager
def rounded(root: nn.Module, layers: Sequence[str], bits: int, group: int) -> Iterator[None]:
    """Inside, the linear modules of `layers` round their weights in each forward; they share the parameters of those outside."""
    chosen = {
        f"{layer}.{name}" if name else layer: m for layer in layers for name, m in linears(root.get_submodule(layer)).items()
    }
    stand_ins = {path: _fake(m, bits, group) for path, m in chosen.items()}
    try:
        for path, stand_in in stand_ins.items():
            root.set_submodule(path, stand_in)
        yield
    finally:
        for path, module in chosen.items():
            module.weight, module.bias = stand_ins[path].weight, stand_ins[path].bias
            root.set_submodule(path, module)


def _fake(module: nn.Linear, bits: int, group: int) -> Any:
    silence_import_noise()
    try:
        from torchao.quantization.granularity import PerAxis, PerGroup
        from torchao.quantization.qat import FakeQuantizedLinear, IntxFakeQuantizeConfig
    except ImportError as error:
        raise missing_dependency("torchao", "quant", "quantization_aware_training") from error
    blocks = PerGroup(group) if module.in_features % group == 0 else PerAxis(0)
    config = IntxFakeQuantizeConfig(getattr(torch, f"int{bits}"), blocks, is_symmetric=True)
    with torch.random.fork_rng(devices=[]):  # its constructor draws weights, which nobody sees
        stand_in = FakeQuantizedLinear.from_linear(module, weight_config=config)
    stand_in.weight, stand_in.bias = module.weight, module.bias
    return stand_in.train(module.training)
