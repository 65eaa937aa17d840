"""What a row says: `CompressionResult`, a reported figure or an `ImportanceReport` → column values. No database here.

Decision: a row's key covers what makes a measurement the same one (plan, model, data, device, seed and its quality), and not
what varies between two looks at it (time, latency, folder): telling the same result twice gives one row.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, Any

from layerwise.errors import UsageError, nearest, printable
from layerwise.result import CompressionResult
from layerwise.tracking.models import DOMAINS, plain

if TYPE_CHECKING:
    from layerwise.importance import ImportanceReport

PACKAGES = (
    "layerwise", "torch", "numpy", "transformers", "timm", "torchvision", "torchaudio", "torchao", "torch-pruning", "onnxruntime",
)  # fmt: skip
FIGURES = ("low", "high", "tau", "p", "partial", "score")
CORRELATION = ("model", "method", "damage", "metric", "layers", "rho")
REPORTED: dict[str, Any] = {
    "domain": "other",
    "data": "",
    "data_fingerprint": "",
    "fingerprint": "",
    "device": "",
    "seed": 0,
    "source": {},
    "methods": (),
    "before": {},
    "folder": None,
    "parent": None,
}


def measured_values(result: CompressionResult, name: str | None, folder: object) -> dict[str, Any]:
    """The columns of `Run` for a measured `result`, but for the links to other rows."""
    facts = result.original
    values = _identity(name or facts.get("name") or "unnamed", facts, result.after.device)
    values |= {
        "plan_digest": result.plan.digest,
        "plan": result.plan.to_dict(),
        "methods": list(dict.fromkeys(step.method for step in result.plan.steps)),
        "analyzers": [str(method) for method in facts.get("methods") or ()],
        "ratio": result.ratio if result.before.size else None,
        "before": result.before.to_dict(),
        "after": result.after.to_dict(),
        "proofs": [proof.to_dict() for proof in result.proofs],
        # `result.proven` also holds where nothing was checked; a leaderboard wants a check that passed.
        "proven": result.proven and any(proof.passed for proof in result.proofs),
        "seed": int(facts.get("seed", result.plan.seed)),
        "folder": None if folder is None else str(folder),
    }
    names = ("plan_digest", "fingerprint", "data_fingerprint", "device", "seed")
    return values | {"key": digest([*(values[n] for n in names), result.after.metrics])}


def reported_values(model: str, task: str, ratio: float, metrics: Mapping[str, float], more: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of `Run` for figures that somebody reports without a plan or a proof; such a row is never `proven`.

    Raises `UsageError` for a ratio or metric that is no number, and for an unknown key in `more`.
    """
    unknown = more.keys() - REPORTED.keys()
    if unknown:
        first = min(unknown)
        raise UsageError(f"Unknown field {first!r}.", remedy=nearest(first, REPORTED))
    if not (_is_number(ratio) and math.isfinite(ratio) and ratio > 0):
        raise UsageError(f"The compression ratio {ratio!r} is not a positive number.", remedy="0.5 means half the bytes.")
    wrong = [name for name, value in metrics.items() if not _is_number(value)]
    if wrong:
        raise UsageError(f"The metric {wrong[0]!r} is {metrics[wrong[0]]!r}, which is not a number.")
    facts = REPORTED | dict(more)
    values = _identity(model, facts | {"task": task}, facts["device"])
    values |= {
        "plan_digest": "",
        "plan": {},
        "methods": [str(method) for method in facts["methods"]],
        "analyzers": [],
        "ratio": float(ratio),
        "before": {"metrics": dict(facts["before"])},
        "after": {"metrics": dict(metrics)},
        "proofs": [],
        "proven": False,
        "seed": int(facts["seed"]),
        "folder": None if facts["folder"] is None else str(facts["folder"]),
    }
    return values | {"key": digest(["reported", {k: v for k, v in values.items() if k not in {"created", "software"}}])}


def score_values(report: ImportanceReport) -> tuple[str, list[dict[str, Any]]]:
    """The digest of `report` and the columns of one `LayerScoreRow` per layer and method."""
    name, created = digest(report.to_dict()), datetime.now(UTC)
    rows = [
        {
            "report": name,
            "created": created,
            "model": printable(report.model),
            "fingerprint": report.fingerprint,
            "domain": known_domain(report.domain),
            "task": printable(report.task),
            "data": printable(report.data),
            "method": method,
            "layer": layer.name,
            "position": layer.index,
            "score": _finite(scores.entries[layer.name].value),
            "stderr": _finite(scores.entries[layer.name].stderr),
            "rank": ranks.get(layer.name),
            "status": str(scores.entries[layer.name].status),
            "seconds": float(scores.seconds),
            "samples": int(scores.samples),
        }
        for method, scores in report.scores.items()
        for ranks in [scores.ranks()]
        for layer in report.layers
    ]
    return name, rows


def faithfulness_values(results: Mapping[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """The digest of a benchmark's correlations and the columns of one `FaithfulnessRow` for each of them.

    `results` are those of ``layerwise benchmark faithfulness``. Raises `UsageError` for anything else.
    """
    absent = [key for key in ("protocol", "subjects", "correlations") if key not in results]
    if absent:
        raise UsageError(f"These are no results of the faithfulness benchmark: {absent[0]!r} is absent.")
    protocol, entries = results["protocol"], results["correlations"]
    name, created = digest([protocol, entries]), datetime.now(UTC)
    domains = {subject["model"]: known_domain(subject["domain"]) for subject in results["subjects"]}
    fixed = {"benchmark": name, "created": created, "protocol": int(protocol["version"])}
    return name, [
        fixed
        | {"domain": domains[entry["model"]]}
        | {key: entry[key] for key in CORRELATION}
        | {key: _known(entry[key]) for key in FIGURES}
        for entry in entries
    ]


def digest(values: Any) -> str:
    """SHA-256 (hex) over the canonical JSON of `values`."""
    text = json.dumps(plain(values), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def known_domain(domain: object) -> str:
    """`domain`, or ``other`` for one that has no leaderboard of its own."""
    return str(domain) if str(domain) in DOMAINS else "other"


@cache
def software() -> dict[str, str]:
    """Versions of Python, the platform and the installed packages that make the numbers; nothing is imported."""
    return {"python": platform.python_version(), "platform": platform.platform()} | dict(_versions(PACKAGES))


def _versions(packages: Iterable[str]) -> Iterable[tuple[str, str]]:
    for package in packages:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            continue


def _identity(name: object, facts: Mapping[str, Any], device: object) -> dict[str, Any]:
    return {
        "created": datetime.now(UTC),
        "model": printable(str(name)),
        "source": dict(facts.get("source") or {}),
        "fingerprint": str(facts.get("fingerprint") or ""),
        "domain": known_domain(facts.get("domain")),
        "task": printable(str(facts.get("task") or "")),
        "data": printable(str(facts.get("data") or "")),
        "data_fingerprint": str(facts.get("data_fingerprint") or ""),
        "device": printable(str(device or "")),
        "software": software(),
    }


def _is_number(value: object) -> bool:
    return isinstance(plain(value), (int, float, dict)) and not isinstance(value, (bool, Mapping))


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _known(value: float | None) -> float | None:
    return None if value is None else _finite(value)
