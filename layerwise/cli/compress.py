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
from layerwise.spec import built, split_specs

if TYPE_CHECKING:
    from layerwise.method import CompressionMethod
    from layerwise.model import UniversalModel
    from layerwise.plan import CompressionPlan, Step

TRAINING = ("train_data", "train_split", "train_limit")
PlanFile = Annotated[Path | None, typer.Option("--plan", help="The plan of `layerwise plan --out`.", show_default=False)]
Method = Annotated[
    str | None,
    typer.Option(
        "--method", help="Instead of a plan: NAME or NAME(setting=value), with commas, on --layers.", show_default=False
    ),
]
Pattern = Annotated[
    str | None,
    typer.Option(
        "--layers", metavar="REGEX", help="The layers that --method treats; by default all that it can.", show_default=False
    ),
]


@verb(*KEYS, *TRAINING, "timeout", "force", needs=("model", "data"))
def command(config: RunConfig, screen: Screen, *, plan: PlanFile = None, method: Method = None, layers: Pattern = None) -> int:
    """The original is left alone; both models are measured side by side on --data. --out FOLDER keeps the model.

    Methods that learn (fine_tune, distill) do so on --train-data.
    """
    from layerwise import engine
    from layerwise.method import METHODS
    from layerwise.plan import CompressionPlan
    from layerwise.run import open_training, require_proven, trainable

    if (plan is None) == (method is None):
        raise UsageError("Give either --plan FILE or --method NAME.", place="--plan", remedy="See --help.", code="LW-C03")
    pattern = checks.compiled(layers or "")
    chosen = [built(METHODS, spec) for spec in split_specs(method or "")]  # a wrong name is told before minutes of loading
    for one in chosen:
        trainable(config, one)
    sources = [*checked(config), *([checks.readable(plan, "--plan")] if plan else [])]
    out = checks.output(config.out, sources, force=config.force, kind="folder") if config.out else None
    model = open_model(config, screen)
    data = open_data(config, model, screen)
    assert data is not None  # needed above
    model.see(data[0])
    steps = CompressionPlan.load(plan) if plan else _plan(model, chosen, pattern, screen)
    training = open_training(config, model)
    with screen.progress("Cutting and proving") as progress:
        result = engine.compress(model, steps, data, training=training, progress=progress)
    screen.document(result.to_dict())
    show_result(result, screen)
    require_proven(result)
    if out:
        result.save(out, force=config.force)
        screen.say(f"Saved: {out}")
    return 1 if result.missed() else 0


def _plan(model: UniversalModel, methods: list[CompressionMethod], pattern: re.Pattern[str], screen: Screen) -> CompressionPlan:
    """One step for each of the methods that the flags describe."""
    from layerwise.plan import CompressionPlan

    names = checks.matching(pattern, [layer.name for layer in model.layers])
    steps = [_step(method, model, names, screen, chosen=bool(pattern.pattern)) for method in methods]
    return CompressionPlan(tuple(steps), model=model.fingerprint)


def _step(method: CompressionMethod, model: UniversalModel, names: list[str], screen: Screen, *, chosen: bool) -> Step:
    """`method` on the layers `names`; where nobody has `chosen` them, those that it cannot treat are left out and named."""
    from layerwise.method import step_of, untreated

    if method.trains:
        return step_of(method, ())
    refused = {} if chosen else untreated(method, model, names)
    if len(refused) == len(names):
        return step_of(method, names)  # nothing is left, and the reason is told
    for name, reason in refused.items():
        screen.note(f"{method.name} leaves {name} as it is: {reason}")
    return step_of(method, [name for name in names if name not in refused])
