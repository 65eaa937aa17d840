"""A little SVG: enough marks, text and axes for four plain charts, written as text so that no browser is needed to make a file.

Decision: fixed light colours on white, no style sheet, no ids, no script: the file looks the same in a paper, a wiki or a
print, and several can stand in one page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

from layerwise.report import formats

INK, MUTED, LINE = "#1a1a1a", "#555555", "#dddddd"
LETTER = 6.4  # px, about the mean width of a letter at 12 px


def mark(tag: str, content: str = "", /, **attributes: object) -> str:
    """One element; ``stroke_width=2`` becomes ``stroke-width="2"``, and numbers get at most two decimals."""
    pairs = (f" {name.replace('_', '-')}={quoteattr(_text(value))}" for name, value in attributes.items())
    return f"<{tag}{''.join(pairs)}>{content}</{tag}>" if content else f"<{tag}{''.join(pairs)}/>"


def text(words: str, x: float, y: float, **attributes: object) -> str:
    """Words at a place; escaped, on one line."""
    style: dict[str, object] = {"fill": INK, "font_size": 12} | attributes
    return mark("text", escape(formats.label(words)) or " ", x=x, y=y, **style)


def line(x1: float, y1: float, x2: float, y2: float, **attributes: object) -> str:
    style: dict[str, object] = {"stroke": LINE, "stroke_width": 1} | attributes
    return mark("line", x1=x1, y1=y1, x2=x2, y2=y2, **style)


def document(title: str, description: str, width: float, height: float, marks: list[str]) -> str:
    """A whole SVG file with its title and description for those who cannot see it."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" role="img" font-family="system-ui, sans-serif">',
        mark("title", escape(formats.label(title))),
        mark("desc", escape(formats.label(description)) or " "),
        mark("rect", width=width, height=height, fill="#ffffff"),
        text(title, 16, 24, font_size=15, font_weight=600),
        *marks,
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


@dataclass(frozen=True)
class Scale:
    """Values ``low … high`` onto pixels ``start … end``."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, wanted: int = 6) -> Iterator[float]:
        """Round values within the scale, about `wanted` of them."""
        rough = (self.high - self.low) / wanted
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
        for i in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1):
            yield i * step


def padded(values: list[float], start: float, end: float) -> Scale:
    """A scale over the finite `values` with a little air at both ends."""
    finite = [v for v in values if math.isfinite(v)]
    low, high = min(finite), max(finite)
    air = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return Scale(low - air, high + air, start, end)


def axes(x: Scale, y: Scale, titles: tuple[str, str], write: tuple[Callable[[float], str], Callable[[float], str]]) -> list[str]:
    """Grid lines, tick labels and titles of both axes; `y` grows upwards, so its `start` is the bottom."""
    marks = []
    for value in x.ticks():
        marks.append(line(x(value), y.start, x(value), y.end))
        marks.append(text(write[0](value), x(value), y.start + 18, text_anchor="middle", font_size=11))
    for value in y.ticks():
        marks.append(line(x.start, y(value), x.end, y(value)))
        marks.append(text(write[1](value), x.start - 8, y(value) + 4, text_anchor="end", font_size=11))
    marks.append(text(titles[0], (x.start + x.end) / 2, y.start + 40, text_anchor="middle", fill=MUTED))
    middle = (y.start + y.end) / 2
    marks.append(text(titles[1], 18, middle, text_anchor="middle", fill=MUTED, transform=f"rotate(-90 18 {middle:.1f})"))
    return marks


def width_of(names: list[str], size: float = 12) -> float:
    """About the width in px of the longest name; a wide (Chinese) letter counts twice."""
    longest = max((sum(2 if ord(c) > 0x2E7F else 1 for c in name) for name in names), default=0)
    return longest * LETTER * size / 12


def _text(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
