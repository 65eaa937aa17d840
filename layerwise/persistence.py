"""Vietoris–Rips persistence of a point cloud, from its distances: connected components by our own spanning tree, loops by ripser.

Every component is born at 0 and dies at the length of the edge that joins it to an older one, so the finite bars of H0 are the
edges of the minimum spanning tree; the bar that never dies is left out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerwise.errors import missing_dependency

Array = NDArray[np.float64]


def distances(points: Array) -> Array:
    """Euclidean distances (points, points), by differences: the binomial formula loses the digits of near points."""
    return np.stack([np.sqrt(((points - point) ** 2).sum(1)) for point in points])


def components(distance: Array) -> Array:
    """The n − 1 finite bars of H0, shortest first: Prim's algorithm in O(n²), which keeps edges of length 0."""
    n = len(distance)
    reach, outside, bars = distance[0].copy(), np.ones(n, dtype=bool), np.zeros(n - 1)
    outside[0] = False
    for step in range(n - 1):
        nearest = int(np.argmin(np.where(outside, reach, np.inf)))
        bars[step] = reach[nearest]
        outside[nearest] = False
        reach = np.minimum(reach, distance[nearest])
    return np.sort(bars)


def loops(distance: Array) -> Array:
    """The lengths of the bars of H1, longest last. Raises `MissingDependency` without ripser."""
    diagram = ripser()(distance, maxdim=1, distance_matrix=True)["dgms"][1]
    return np.sort((diagram[:, 1] - diagram[:, 0]).astype(np.float64))


def ripser() -> Any:
    """The function, imported only where it is used."""
    try:
        from ripser import ripser as function
    except ImportError as error:
        raise missing_dependency("ripser", "topology", "The persistence of loops (H1)") from error
    return function


def scaled(distance: Array) -> Array | None:
    """In units of the median distance; None where that is 0."""
    median = float(np.median(distance[np.triu_indices(len(distance), 1)]))
    return distance / median if median > 0 else None


def bar_distance(left: Array, right: Array) -> float:
    """The Wasserstein-1 distance between two sets of as many H0 bars, per bar.

    Both have one bar per point but one, all born at 0, so they are matched in the order of their lengths and none is left for the
    diagonal.
    """
    return float(np.abs(left - right).mean())


def focus(bars: Array) -> float:
    """1 − persistent entropy / log(bars): 0 for bars of one length, near 1 where one bar outweighs the rest."""
    share = bars[bars > 0] / bars.sum()
    return 1.0 + float((share * np.log(share)).sum()) / float(np.log(len(bars)))
