"""Write a model as an artifact for another runtime, and check that it computes the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerwise.cli import checks
from layerwise.cli.analyze import KEYS
from layerwise.cli.opened import checked, open_data, open_model, show_figures
from layerwise.cli.options import verb
from layerwise.cli.screen import Screen
from layerwise.config import RunConfig
from layerwise.errors import UsageError

if TYPE_CHECKING:
    from layerwise.artifact import Artifact

Quantize = Annotated[
    str | None, typer.Option("--quantize", help="ONNX with 8-bit nodes: auto, static or dynamic.", show_default=False)
]
Keep = Annotated[
    str | None, typer.Option("--keep", metavar="REGEX", help="With --quantize: layers that stay float.", show_default=False)
]
Calibration = Annotated[
    str | None,
    typer.Option("--calibration", metavar="DATA", help="With --quantize: watch activations on this data.", show_default=False),
]

Split = Annotated[
    str | None, typer.Option("--calibration-split", help="Which part of --calibration, such as train.", show_default=False)
]


@verb(*KEYS, "timeout", "force", needs=("model", "out"))
def command(
    config: RunConfig,
    screen: Screen,
    *,
    quantize: Quantize = None,
    keep: Keep = None,
    calibration: Calibration = None,
    calibration_split: Split = None,
) -> None:
    """The suffix of --out names the format. MODEL may be a folder that `compress` or `run` saved."""
    from layerwise import engine, run
    from layerwise.artifact import exporter_for

    settings = {key: value for key, value in (("quantize", quantize), ("keep", keep)) if value is not None}
    if calibration is not None and not quantize:
        what = "Only with --quantize are activations watched."
        raise UsageError(what, place="--calibration", remedy="Add --quantize auto.", code="LW-C03")
    source = checks.local_path(calibration)
    sources = [*checked(config), *([checks.readable(source, "--calibration", kind="any")] if source else [])]
    out = checks.output(config.out, sources, force=config.force)
    exporter_for(out, settings)  # before anything is loaded
    model = open_model(config, screen)
    data = open_data(config, model, screen)
    watched = run.open_data(config, model, calibration, calibration_split, config.limit) if calibration else None
    with screen.progress("Exporting"):
        artifact = engine.export(model, out, data, force=config.force, calibration=watched, **settings)
    screen.document(artifact.to_dict())
    show_artifact(artifact, screen)


def show_artifact(artifact: Artifact, screen: Screen) -> None:
    """Where it lies, how near it is to torch, what there is to say; of a quantized one both files side by side."""
    parity = artifact.parity
    screen.say(f"Saved: {artifact.path} ({artifact.bytes:,} bytes, SHA-256 {artifact.sha256})")
    screen.say(
        f"Run by {artifact.runtime} on {parity.samples} samples: largest difference to torch {parity.absolute:.3g}, "
        f"relative {parity.relative:.3g}, bound {parity.bound:g}."
    )
    for note in artifact.notes:
        screen.say(f"- {note}")
    if "int8" in artifact.figures:
        before, after = (_figures(artifact.figures[kind]) for kind in ("float32", "int8"))
        show_figures(before, after, screen, f"float32 and 8-bit in onnxruntime, {artifact.figures['int8']['samples']:,} samples")


def _figures(of: dict[str, Any]) -> dict[str, float]:
    return {"size": float(of["bytes"]), "latency": of["latency"], **of["metrics"]}
