"""Choose what to cut so that a budget is met."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerwise.cli import checks
from layerwise.cli.analyze import KEYS
from layerwise.cli.opened import checked, open_data, open_model, show_plan
from layerwise.cli.options import verb
from layerwise.cli.screen import Screen
from layerwise.config import RunConfig
from layerwise.errors import UsageError

ReportFile = Annotated[
    Path | None, typer.Option("--report", help="The report of `layerwise analyze --out`, or a run's folder.", show_default=False)
]


@verb(*KEYS, "targets", "ratio", "compress_methods", "timeout", "force", needs=("model", "data"))
def command(config: RunConfig, screen: Screen, *, report: ReportFile = None) -> None:
    """Candidates come from the scores, decisions from measurements on --data. --out FILE.yaml keeps the plan."""
    from layerwise import engine
    from layerwise.files import write_atomic
    from layerwise.importance import ImportanceReport
    from layerwise.run import compressors_of
    from layerwise.target import Target

    if report is None:
        raise UsageError("--report is missing: the file that `layerwise analyze --out` wrote.", code="LW-C03")
    if not config.all_targets:
        raise UsageError("--targets is missing: the budget.", remedy="Write for example --targets 'size<=0.5x'.", code="LW-C03")
    compressors = compressors_of(config.compress_methods)  # an unknown name is told before minutes of loading
    targets = [Target.parse(text) for text in config.all_targets]
    sources = [*checked(config), checks.readable(report, "--report", kind="any")]
    out = checks.output(config.out, sources, force=config.force) if config.out else None
    scores = ImportanceReport.load(report)
    model = open_model(config, screen)
    data = open_data(config, model, screen)
    with screen.progress("Choosing what to cut") as progress:
        found = engine.plan(model, scores, targets, data, compressors, seed=config.seed, progress=progress)
    if out:
        write_atomic(out, found.to_yaml())
    screen.document(found.to_dict())
    show_plan(found, screen)
    if out:
        screen.say(f"Saved: {out}")
