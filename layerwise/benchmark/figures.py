"""From one subject's raw figures to its statistics: targets with their reliability, correlations, rows per layer."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layerwise.benchmark import ranks
from layerwise.benchmark.protocol import (
    DAMAGES,
    LEAST_COVERAGE,
    LEAST_GAP,
    LEAST_LAYERS,
    LEAST_RELIABILITY,
    METRICS,
    PRIMARY,
    Protocol,
)
from layerwise.importance import spearman, spearman_rows

Record = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """One damage and metric of one subject: values (layers, samples), their means, and bootstrap means (draws, layers)."""

    damage: str
    metric: str
    layers: tuple[str, ...]
    values: np.ndarray
    means: np.ndarray
    draws: np.ndarray
    reliability: float

    @property
    def refused(self) -> str:
        """Why the target does not count; '' if it does."""
        if len(self.layers) < LEAST_LAYERS:
            return f"{len(self.layers)} layers"
        return "" if self.reliability >= LEAST_RELIABILITY else f"reliability {self.reliability:.2f}"


def targets_of(study: Mapping[str, Any], protocol: Protocol) -> list[Target]:
    """Every damage and metric that was measured, in the protocol's order."""
    weights = np.asarray(study["damages"]["weights"])
    found = []
    for damage in DAMAGES:
        for metric in METRICS:
            table = study["damages"]["tables"].get(f"{damage}/{metric}")
            if table:
                found.append(_target(damage, metric, table, weights, protocol))
    return found


def _target(damage: str, metric: str, table: Mapping[str, Sequence[float]], weights: np.ndarray, protocol: Protocol) -> Target:
    generator = np.random.default_rng(protocol.seed)
    values = np.array(list(table.values()))
    draws = ranks.resampled(values, weights, protocol.bootstraps, generator)
    trust = ranks.reliability(values, weights, protocol.halves, generator) if len(table) > 2 else math.nan
    return Target(damage, metric, tuple(table), values, values.sum(1) / weights.sum(), draws, trust)


def correlations(study: Mapping[str, Any], targets: Sequence[Target], protocol: Protocol) -> list[Record]:
    """One record per method and target that counts, with the statistics of the protocol."""
    layers = {x["layer"]: x for x in study["layers"]}
    records = []
    for target in targets:
        if target.refused:
            continue
        for method, found in study["methods"].items():
            record = _correlation(found.get("scores", {}), target, layers, protocol)
            if record is not None:
                records.append({"model": study["model"], "method": method} | record)
    return records


def _correlation(scores: Mapping[str, float], target: Target, layers: Mapping[str, Any], protocol: Protocol) -> Record | None:
    at = [i for i, name in enumerate(target.layers) if name in scores]
    if len(at) < max(LEAST_LAYERS, LEAST_COVERAGE * len(target.layers)):
        return None
    names = [target.layers[i] for i in at]
    x, y = np.array([scores[name] for name in names]), target.means[at]
    covariates = [np.array([layers[n]["depth"] for n in names]), np.log([layers[n]["parameters"] for n in names])]
    rho = _or_zero(spearman(x, y))
    draws = np.nan_to_num(spearman_rows(np.broadcast_to(x, target.draws[:, at].shape), target.draws[:, at]))
    low, high = np.percentile(draws, [2.5, 97.5])
    return {
        "damage": target.damage,
        "metric": target.metric,
        "layers": len(at),
        "rho": rho,
        "low": float(low),
        "high": float(high),
        "tau": _or_zero(ranks.kendall(x, y)),
        "p": ranks.permutation_p(x, y, protocol.permutations, np.random.default_rng(protocol.seed)),
        "partial": ranks.partial_spearman(x, y, covariates),
        "score": rho / math.sqrt(target.reliability),
    }


def _or_zero(value: float) -> float:
    """A method whose scores are all the same says nothing: 0, not unknown."""
    return 0.0 if math.isnan(value) else value


def rows(study: Mapping[str, Any], targets: Sequence[Target]) -> list[Record]:
    """One row per layer and damage (primary metric), with the score of each method as ``score.<method>``."""
    kl = {(t.damage, name): t.means[i] for t in targets if t.metric == "kl" for i, name in enumerate(t.layers)}
    place = {x["layer"]: x for x in study["layers"]}
    found = []
    for target in (t for t in targets if t.metric == PRIMARY):
        for i, name in enumerate(target.layers):
            row = {"model": study["model"], "domain": study["domain"], "layer": name}
            row |= {key: place[name][key] for key in ("depth", "parameters", "kind")}
            row |= {"op": target.damage, "damage": float(target.means[i]), "damage_stderr": float(target.draws[:, i].std(ddof=1))}
            row |= {"kl": float(kl[target.damage, name]), "reliability": target.reliability}
            row |= {f"score.{m}": f["scores"].get(name) for m, f in study["methods"].items() if "failure" not in f}
            found.append(row)
    return found


def method_records(study: Mapping[str, Any]) -> list[Record]:
    """One record per method: cost, coverage, stability, sanity, curve, allocation; or its failure."""
    gap = _gap(study["curves"])
    able = {x["layer"] for x in study["layers"] if x["skippable"]}
    every = {x["layer"] for x in study["layers"]}
    records = []
    for method, found in study["methods"].items():
        record: Record = {"model": study["model"], "method": method, "failure": found.get("failure", "")}
        if "failure" not in found:
            record |= {
                "passes": found["passes"],
                "counts": found["counts"],
                "coverage": len(found["scores"]) / len(study["layers"]),
                "stability": _agreement(found["scores"], found.get("second", {})),
                "noise": _agreement(found["scores"], found.get("noise", {})),
                "changed": _changed(found["scores"], found.get("noise", {})),
            }
            if gap is not None and _covers(found["scores"], able):
                record["auc"] = (study["curves"]["methods"][method] - gap[0]) / gap[1]
            if _covers(found["scores"], every):
                dce = study["allocation"]["methods"][method]["dce"]
                record |= {"dce": dce, "beats": _beaten(dce, study["allocation"]["random rankings"])}
        records.append(record)
    return records


def _gap(curves: Mapping[str, Any]) -> tuple[float, float] | None:
    """(A_random, A_greedy − A_random), or None where the gap is too small to divide by."""
    chance = float(np.mean(curves["random orders"]))
    gap = curves["methods"]["greedy"] - chance
    return (chance, gap) if gap >= LEAST_GAP else None


def _covers(scores: Mapping[str, float], layers: Collection[str]) -> bool:
    return len(scores.keys() & layers) >= LEAST_COVERAGE * len(layers)


def _beaten(dce: float, others: Sequence[float]) -> float:
    """The share of `others` that are worse, ties counting half."""
    return float(np.mean([(dce < other) + 0.5 * (dce == other) for other in others]))


def _agreement(first: Mapping[str, float], second: Mapping[str, float]) -> float:
    common = [name for name in first if name in second]
    return spearman(np.array([first[n] for n in common]), np.array([second[n] for n in common]))


def _changed(first: Mapping[str, float], noise: Mapping[str, float]) -> bool | None:
    """Whether the scores of weights drawn anew are others; None where there are none."""
    common = [name for name in first if name in noise]
    return None if not common else not np.allclose([first[n] for n in common], [noise[n] for n in common], rtol=1e-9, atol=0)


def target_records(study: Mapping[str, Any], targets: Sequence[Target]) -> list[Record]:
    """One record per target: reliability, and why it does not count."""
    return [
        {"model": study["model"], "damage": t.damage, "metric": t.metric, "layers": len(t.layers)}
        | {"reliability": t.reliability, "largest": float(t.means.max()), "refused": t.refused}
        for t in targets
    ]


def subject_records(study: Mapping[str, Any], protocol: Protocol) -> dict[str, Any]:
    """All records of one subject."""
    targets = targets_of(study, protocol)
    gap = _gap(study["curves"])
    about = {k: study[k] for k in ("model", "domain", "about", "shares", "notes", "quality", "samples", "fingerprint")}
    about |= {
        "layers": len(study["layers"]),
        "skippable": sum(x["skippable"] for x in study["layers"]),
        "curve": {"random": float(np.mean(study["curves"]["random orders"])), "greedy": study["curves"]["methods"]["greedy"]},
        "curve_counts": gap is not None,
        "allocation": {
            "random": float(np.mean(study["allocation"]["random rankings"])),
            "one width": study["allocation"]["one width"],
        },
    }
    return {
        "subjects": [about],
        "targets": target_records(study, targets),
        "correlations": correlations(study, targets, protocol),
        "methods": method_records(study),
        "rows": rows(study, targets),
    }
