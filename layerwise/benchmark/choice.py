"""Over all subjects: the combined table of methods, and the rule of the protocol that chooses ``methods="auto"``."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata

from layerwise.benchmark import ranks
from layerwise.benchmark.protocol import (
    AUTO_COVERAGE,
    AUTO_GAIN,
    AUTO_PASSES,
    BASELINES,
    COMPOSITE,
    DAMAGES,
    LEAST_COVERAGE,
    LEAST_LAYERS,
    LEAST_RELIABILITY,
    PRIMARY,
    YARDSTICK,
)
from layerwise.importance import spearman

Record = Mapping[str, Any]


def overall(results: Mapping[str, Any], metric: str = PRIMARY) -> list[dict[str, Any]]:
    """One record per method, best first: combined rho, interval, Holm's p, partial rho, per damage, curve, allocation, cost."""
    found = [r for r in results["correlations"] if r["metric"] == metric]
    methods = sorted({r["method"] for r in results["methods"]})
    even = {s["model"]: s["allocation"]["one width"] for s in results["subjects"]}
    table = []
    for method in methods:
        mine = [r for r in found if r["method"] == method]
        rho, low, high, p = _over_models(mine, "rho")
        partial, _, _, partial_p = _over_models(mine, "partial")
        record = {"method": method, "baseline": method in BASELINES, "models": len({r["model"] for r in mine})}
        record |= {"rho": rho, "low": low, "high": high, "p": p, "partial": partial, "partial_p": partial_p}
        record |= {"score": _over_models(mine, "score")[0]}
        record |= {d: _over_models([r for r in mine if r["damage"] == d], "rho")[0] for d in DAMAGES}
        ran = [r for r in results["methods"] if r["method"] == method]
        ahead = [r["dce"] < even[r["model"]] for r in ran if r.get("dce") is not None]
        record |= {"even": _mean([float(x) for x in ahead]), "wins": sum(ahead), "played": len(ahead)}
        table.append(record | _means(ran))
    for key in ("p", "partial_p"):
        for record, adjusted in zip(table, ranks.holm([r[key] for r in table]), strict=True):
            record[key] = adjusted
    return sorted(table, key=lambda r: (math.isnan(r["rho"]), -r["rho"] if r["rho"] == r["rho"] else 0.0, r["method"]))


def _over_models(records: Sequence[Record], key: str) -> tuple[float, float, float, float]:
    """The combination over models of the mean z over each model's damages."""
    zs: dict[str, list[float]] = {}
    layers: dict[str, int] = {}
    for r in records:
        if r[key] is not None and not math.isnan(r[key]):
            zs.setdefault(r["model"], []).append(ranks.fisher_z(r[key]))
            layers[r["model"]] = max(layers.get(r["model"], 0), r["layers"])
    return ranks.combined([float(np.mean(z)) for z in zs.values()], [layers[m] for m in zs])


def _means(mine: Sequence[Record]) -> dict[str, Any]:
    ran = [r for r in mine if not r["failure"]]
    mean = {key: _mean([r.get(key) for r in ran]) for key in ("passes", "coverage", "stability", "noise", "auc", "beats")}
    checked = [r["changed"] for r in ran if r["changed"] is not None]
    return mean | {"ran": len(ran), "failures": len(mine) - len(ran), "changed": all(checked) if checked else None}


def _mean(values: Collection[float | None]) -> float:
    known = [v for v in values if v is not None and not math.isnan(v)]
    return float(np.mean(known)) if known else math.nan


def auto_rule(results: Mapping[str, Any]) -> tuple[str, ...]:
    """The methods of ``methods="auto"``, the yardstick last, by the rule of the protocol."""
    table = {r["method"]: r for r in overall(results)}
    judged = max(r["models"] for r in table.values())
    candidates = [
        m
        for m, r in table.items()
        if m in results["defaults"] and m not in COMPOSITE and not math.isnan(r["rho"])
        if r["models"] >= AUTO_COVERAGE * judged and r["passes"] <= AUTO_PASSES
    ]
    chosen: list[str] = []
    best = 0.0
    while True:
        left = AUTO_PASSES - sum(table[m]["passes"] for m in chosen)
        tried = [(consensus_rho(results["rows"], [*chosen, m]), m) for m in candidates if m not in chosen]
        tried = [(rho, m) for rho, m in tried if table[m]["passes"] <= left and not math.isnan(rho)]
        if not tried:
            break
        rho, method = max(tried, key=lambda t: (round(t[0], 12), -table[t[1]]["passes"], t[1]))
        if rho < best + AUTO_GAIN:
            break
        chosen.append(method)
        best = rho
    return (*chosen, YARDSTICK)


def consensus_rho(rows: Sequence[Record], methods: Sequence[str]) -> float:
    """The combined rho of the members' mean ranks; a layer that a member cannot score is ranked by the others."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for row in rows:
        if row["reliability"] is not None and row["reliability"] >= LEAST_RELIABILITY:
            groups.setdefault((row["model"], row["op"]), []).append(row)
    records = []
    for (model, damage), group in groups.items():
        votes = np.array([_votes([row.get(f"score.{m}") for row in group]) for m in methods])
        known = np.isfinite(votes).any(0)
        if len(group) < LEAST_LAYERS or known.sum() < max(LEAST_LAYERS, LEAST_COVERAGE * len(group)):
            continue
        scores = np.nanmean(votes[:, known], axis=0)
        rho = spearman(scores, np.array([row["damage"] for row in group])[known])
        records.append({"model": model, "damage": damage, "layers": int(known.sum()), "rho": 0.0 if math.isnan(rho) else rho})
    return _over_models(records, "rho")[0]


def _votes(scores: Sequence[float | None]) -> np.ndarray:
    """The share of scored layers below each one, 0 … 1; NaN where there is no score."""
    values = np.array([math.nan if s is None else s for s in scores], float)
    known = np.isfinite(values)
    votes = np.full(len(values), math.nan)
    votes[known] = (rankdata(values[known]) - 1) / max(known.sum() - 1, 1)
    return votes
