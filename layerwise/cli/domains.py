"""List the fields of application: what suits each, and which of their data sets are here."""

from __future__ import annotations

from layerwise.cli.options import verb
from layerwise.cli.screen import Screen
from layerwise.config import RunConfig


@verb()
def command(config: RunConfig, screen: Screen) -> None:
    """The presets of `layerwise.domains`; nothing is read but whether data sets are there."""
    from layerwise.domains import ROWS, data_home

    rows = [
        {
            "domain": d.name, "area": d.area, "adapter": d.adapter, "task": d.task, "metrics": list(d.metrics), "notes": d.notes,
            "datasets": [{"name": s.name, "spec": s.spec, "terms": s.terms, "there": s.there} for s in d.datasets],
        }
        for d in ROWS
    ]  # fmt: skip
    screen.document({"data": str(data_home().absolute()), "domains": rows})
    shown = [
        [d.name, d.adapter, d.task, ", ".join(f"{s.name}{'' if s.there else ' (absent)'}" for s in d.datasets)] for d in ROWS
    ]
    screen.table(["field", "adapter", "task", "data sets"], shown)
