"""How a layer's weights hold its neurons together, from strongest to weakest connection. No data, no passes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from layerwise.analyzer import ANALYZERS
from layerwise.errors import UsageError
from layerwise.scores import LayerScore, Status
from layerwise.zeroshot import BLOCK, WeightAnalyzer, matrices, weighted_mean


@dataclass(frozen=True)
@ANALYZERS.register("neural_persistence")
class NeuralPersistenceAnalyzer(WeightAnalyzer):
    """Mean over the layer's weight matrices, by size, of the normalized neural persistence, 0 … 1 (no unit).

    A matrix is a bipartite graph of its inputs and outputs. All m + n of them are there from the start; connections come in
    from the strongest, |w| / max|w| = 1, to the weakest, and each that joins two components ends one of them. The persistences
    1 − |w| / max|w| of those m + n − 1 joins (the edges of a maximum spanning tree) have the `p`-norm

        NP = (Σ (1 − |w_e| / max|w|)^p)^(1/p), divided by its largest possible value (m + n − 1)^(1/p).

    Higher = a few connections stand out by far = more important, since trained layers stand out from random ones in the paper.
    No standard error: weights are no sample. Cost: about log₂(m + n) readings of each matrix.

    Parameters
    ----------
    p
        The norm's exponent, at least 1 (default 2).

    References
    ----------
    Rieck et al. (2019), "Neural persistence". We differ: the largest weight is each matrix's own, not the network's, so that
    one layer's scale does not decide for the others; a convolution is taken as the matrix (outputs, inputs × kernel), not
    unrolled over the image; the bound leaves out the smallest weight; a fused query-key-value projection counts as its three
    parts. Girrbach et al. (2023) show that the variance of the weights explains most of it.
    """

    method: ClassVar[str] = "neural_persistence"
    unit: ClassVar[str] = "share of the bound"

    p: float = 2.0

    def __post_init__(self) -> None:
        if not (isinstance(self.p, int | float) and math.isfinite(self.p) and self.p >= 1):
            raise UsageError(f"neural_persistence: p is {self.p!r}; it is a number of at least 1.")

    def summarize(self, tensor: Tensor, whole: bool = True) -> list[tuple[int, float]]:
        """(size, normalized persistence) of each matrix."""
        return [(w.numel(), persistence(w, self.p)) for w in matrices(tensor, whole)]

    def combine(self, summaries: Sequence[list[tuple[int, float]]]) -> LayerScore:
        found = [part for summary in summaries for part in summary]
        if not found:
            return LayerScore.missing(Status.NOT_APPLICABLE, "has no weight matrix")
        return LayerScore.measured(weighted_mean(found))


def persistence(matrix: Tensor, p: float) -> float:
    """The normalized neural persistence of one matrix; 0 for a matrix of zeros, NaN where a weight is not finite."""
    if not all(math.isfinite(float(end)) for end in torch.aminmax(matrix.float() if matrix.element_size() == 1 else matrix)):
        return math.nan
    strengths = spanning_tree(matrix)
    largest = strengths.max()
    return float(np.mean((1.0 - strengths / largest) ** p) ** (1 / p)) if largest > 0 else 0.0


def spanning_tree(matrix: Tensor) -> np.ndarray:
    """|w| of the m + n − 1 edges of a maximum spanning tree of the bipartite graph of `matrix` (m, n), in float64.

    Borůvka's algorithm over blocks of rows: in each round every component takes its strongest way out.
    """
    rows, columns = matrix.shape
    component = np.arange(rows + columns)
    kept: list[float] = []
    while len(kept) < rows + columns - 1:
        strength, partner = _ways_out(matrix, torch.from_numpy(component).to(matrix.device))
        order = np.argsort(-strength, kind="stable")
        chosen = order[np.unique(component[order], return_index=True)[1]]
        parent: dict[int, int] = {}
        for vertex in chosen:
            a, b = _root(parent, int(component[vertex])), _root(parent, int(component[partner[vertex]]))
            if a != b:  # of two components that chose each other, or of equally strong ways in a ring, one edge is left out
                parent[a] = b
                kept.append(float(strength[vertex]))
        labels, inverse = np.unique(component, return_inverse=True)
        component = np.array([_root(parent, int(label)) for label in labels])[inverse]
    return np.array(kept)


def _root(parent: dict[int, int], label: int) -> int:
    while label in parent:
        parent[label] = parent.get(parent[label], parent[label])
        label = parent[label]
    return label


def _ways_out(matrix: Tensor, component: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """For each vertex (rows, then columns) its strongest edge to another component and the vertex there; −1 where none is."""
    rows, columns = matrix.shape
    left, right = component[:rows], component[rows:]
    exact = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    out = torch.full((rows,), -1.0, dtype=exact, device=matrix.device), torch.zeros(rows, dtype=torch.int64, device=matrix.device)
    best, at = torch.full((columns,), -1.0, dtype=exact, device=matrix.device), torch.zeros_like(right)
    step = max(1, BLOCK // columns)
    for start in range(0, rows, step):
        block = matrix[start : start + step].to(exact).abs()
        block.masked_fill_(left[start : start + step, None] == right[None], -1.0)
        torch.max(block, dim=1, out=(out[0][start : start + step], out[1][start : start + step]))
        values, indices = block.max(dim=0)
        better = values > best
        best = torch.where(better, values, best)
        at = torch.where(better, indices + start, at)
    return torch.cat([out[0], best]).double().cpu().numpy(), torch.cat([out[1] + rows, at]).cpu().numpy()
