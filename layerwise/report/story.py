"""`Story`: everything one report tells, in one language, with what the charts show worked out once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from layerwise.importance import ImportanceReport
from layerwise.plan import CompressionPlan
from layerwise.report import views
from layerwise.report.words import Words
from layerwise.result import CompressionResult


@dataclass(frozen=True)
class Story:
    """The analysis and whatever followed from it; `plan` is the result's own where there is a result."""

    report: ImportanceReport
    say: Words
    plan: CompressionPlan | None = None
    result: CompressionResult | None = None
    leaderboard: pd.DataFrame | None = None
    reproduce: Sequence[str] = ()
    artifacts: Sequence[Mapping[str, Any]] = ()

    @property
    def planned(self) -> CompressionPlan | None:
        """The plan that was carried out, else the one that was given."""
        return self.result.plan if self.result is not None else self.plan

    @cached_property
    def heatmap(self) -> views.Heatmap:
        return views.heatmap(self.report)

    @cached_property
    def concord(self) -> views.Concord:
        return views.concord(self.report)

    @cached_property
    def pareto(self) -> views.Pareto | None:
        return views.pareto(self.planned) if self.planned is not None else None

    def metric(self, name: str) -> str:
        """A metric's name in this language."""
        return self.say.known("metric", name)

    def method(self, name: str) -> str:
        """A method's name; a baseline is called one, and the consensus is a word of the report's own."""
        if name not in self.report.scores:
            return self.say("consensus")
        baseline = self.report.scores[name].settings.get("baseline")
        return self.say("baseline", name=name) if baseline and name not in self.report.voters() else name
