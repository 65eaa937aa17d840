"""Rank a model's layers by how much they matter."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from layerwise.cli import checks
from layerwise.cli.opened import checked, open_data, open_model, show_report
from layerwise.cli.options import verb
from layerwise.cli.screen import Screen
from layerwise.config import RunConfig

MODEL = ("model", "weights", "head", "task")
DATA = (
    "data", "split", "limit", "batch_size", "text_column", "text_pair_column", "image_column", "audio_column", "x_columns",
    "smiles_column", "label_column", "label_columns", "target_column", "answer_column", "max_bad_shards",
)  # fmt: skip
KEYS = (*MODEL, *DATA)


@verb(*KEYS, "methods", "granularity", "executor", "timeout", "force", needs=("model",))
def command(config: RunConfig, screen: Screen) -> None:
    """Without --data only methods that read weights can be used. --out FILE.json keeps the report for `plan`.

    The model may be weights:FILE_OR_FOLDER: its layers are ranked tensor by tensor, without building the model.
    """
    from layerwise import engine
    from layerwise.files import write_atomic
    from layerwise.run import methods_of
    from layerwise.units import granularities

    sources = checked(config)
    out = checks.output(config.out, sources, force=config.force) if config.out else None
    engine.chosen_analyzers(methods_of(config.methods))  # an unknown name is told before minutes of loading
    granularities(config.granularity)
    model: Any = config.model
    data: Any = config.data
    if not model.startswith("weights:"):
        model = open_model(config, screen)
        data = open_data(config, model, screen)
    with screen.progress("Ranking the layers") as progress:
        report = engine.analyze(
            model, data, methods_of(config.methods), seed=config.seed, progress=progress, executor=config.executor,
            granularity=config.granularity,
        )  # fmt: skip
    if out:
        write_atomic(out, report.to_json() + "\n")
    screen.document(report.to_dict() | {"disagreements": [asdict(pair) for pair in report.disagreements()]})
    show_report(report, screen)
    if out:
        screen.say(f"Saved: {out}")
