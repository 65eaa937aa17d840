"""The whole walk in one folder: analyze, plan, compress, export, report, track."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layerwise.cli import checks
from layerwise.cli.analyze import KEYS
from layerwise.cli.opened import checked, show_plan, show_result
from layerwise.cli.options import verb
from layerwise.cli.screen import Screen
from layerwise.cli.stopping import Stopped
from layerwise.config import RunConfig
from layerwise.errors import LayerwiseError
from layerwise.runfolder import final_of, partial_of, resume_command

if TYPE_CHECKING:
    from layerwise.run import Outcome

Resume = Annotated[
    Path | None, typer.Option("--resume", metavar="DIR", help="Go on with the unfinished run DIR.", show_default=False)
]
EVALUATION = ("eval_data", "eval_split", "eval_limit")
TRAINING = ("train_data", "train_split", "train_limit")
REFUSALS = {"LW-R23", "LW-C03", "LW-C05", "LW-C07", "LW-C08", "LW-C13"}  # nothing was begun


@verb(
    *KEYS, *EVALUATION, *TRAINING, "recover", "methods", "granularity", "executor", "targets", "ratio", "compress_methods",
    "export", "lang",
    "database", "timeout", "force", needs=("model", "data", "out"),
)  # fmt: skip
def command(config: RunConfig, screen: Screen, *, resume: Resume = None) -> int:
    """Works in OUT.partial, which becomes OUT when all is done. Interrupting keeps what is finished and says how to go on."""
    from layerwise import run as walk

    sources = checked(config)
    final = final_of(Path(config.out or ""))
    checks.apart(final, sources)
    _check_names(config)
    try:
        outcome = walk.run(config, resume=resume is not None, listener=screen)
    except Stopped as stop:
        stop.resume = resume_command(final) if partial_of(final).is_dir() else ""
        raise
    except LayerwiseError as error:
        if error.code not in REFUSALS and partial_of(final).is_dir():
            screen.note(f"What is finished is kept. Go on with: {resume_command(final)}")
        raise
    show_outcome(outcome, screen)
    return 1 if outcome.missed else 0


def show_outcome(outcome: Outcome, screen: Screen) -> None:
    """What came out: plan, figures, proofs, and where everything lies."""
    report = outcome.folder / "report.html"
    screen.document(
        {
            "folder": str(outcome.folder),
            "report": str(report),
            "result": outcome.result.to_dict(),
            "artifacts": list(outcome.artifacts),
            "missed": list(outcome.missed),
        }
    )
    show_plan(outcome.result.plan, screen)
    show_result(outcome.result, screen)
    for artifact in outcome.artifacts:
        screen.say(f"Exported: {outcome.folder / artifact['path']}")
    screen.say(f"Report:   {report}")


def _check_names(config: RunConfig) -> None:
    """Unknown names of methods, targets and formats are told before anything is loaded."""
    from layerwise import engine
    from layerwise.artifact import exporter_for
    from layerwise.run import artifact_of, compressors_of, methods_of, recovery_of
    from layerwise.target import Target

    engine.chosen_analyzers(methods_of(config.methods))
    for text in config.all_targets:
        Target.parse(text)
    compressors_of(config.compress_methods)
    recovery_of(config)
    for entry in config.export:
        name, settings = artifact_of(entry)
        exporter_for(Path(name), settings)
