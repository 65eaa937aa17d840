"""`MultiModalAnalysis`: what a model's modalities are worth, where they meet, who looks at whom, what a missing one costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from torch import nn

from layerwise.data import Data
from layerwise.errors import DataError
from layerwise.loading import load, load_data
from layerwise.modal_attention import CrossAttention, cross_attention_analysis
from layerwise.modal_game import (
    Complementarity,
    Estimate,
    InteractionStrength,
    Pair,
    missing_cost,
    modal_complementarity,
    modal_game,
    modal_interaction_strength,
)
from layerwise.modal_layers import Fusion, information_fusion_analysis, missing_modality_cost
from layerwise.model import UniversalModel


@dataclass(frozen=True)
class MultiModalReport:
    """The results under the names of their analyses; by layer where that makes sense. Losses and worths are nats per sample."""

    model: str
    modalities: tuple[str, ...]
    task: str
    samples: int
    modal_interaction_strength: InteractionStrength
    modal_complementarity: Mapping[Pair, Complementarity]
    missing_cost: Mapping[str, Estimate]
    information_fusion_analysis: Mapping[str, Fusion]
    missing_modality_cost: Mapping[str, Mapping[str, Estimate]]
    cross_attention_analysis: Mapping[str, CrossAttention]
    notes: tuple[str, ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """One row per layer: the share of every set of modalities, how much the layer is moved, the cost of each missing
        modality and the mass of cross-attention; NaN where a layer has none.
        """
        layers = dict.fromkeys([*self.information_fusion_analysis, *self.missing_modality_cost, *self.cross_attention_analysis])
        return pd.DataFrame([{"layer": name, **self._row(name)} for name in layers])

    def _row(self, layer: str) -> dict[str, float]:
        row: dict[str, float] = {}
        fusion = self.information_fusion_analysis.get(layer)
        if fusion is not None:
            row |= {f"share {'×'.join(names)}": share.value for names, share in fusion.shares.items()} | {
                "moved": fusion.moved.value
            }
        row |= {f"cost without {name}": cost.value for name, cost in self.missing_modality_cost.get(layer, {}).items()}
        attention = self.cross_attention_analysis.get(layer)
        return row | {"cross-attention": attention.cross.value if attention is not None else math.nan}

    def summary(self) -> str:
        """In words: the dearest modality, the pairs, and where the modalities meet."""
        dearest = max(self.missing_cost, key=lambda name: self.missing_cost[name].value)
        lines = [f"{self.model}, {self.task}, {self.samples} samples; nats per sample"]
        lines += [f"without {name} the loss rises by {cost}" for name, cost in self.missing_cost.items()]
        lines.append(f"{dearest} is missed most")
        for (a, b), parts in self.modal_complementarity.items():
            said = (
                f"redundant {parts.redundancy}, only {a} {parts.unique[a]}, only {b} {parts.unique[b]}, synergy {parts.synergy}"
            )
            lines.append(f"{a} and {b}: {said}")
        fused = {name: fusion.fused for name, fusion in self.information_fusion_analysis.items()}
        if fused:
            most = max(fused, key=lambda name: fused[name])
            lines.append(f"the modalities interact most in {most}: {fused[most]:.0%} of what moves it")
        return "\n".join([*lines, *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: pairs and sets of modalities are joined by ×."""
        found: dict[str, Any] = _plain(self)
        return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {"×".join(key) if isinstance(key, tuple) else key: _plain(v) for key, v in value.items()}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class MultiModalAnalysis:
    """All analyses of a model that reads several modalities, on rows that it has not been trained on.

    `batch_size`: samples per batch; two modalities cost 4 passes for the worths, 4 for the fusion, 3 for attention, and for each
    modality a replay of every layer; three cost 8, 8 and 4.
    """

    batch_size: int = 16

    def analyze_multimodal_model(
        self,
        model: str | nn.Module | UniversalModel,
        text_data: Sequence[Any] | None = None,
        image_data: Sequence[Any] | None = None,
        audio_data: Sequence[Any] | None = None,
        *,
        labels: Sequence[Any] | None = None,
        sample_rate: int | None = None,
    ) -> MultiModalReport:
        """Row *i* of each modality belongs together; None inside a sequence is a row without it. `sample_rate`: of `audio_data`
        given as samples.

        Without `labels` the loss is the divergence from the model's own answers. Raises `DataError` LW-D43 for unequal numbers of
        rows, LW-D44 for a modality that no row has, `UsageError` for fewer than two modalities.
        """
        columns = {"text": text_data, "image": image_data, "audio": audio_data, "label": labels}
        given = {name: values for name, values in columns.items() if values is not None}
        rows = _rows(given)
        if sample_rate is not None:
            rows = [{**row, "sample_rate": sample_rate} for row in rows]
        opened = load(model)
        chosen = [name for name in given if name != "label"]
        data = load_data(rows, opened, batch_size=self.batch_size, columns=_roles(given, sample_rate))
        return self.analyze(opened, data, [name for name in opened.adapter.modalities if name in chosen])

    def analyze(self, model: UniversalModel, data: Data, modalities: Sequence[str] | None = None) -> MultiModalReport:
        """The same on data from `load_data`; `modalities` (all) are those that are left out in turn."""
        game = modal_game(model, data, modalities)
        chosen = game.modalities
        assert model.task is not None  # settled by the game
        attention = cross_attention_analysis(model, data, chosen)
        notes = () if attention else ("no attention between positions was seen",)
        return MultiModalReport(
            model=model.name,
            modalities=chosen,
            task=model.task.name,
            samples=game.samples,
            modal_interaction_strength=modal_interaction_strength(game),
            modal_complementarity=modal_complementarity(game),
            missing_cost=missing_cost(game),
            information_fusion_analysis=information_fusion_analysis(model, data, chosen),
            missing_modality_cost=missing_modality_cost(model, data, chosen),
            cross_attention_analysis=attention,
            notes=(*data.notes, *notes),
        )


def _rows(given: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    counts = {name: len(values) for name, values in given.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} of {name}" for name, count in counts.items())
        what = f"The modalities have different numbers of rows: {listed}."
        raise DataError(
            what, place="data", remedy="Row i of each belongs together; None stands for a missing one.", code="LW-D43"
        )
    for name, values in given.items():
        if len(values) and all(value is None for value in values):
            what = f"{name!r} is missing in all {len(values)} rows."
            raise DataError(what, place="data", remedy=f"Leave {name}_data out, or give some.", code="LW-D44")
    return [dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=True)]


def _roles(given: Mapping[str, Any], sample_rate: int | None) -> dict[str, str]:
    return {name: name for name in (*given, *(["sample_rate"] if sample_rate is not None else []))}


__all__ = ["MultiModalAnalysis", "MultiModalReport"]
