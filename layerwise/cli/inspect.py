"""Show a model's layers: what they are, what they cost, which can be skipped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerwise.cli import checks
from layerwise.cli.analyze import KEYS
from layerwise.cli.opened import checked, open_data, open_model
from layerwise.cli.options import verb
from layerwise.cli.screen import Screen
from layerwise.config import RunConfig

if TYPE_CHECKING:
    from layerwise.model import UniversalModel
    from layerwise.structure import Layer

Pattern = Annotated[str | None, typer.Option("--layers", metavar="REGEX", help="Only layers whose name matches.")]


@verb(*KEYS, "timeout", "force", needs=("model",))
def command(config: RunConfig, screen: Screen, *, layers: Pattern = None) -> None:
    """Reads the structure from one forward pass; data are needed only where the model does not say what it reads."""
    from layerwise.files import write_atomic

    pattern = checks.compiled(layers) if layers is not None else None
    sources = checked(config)
    out = checks.output(config.out, sources, force=config.force) if config.out else None
    model = open_model(config, screen)
    data = open_data(config, model, screen)
    if data is not None:
        model.see(data[0])
    shown = model.layers
    if pattern is not None:
        names = set(checks.matching(pattern, [layer.name for layer in shown]))
        shown = [layer for layer in shown if layer.name in names]
    found = described(model, shown)
    if out:
        import json

        write_atomic(out, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    screen.document(found)
    _show(found, screen)


def described(model: UniversalModel, layers: list[Layer]) -> dict[str, Any]:
    """The model and the given layers as plain data. `macs` are per sample, `shape` is that of the traced output."""
    from layerwise.structure import outside

    rest = outside(model.module, model.layers)
    total = sum({id(p): p.numel() for p in model.module.parameters()}.values())
    return {
        "model": model.name,
        "domain": model.domain,
        "parameters": total,
        "outside": {
            "parameters": sum(p.numel() for _, p in rest),
            "share": sum(p.numel() for _, p in rest) / max(total, 1),
            "names": [name for name, _ in rest],
        },
        "layers": [
            {
                "name": layer.name,
                "index": layer.index,
                "kind": layer.kind,
                "parameters": layer.parameters,
                "macs": layer.macs,
                "shape": list(layer.shape),
                "skippable": layer.skippable,
                "group": layer.group,
                "reason": layer.reason,
            }
            for layer in layers
        ],
    }


def _show(found: dict[str, Any], screen: Screen) -> None:
    from layerwise.report import formats

    screen.say(f"{found['model']} ({found['domain']}): {formats.count(found['parameters'])} parameters")
    rows: list[list[str]] = []
    group: str | None = None
    for position, layer in enumerate(found["layers"]):
        if layer["group"] != group:
            group = layer["group"]
            rows.append([group or "(model)", "", "", "", "", "", ""])
        ends = position + 1 == len(found["layers"]) or found["layers"][position + 1]["group"] != group
        rows.append(
            [
                f"{'└' if ends else '├'} {layer['name']}",
                layer["kind"],
                formats.count(layer["parameters"]),
                formats.macs(layer["macs"]),
                "×".join(str(n) for n in layer["shape"]),
                "yes" if layer["skippable"] else "no",
                layer["reason"] or "keeps shape and type of its input",
            ]
        )
    screen.table(["layer", "kind", "parameters", "MACs", "output", "skip", "why"], rows, right="parameters MACs")
    outside = found["outside"]
    names = ", ".join(outside["names"][:6]) + (", …" if len(outside["names"]) > 6 else "")
    screen.say(
        f"Outside all layers: {formats.count(outside['parameters'])} parameters, {formats.percent(outside['share'])}"
        + (f" ({names})" if names else "")
    )
