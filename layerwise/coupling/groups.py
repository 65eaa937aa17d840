"""Groups of units that can be cut: what of which parameters goes with each, read from the labels of one run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from layerwise.coupling.labels import ALONE, Labels, Numbers, Solution

KINDS = ("head", "kv_group", "neuron", "channel", "expert")
MODULES = -1  # in the place of a dimension: the units are modules of a list


@dataclass(frozen=True, eq=False)
class Place:
    """Where units have their share of a parameter: `indices` (units, of each) along dimension `dim`, which has `size` of them.

    `eats`: the columns of a weight that read the unit. `gives`: the rows that produce it.
    """

    name: str
    dim: int
    size: int
    indices: Numbers
    eats: bool = False
    gives: bool = False


@dataclass(frozen=True, eq=False)
class Group:
    """Units of one kind that can be exchanged for one another. `blocks` are those that hold the rows which produce them.

    `order`: units that matter on the example first, where that is known.
    """

    name: str
    kind: str
    blocks: tuple[str, ...]
    places: tuple[Place, ...]
    order: tuple[int, ...] = ()

    @property
    def units(self) -> int:
        return len(self.places[0].indices)


def grouped(module: nn.Module, labels: Labels, blocks: Sequence[str]) -> tuple[list[Group], dict[str, str]]:
    """Every group, in the order of the parameters, and block → why the rest of it cannot be cut."""
    solution = labels.solved()
    whole = _whole(labels, solution)
    places: dict[int, list[tuple[int, Numbers]]] = defaultdict(list)
    for number, span in enumerate(labels.spans):
        roots = solution.roots[span.start : span.start + span.size]
        if len(roots) and (roots == roots[0]).all():
            continue
        order = np.argsort(roots, kind="stable")
        cuts = np.flatnonzero(np.diff(roots[order])) + 1
        for indices in np.split(order, cuts):
            root = int(roots[indices[0]])
            if root not in solution.fixed and root not in whole:
                places[root].append((number, indices))
    groups: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
    for root, found in places.items():
        groups[tuple((number, len(indices)) for number, indices in found)].append(root)
    owners = _owners(module, blocks)
    named: list[Group] = []
    for roots_ in sorted(groups.values(), key=lambda r: places[r[0]][0][0]):
        if len(roots_) > 1:
            group = _group(labels, solution, [places[r] for r in roots_], owners, named)
            named += [group] if group is not None else []
    return named, _reasons(labels, solution, owners)


def _whole(labels: Labels, solution: Solution) -> set[int]:
    """Roots that make up a whole dimension of a parameter: nothing of it would be left."""
    found = set()
    for span in labels.spans:
        roots = solution.roots[span.start : span.start + span.size]
        if (roots == roots[0]).all():
            found.add(int(roots[0]))
    return found


def _group(
    labels: Labels,
    solution: Solution,
    units: list[list[tuple[int, Numbers]]],
    owners: Mapping[str, str],
    others: Sequence[Group],
) -> Group | None:
    """None for what no weight produces or none reads."""
    places = []
    for position, (number, _) in enumerate(units[0]):
        span = labels.spans[number]
        indices = np.stack([unit[position][1] for unit in units])
        first = slice(span.start, span.start + span.size)
        eats, gives = bool(solution.eaten[first].any()), bool(solution.given[first].any())
        places.append(Place(span.name, span.dim, span.size, indices, eats, gives))
    order = np.argsort(next((p for p in places if p.gives), places[0]).indices[:, 0], kind="stable")
    places = [Place(p.name, p.dim, p.size, p.indices[order], p.eats, p.gives) for p in places]
    rows = [p for p in places if p.gives]
    if not rows or not any(p.eats for p in places):
        return None
    base = rows[0].name.removesuffix(".weight")
    same = sum(g.name.split("#")[0] == base for g in others)
    blocks = tuple(dict.fromkeys(owners[p.name] for p in rows))
    return Group(f"{base}#{same + 1}" if same else base, _kind(labels, solution, places), blocks, tuple(places))


def _kind(labels: Labels, solution: Solution, places: Sequence[Place]) -> str:
    rows = [p for p in places if p.gives]
    spans = {(s.name, s.dim): s for s in labels.spans}
    if any(solution.roots[spans[p.name, p.dim].start + p.indices[0, 0]] in solution.heads for p in rows):
        widths = {p.indices.shape[1] for p in rows if p.indices.shape[1] > 1}
        read = sum(p.indices.shape[1] for p in places if p.eats)
        # query, key and value of one head are as wide; where all heads share the keys, these stay
        fused = len(rows) == 1 and read < rows[0].indices.shape[1] < 3 * read
        return "kv_group" if len(widths) > 1 or fused else "head"
    return "channel" if any(p.name in labels.kernels for p in rows) else "neuron"


def _owners(module: nn.Module, blocks: Sequence[str]) -> dict[str, str]:
    """Parameter → the block it lies in; '' outside of all."""
    found = {}
    for name, _ in (*module.named_parameters(), *module.named_buffers()):
        inside = [b for b in blocks if name.startswith(f"{b}.")]
        found[name] = max(inside, key=len, default="")
    return found


def _reasons(labels: Labels, solution: Solution, owners: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for span in labels.spans:
        roots = np.unique(solution.roots[span.start : span.start + span.size])
        if not solution.given[span.start : span.start + span.size].any():
            continue
        for root in roots[:4]:
            fixed, mixed = solution.fixed.get(int(root)), solution.mixed.get(int(root)) if len(roots) == 1 else None
            reason = mixed if fixed == ALONE and mixed else fixed or mixed
            if reason:
                found[owners[span.name]].setdefault(f"{span.name}: {reason}")
    return {block: "; ".join(list(reasons)[:3]) for block, reasons in found.items()}


def live(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by the name under which it is labelled."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


__all__ = ["KINDS", "MODULES", "Group", "Place", "grouped", "live"]
