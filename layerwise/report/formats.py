"""Numbers as people write them: thousands separators, MB, ms, percent, a real minus sign, and a dash for "not measured"."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping

from layerwise.errors import printable
from layerwise.metric import METRICS
from layerwise.target import COSTS, QUALITIES

DASH = "–"
MINUS = "−"
SUPERSCRIPT = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
POWERS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
TIMES = ((1e3, "s"), (1.0, "ms"), (1e-3, "µs"))
SCALED = {"size": BYTES, "macs": POWERS, "latency": TIMES}
HIGHER_IS_BETTER = frozenset(name for name, metric in METRICS.items() if metric.higher_is_better)
LOWER_IS_BETTER = frozenset({*METRICS, "size", "params", "macs", "latency", "nonzero"}) - HIGHER_IS_BETTER
SHARES = frozenset(name for name, metric in METRICS.items() if metric.share)  # 0 … 1, read as percent


def number(x: float, digits: int = 4) -> str:
    """`x` with that many significant digits, thousands separated, powers of ten written out."""
    if not math.isfinite(x):
        return DASH
    if x and not 1e-4 <= abs(x) < 1e9:
        mantissa, exponent = f"{x:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return _minus(f"{mantissa}×10{str(int(exponent)).translate(SUPERSCRIPT)}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(x)))) if x else 0
    text = f"{x:,.{decimals}f}"
    return _minus(text.rstrip("0").rstrip(".") if "." in text else text)


def place(rank: int, sharing: int) -> str:
    """A rank, marked ``=`` where several share it."""
    return f"={rank}" if sharing > 1 else str(rank)


def places(ranks: Mapping[str, int]) -> dict[str, str]:
    """Layer → its rank as it is written."""
    sharing = Counter(ranks.values())
    return {name: place(rank, sharing[rank]) for name, rank in ranks.items()}


def count(x: float) -> str:
    """A whole number with thousands separators."""
    return _minus(f"{x:,.0f}") if math.isfinite(x) else DASH


def size(x: float) -> str:
    """Bytes in decimal units (1 MB = 1,000,000 bytes), as `Target` reads them."""
    return _scaled(x, BYTES)


def macs(x: float) -> str:
    """Multiply-accumulates with an SI prefix."""
    return _scaled(x, POWERS)


def milliseconds(x: float) -> str:
    """A time given in ms, in µs, ms or s."""
    return _scaled(x, TIMES)


def percent(x: float) -> str:
    """A share as percent, down to a hundredth of a percent."""
    return f"{number(100 * x)} %" if math.isfinite(x) else DASH


def times(x: float) -> str:
    """A ratio: 0.48 → ``0.48×``."""
    return f"{number(x, 3)}×" if math.isfinite(x) else DASH


FIGURES: dict[str, Callable[[float], str]] = {
    "size": size,
    "params": count,
    "nonzero": count,
    "macs": macs,
    "latency": milliseconds,
    **dict.fromkeys(SHARES, percent),
}


def figure(metric: str, x: float) -> str:
    """`x` in the way its metric is written; unknown metrics as plain numbers."""
    return FIGURES.get(metric, number)(x)


def with_spread(metric: str, x: float, spread: float) -> str:
    """``12.1 ± 0.21 ms``: the figure and its spread in one unit, or the figure alone where the spread is unknown."""
    if not (math.isfinite(x) and math.isfinite(spread)):
        return figure(metric, x)
    scale, name = unit(metric, x)
    named = f" {name}" if metric in SHARES or metric in SCALED else ""
    return f"{number(x / scale)} ± {number(spread / scale, 2)}{named}"


def change(metric: str, by: float, error: float = math.nan) -> str:
    """A signed difference, with its standard error where known; shares in percentage points (without the word)."""
    if not math.isfinite(by):
        return DASH
    scale = 0.01 if metric in SHARES else 1.0
    text = ("+" if by > 0 else "") + number(by / scale, 3)
    return f"{text} ± {number(error / scale, 2)}" if math.isfinite(error) else text


def quotient(before: float, after: float) -> float:
    """`after` over `before`; NaN where that has no meaning."""
    return after / before if before else math.nan


def unit(metric: str, near: float) -> tuple[float, str]:
    """The scale and the unit in which figures `near` this one are best compared: two numbers in one unit."""
    if metric in SHARES:
        return 0.01, "%"
    units = SCALED.get(metric)
    if units is None:
        return 1.0, (COSTS | QUALITIES).get(metric, "")
    return next(((s, u) for s, u in units if abs(near) >= s), units[-1])


def label(text: str, width: int = 0) -> str:
    """A name from the user on one line without control characters, shortened in the middle to `width` characters."""
    text = printable(text)
    if not width or len(text) <= width:
        return text
    head = (width - 1) // 3
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def _scaled(x: float, units: tuple[tuple[float, str], ...]) -> str:
    if not x or not math.isfinite(x):
        return "0" if x == 0 else DASH
    scale, name = next(((s, u) for s, u in units if abs(x) >= s), units[-1])
    return f"{number(x / scale, 3)} {name}".strip()


def _minus(text: str) -> str:
    return text.replace("-", MINUS)
