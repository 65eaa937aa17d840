"""Colours that people with any colour vision can tell apart; shape, hatching or words always say the same thing again."""

from __future__ import annotations

# viridis: even in lightness, safe for colour-blind readers, and it has no grey, which is left for "no score".
VIRIDIS = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725")
DIVERGING = ("#b35806", "#f1a340", "#fee0b6", "#f7f7f7", "#d1e5f0", "#67a9cf", "#2166ac")  # −1 … 1
# Okabe and Ito's blue, vermillion and green. State → colour and the names of its mark in plotly.
STATES = {
    "feasible": ("#0072b2", "circle"),
    "infeasible": ("#d55e00", "x-thin-open"),
    "before": ("#777777", "diamond"),
    "chosen": ("#009e73", "star"),
}
INK, PALE = "#1a1a1a", "#ffffff"


def blend(stops: tuple[str, ...], share: float) -> str:
    """The colour at `share` (0 … 1) of the way through evenly spaced `stops`."""
    place = min(max(share, 0.0), 1.0) * (len(stops) - 1)
    first = min(int(place), len(stops) - 2)
    pairs = zip(_channels(stops[first]), _channels(stops[first + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (place - first)):02x}" for a, b in pairs)


def readable_on(colour: str) -> str:
    """Dark or light text, whichever is read better on `colour` (WCAG relative luminance)."""
    linear = [((c / 255 + 0.055) / 1.055) ** 2.4 if c > 10 else c / 255 / 12.92 for c in _channels(colour)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return INK if luminance > 0.2 else PALE  # where both contrasts are equal


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
