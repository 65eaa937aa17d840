"""`CompressionPlan`: what to do to which layers, in order, as plain data with an exact JSON/YAML round trip.

The plan is also half of the save format: replayed on the original class it rebuilds the changed model, which then takes
its weights from safetensors. Its `digest` covers the model and the steps, not the evidence that led to them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from layerwise.errors import ConfigError
from layerwise.target import Target
from layerwise.verb import make_callable

FORMAT = 1


@dataclass(frozen=True)
class Step:
    """Apply the compression `method` with `settings` to `layers` (dotted paths of the original model)."""

    method: str
    layers: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.method, "layers": list(self.layers), "settings": dict(self.settings)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Step:
        return cls(data["method"], tuple(data["layers"]), dict(data["settings"]))

    def __hash__(self) -> int:
        return hash(_canonical(self.to_dict()))


@dataclass(frozen=True)
class Candidate:
    """One alternative the planner measured: its steps and every figure, relative to nothing (own units)."""

    steps: tuple[Step, ...]
    figures: Mapping[str, float]
    feasible: bool

    def to_dict(self) -> dict[str, Any]:
        return {"steps": [s.to_dict() for s in self.steps], "figures": dict(self.figures), "feasible": self.feasible}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Candidate:
        return cls(tuple(Step.from_dict(s) for s in data["steps"]), dict(data["figures"]), data["feasible"])


@dataclass(frozen=True)
class CompressionPlan:
    """Ordered `steps` for the model with this fingerprint, the `targets` they were chosen for, and the evidence.

    `before` and `predicted` are measured figures (metric → value) of the uncompressed and the planned model on the planning data.
    """

    steps: tuple[Step, ...]
    model: str = ""
    targets: tuple[Target, ...] = ()
    seed: int = 0
    before: Mapping[str, float] = field(default_factory=dict)
    predicted: Mapping[str, float] = field(default_factory=dict)
    candidates: tuple[Candidate, ...] = ()
    notes: tuple[str, ...] = ()  # what the planner left out, and why
    evidence: Mapping[str, Any] = field(
        default_factory=dict
    )  # what the choice was made from: the table, the moves, the work done

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over model and steps: two plans with equal digests do the same thing."""
        core = {"model": self.model, "steps": [s.to_dict() for s in self.steps]}
        return hashlib.sha256(_canonical(core).encode()).hexdigest()

    def __hash__(self) -> int:
        return hash(self.digest)

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model": self.model,
            "seed": self.seed,
            "targets": [str(t) for t in self.targets],
            "steps": [s.to_dict() for s in self.steps],
            "before": dict(self.before),
            "predicted": dict(self.predicted),
            "candidates": [c.to_dict() for c in self.candidates],
            "notes": list(self.notes),
            **({"evidence": dict(self.evidence)} if self.evidence else {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CompressionPlan:
        """The inverse of `to_dict`. Raises `ConfigError` on a newer format or a missing key."""
        if not isinstance(data, Mapping) or not isinstance(data.get("format"), int):
            raise ConfigError("This is not a layerwise plan: the key 'format' is missing.")
        if data["format"] > FORMAT:
            raise ConfigError(
                f"The plan has format {data['format']}, this version reads up to {FORMAT}.", remedy="Update layerwise."
            )
        try:
            return cls(
                steps=tuple(Step.from_dict(s) for s in data["steps"]),
                model=data["model"],
                targets=tuple(Target.parse(t) for t in data["targets"]),
                seed=data["seed"],
                before=dict(data["before"]),
                predicted=dict(data["predicted"]),
                candidates=tuple(Candidate.from_dict(c) for c in data["candidates"]),
                notes=tuple(data["notes"]),
                evidence=dict(data.get("evidence", {})),
            )
        except (KeyError, TypeError) as error:
            raise ConfigError(f"The plan is incomplete: {error!r}.") from error

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> CompressionPlan:
        return cls.from_dict(json.loads(text))

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)  # ASCII: YAML folds some Unicode line breaks

    @classmethod
    def from_yaml(cls, text: str) -> CompressionPlan:
        return cls.from_dict(yaml.safe_load(text))

    def to_format(self, name: str, about: Any = None) -> str:
        """The plan for another tool, ``llama.cpp``, ``torchao``, ``llm-compressor`` or ``onnx``: see `layerwise.plan_formats`."""
        from layerwise.plan_formats import to_format  # it stands on this module

        return to_format(self, name, about)

    @classmethod
    def load(cls, path: str | Path) -> CompressionPlan:
        """Reads ``plan.yaml`` or ``plan.json``. Raises `ConfigError` naming the file."""
        try:
            return cls.from_yaml(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"Cannot read the plan: {error}", place=str(path)) from error


def asks_energy(plan: CompressionPlan) -> bool:
    """Whether one of its targets is on energy, which takes half a second more to measure."""
    return any(target.metric == "energy" for target in plan.targets)


def _canonical(data: Any) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


make_callable(__name__)
