"""Every weight rounded in several numbers of bits, all other weights having the same bits; and one of them for each weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from layerwise.data import Data
from layerwise.lowbit.correction import Correction, packed, walk
from layerwise.lowbit.effects import Choices
from layerwise.lowbit.floats import floats_
from layerwise.lowbit.grid import Grid
from layerwise.lowbit.packed import PackedWeight, place_
from layerwise.lowbit.rounding import Chosen
from layerwise.model import UniversalModel

HOW = Correction()
Choose = Callable[[UniversalModel], Chosen]


def candidates(
    model: UniversalModel, layers: Sequence[str], choose: Choose, menu: Sequence[int], batches: Data | None
) -> tuple[UniversalModel, dict[str, Choices]]:
    """The model with the values of the roundings to the grids that `choose` gives, and each weight's roundings in the bits of
    `menu`.

    With `batches` corrected on what the layers before give when rounded to these grids, whatever bits they end with: so a
    rounding does not depend on the other choices, and what is weighed is what is taken.
    """
    stage, made = model.clone(), dict[str, dict[int, PackedWeight]]()
    for name, m, grid, hessian in walk(stage, layers, choose(stage), batches):
        made[name] = {bits: packed(m, Grid(bits, grid.group), hessian, HOW) for bits in menu}
        place_(stage.module, m.parameter, made[name][grid.bits])
    floats_(stage.module)
    there, original = choose(stage), choose(model)
    return stage, {name: Choices(there[name][0], m.parameter.detach(), made[name]) for name, (m, _) in original.items()}


def place_corrected_(
    model: UniversalModel, layers: Sequence[str], choose: Choose, bits: Mapping[str, int], batches: Data
) -> None:
    """Puts the roundings of `candidates` in place, each weight's in its `bits`."""
    stage, targets = model.clone(), choose(model)
    for name, m, grid, hessian in walk(stage, layers, choose(stage), batches):
        taken = packed(m, Grid(bits[name], grid.group), hessian, HOW)
        place_(model.module, targets[name][0].parameter, taken)
        place_(stage.module, m.parameter, taken.clone() if bits[name] == grid.bits else packed(m, grid, hessian, HOW))
