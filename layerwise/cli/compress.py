"""Carry out a plan, prove the cut, and save the smaller model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layerwise.cli import checks
from layerwise.cli.analyze import KEYS
from layerwise.cli.opened import checked, open_data, open_model, show_result
from layerwise.cli.options import verb
from layerwise.cli.screen import Screen
from layerwise.config import RunConfig
from layerwise.errors import UsageError

if TYPE_CHECKING:
    from layerwise.model import UniversalModel
    from layerwise.plan import CompressionPlan

PlanFile = Annotated[Path | None, typer.Option("--plan", help="The plan of `layerwise plan --out`.", show_default=False)]
Method = Annotated[str | None, typer.Option("--method", help="Instead of a plan: one method, on --layers.", show_default=False)]
Pattern = Annotated[
    str | None, typer.Option("--layers", metavar="REGEX", help="The layers that --method treats.", show_default=False)
]


@verb(*KEYS, "timeout", "force", needs=("model", "data"))
def command(config: RunConfig, screen: Screen, *, plan: PlanFile = None, method: Method = None, layers: Pattern = None) -> int:
    """The original is left alone; both models are measured side by side on --data. --out FOLDER keeps the model."""
    from layerwise import engine
    from layerwise.run import require_proven

    if (plan is None) == (method is None):
        raise UsageError("Give either --plan FILE or --method NAME.", place="--plan", remedy="See --help.", code="LW-C03")
    pattern = checks.compiled(layers or "")
    sources = [*checked(config), *([checks.readable(plan, "--plan")] if plan else [])]
    out = checks.output(config.out, sources, force=config.force, kind="folder") if config.out else None
    model = open_model(config, screen)
    data = open_data(config, model, screen)
    assert data is not None  # needed above
    model.see(data[0])
    steps = _plan(model, plan, method, pattern)
    with screen.progress("Cutting and proving") as progress:
        result = engine.compress(model, steps, data, progress=progress)
    screen.document(result.to_dict())
    show_result(result, screen)
    require_proven(result)
    if out:
        result.save(out, force=config.force)
        screen.say(f"Saved: {out}")
    return 1 if result.missed() else 0


def _plan(model: UniversalModel, file: Path | None, method: str | None, pattern: re.Pattern[str]) -> CompressionPlan:
    """The plan in `file`, or the one step that the flags describe."""
    from layerwise.method import METHODS, step_of
    from layerwise.plan import CompressionPlan

    if file is not None:
        return CompressionPlan.load(file)
    assert method is not None  # one of the two is given
    chosen = METHODS[method]()
    names = checks.matching(pattern, [layer.name for layer in model.layers])
    return CompressionPlan((step_of(chosen, names),), model=model.fingerprint)
