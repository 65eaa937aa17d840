"""Write a model as an artifact for another runtime, and check that it computes the same."""

from __future__ import annotations

from layerwise.cli import checks
from layerwise.cli.analyze import KEYS
from layerwise.cli.opened import checked, open_data, open_model, words
from layerwise.cli.options import verb
from layerwise.cli.screen import Screen
from layerwise.config import RunConfig


@verb(*KEYS, "timeout", "force", needs=("model", "out"))
def command(config: RunConfig, screen: Screen) -> None:
    """The suffix of --out names the format. MODEL may be a folder that `compress` or `run` saved."""
    from layerwise import engine

    out = checks.output(config.out, checked(config), force=config.force)
    model = open_model(config, screen)
    data = open_data(config, model, screen)
    with screen.progress("Exporting"):
        artifact = engine.export(model, out, data, force=config.force)
    facts = artifact.to_dict()
    screen.document(facts)
    screen.say(f"Saved: {out}")
    screen.say(words(facts))
