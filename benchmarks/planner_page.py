"""The page of the planner's benchmark: two counts, neither hidden."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

RIVALS = ("uniform", "random", "last-k")
CONTENDERS = ("planner", *RIVALS)


def section(result: dict[str, Any]) -> str:
    """What was asked, what ahead means, both counts, both tables, and what lost."""
    cells = [outcome(cell) for cell in result["cells"]]
    names = {c["subject"] for c in cells}
    missing = [n for n in result["subjects"] if n not in names]
    text = [
        "At the same budget of bytes, with the same menu, the same planning samples and no tuning afterwards: does the planner's"
        " choice do better on test samples that nobody planned on than the best uniform choice, a random one and dropping the"
        " last layers? Means over seeds; ± is two standard errors of the paired difference over the test samples, from the"
        " best rival in the cell.",
        "",
        "Ahead can mean two things, and both are counted. **By quality** (accuracy; loss per token for stories260k): the"
        " planner's mean is above every rival's, or equal with a smaller divergence. Many cells are lossless, and there a coin"
        " flips: a rounded model answers a few samples otherwise than the unchanged one, sometimes luckily. **By damage**: the"
        " divergence of the outputs from those of the unchanged model (KL in nats) is below every rival's; it is what the planner"
        " minimizes, on other samples.",
        "",
        count(cells, "quality", "By quality"),
        count(cells, "damage", "By damage"),
        "",
        *table(cells, "quality", "Accuracy in percent, loss per token for stories260k"),
        "",
        *table(
            cells,
            "damage",
            "Divergence from the unchanged model, in millinats (10⁻³ nats); − means that the planner's is smaller",
        ),
        "",
        f"Menu: {result['menu']}.",
        "",
        "*uniform* is the best of the uniform choices by what they do on the planning samples: one action on every layer, with"
        " one for the lookup tables, or 16 bits on top. A dash: no choice of that kind meets the budget.",
        *([f"Not yet run: {', '.join(missing)}."] if missing else []),
    ]
    return "\n".join(text)


def count(cells: list[dict[str, Any]], kind: str, title: str) -> str:
    """In how many cells the planner is ahead, and by more than the noise ahead and behind."""
    played = [c for c in cells if c[kind]["outcome"] != "none"]
    won = sum(c[kind]["outcome"] == "ahead" for c in played)
    clear = sum(c[kind]["gain"] > c[kind]["noise"] for c in played)
    lost = named([c for c in played if c[kind]["gain"] < -c[kind]["noise"]])
    behind = named([c for c in played if c[kind]["outcome"] != "ahead"])
    share = f"{won} of {len(played)} cells ({won / max(len(played), 1):.0%}; asked: 80 %)"
    sure = f"by more than the noise in {clear}, and behind by more than it in {lost}"
    return f"- {title}: ahead of every rival in {share}; {sure}. Not ahead in {behind}."


def named(cells: list[dict[str, Any]]) -> str:
    return "; ".join(f"{c['subject']} at {short(c)}" for c in cells) or "none"


def outcome(cell: Mapping[str, Any]) -> dict[str, Any]:
    """The cell with, for both kinds, the best rival, the planner's gain over it (more is better), its noise, who is ahead."""
    found = dict(cell)
    for kind, sign in (("quality", 1), ("damage", -1)):
        means = {m: sign * cell["means"][m][kind] for m in CONTENDERS if m in cell["means"]}
        rivals = [m for m in RIVALS if m in means]
        found[kind] = {"outcome": "none"}
        if "planner" in means and rivals:
            best = max(rivals, key=lambda m: means[m])
            gap = cell["gaps"][best][kind]
            closer = cell["means"]["planner"]["damage"] < cell["means"][best]["damage"]
            gain = sign * gap["mean"]
            ahead = gain > 0 or (gain == 0 and kind == "quality" and closer)
            found[kind] = {"best": best, "gain": gain, "noise": gap["noise"], "outcome": "ahead" if ahead else "not"}
    return found


def table(cells: list[dict[str, Any]], kind: str, title: str) -> Iterator[str]:
    yield f"{title}:"
    yield ""
    unchanged = " unchanged |" if kind == "quality" else ""
    yield f"| subject | size ≤ |{unchanged} planner | uniform | random | last-k | planner − best rival |"
    yield f"|---|---|{'---|' if unchanged else ''}---|---|---|---|---|"
    for cell in cells:
        yield line(cell, kind)


def line(cell: Mapping[str, Any], kind: str) -> str:
    percent = cell.get("metric") == "accuracy"
    scale, sign, digits = (100, 1, 2) if kind == "quality" and percent else (1, -1, 4) if kind == "quality" else (1e3, 1, 4)

    def shown(value: float | None) -> str:
        return "–" if value is None else f"{sign * value * scale:.{digits}f}"

    means = [cell["means"].get(m, {}).get(kind) for m in CONTENDERS]
    gap = "–"
    if (found := cell[kind])["outcome"] != "none":
        change = found["gain"] * scale * (-1 if kind == "damage" else 1)
        gap = f"{change:+.{digits}f} ± {found['noise'] * scale:.{digits}f} ({found['best']})"
    columns = [*([shown(cell["whole"])] if kind == "quality" else []), *map(shown, means), gap]
    return f"| {cell['subject']} | {short(cell)} | {' | '.join(columns)} |"


def short(cell: Mapping[str, Any]) -> str:
    return str(cell["budget"].removeprefix("size<="))
