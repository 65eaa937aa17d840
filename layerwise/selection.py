"""`IntelligentMethodSelector`: the set of methods with the most measured fidelity that a budget pays for.

Fidelity is the rank correlation of a method with measured damage. It comes from the tracker's rows where enough models were
ranked, else from the shipped table, which the faithfulness benchmark writes. Where nothing was measured, nothing is made up: the
selector says so and takes the task's primary methods and `AUTO` in order, as far as the budget goes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from layerwise.analyzer import ANALYZERS
from layerwise.errors import CorruptRun, UsageError, nearest
from layerwise.files import write_atomic
from layerwise.ranks import spearman
from layerwise.strategy import STRATEGIES, TaskAdapter, TaskType

if TYPE_CHECKING:
    import pandas as pd

    from layerwise.tracking import PerformanceTracker

# What the rule of the faithfulness benchmark's protocol gives on its committed results (a test holds them together): the few
# methods whose consensus follows measured damage best within a budget of passes, and depth as the yardstick.
AUTO = ("layer_ablation", "layer_correlation", "depth")
WEIGHTS_ONLY = ("spectral_analysis",)  # where there are no samples to run anything on
SHIPPED = Path(__file__).parent / "tables" / "methods.json"
BUDGETS = {"low": 3.0, "medium": 10.0, "high": 500.0}  # passes over the data: one sweep; ablation as well; everything
FEWEST_MODELS = 3  # tracked models from which on their rows count
MEASURE = "layer_ablation"  # the tracked method that is damage itself
ANY = "all"


@dataclass(frozen=True)
class Method:
    """One row: passes in the sweep that all methods share, passes of its own (F = 1, 12 layers), and fidelity per domain."""

    family: str
    shared: float
    own: float
    fidelity: Mapping[str, float]

    def known(self, domain: str) -> float:
        """Fidelity in `domain`, else over all domains, else NaN."""
        return float(self.fidelity.get(domain, self.fidelity.get(ANY, math.nan)))


Matrix = dict[str, Method]


@dataclass(frozen=True)
class Selection:
    """What was selected. `cost` and `budget` are in forward passes of one sample; `why` says in words what it rests on."""

    methods: tuple[str, ...]
    cost: float
    budget: float
    measured: bool
    why: str


@dataclass(frozen=True)
class IntelligentMethodSelector:
    """Chooses analyzers for a budget, from `tracker`'s rows where it has enough of them and from the table at `path` else."""

    tracker: PerformanceTracker | None = None
    path: Path = SHIPPED

    def select_methods(
        self, model_type: str, task_type: TaskType | str, data_size: int, compute_budget: float | str = "medium"
    ) -> list[str]:
        """The names of the methods to run, dearest last; `select` says what they rest on."""
        return list(self.select(model_type, task_type, data_size, compute_budget).methods)

    def select(
        self, model_type: str, task_type: TaskType | str, data_size: int, compute_budget: float | str = "medium"
    ) -> Selection:
        """The selection with its cost and its reason.

        Parameters
        ----------
        model_type
            The domain (text, vision, audio, …) that fidelities are looked up for; any other word takes those over all domains.
        data_size
            Samples; 0 leaves only methods that read weights.
        compute_budget
            Forward passes of one sample (a batch of 8 counts 8), or ``low`` (3 passes over the data), ``medium`` (10), ``high``.
        """
        budget = _budget(compute_budget, data_size)
        passes = budget / data_size if data_size else 0.0
        matrix = {m: row for m, row in self._load_performance_matrix(model_type).items() if m in ANALYZERS}
        primary = STRATEGIES[TaskAdapter(task_type).resolved].primary_methods
        measured = {m: row for m, row in matrix.items() if math.isfinite(row.known(model_type))}
        if measured:
            chosen = self._optimize_method_combination(measured, model_type, passes, primary)
            why = f"the most measured fidelity that the budget pays for, of {len(measured)} measured methods"
        else:
            chosen = _in_order([*primary, *AUTO, *(() if data_size else WEIGHTS_ONLY)], matrix, passes)
            why = "no method's fidelity has been measured: the task's primary methods, then the default ones, within the budget"
        cost = passes_of(chosen, matrix) * data_size
        return Selection(
            tuple(sorted(chosen, key=lambda m: (matrix[m].own, matrix[m].shared, m))), cost, budget, bool(measured), why
        )

    def _load_performance_matrix(self, domain: str = ANY) -> Matrix:
        """Method → costs and fidelities: the table's, with the tracker's fidelities over them."""
        matrix = dict(read_methods(self.path))
        for method, value in _tracked(self.tracker, domain).items():
            if method in matrix:
                matrix[method] = replace(matrix[method], fidelity={**matrix[method].fidelity, domain: value})
        return matrix

    def _optimize_method_combination(self, matrix: Matrix, domain: str, passes: float, primary: Sequence[str] = ()) -> list[str]:
        """The subset of the greatest `worth` that costs at most `passes`: exact, all subsets are tried.

        Of equal ones the cheapest, then that with the most `primary` methods.
        """
        names = sorted((m for m in matrix if matrix[m].known(domain) > 0), key=lambda m: -matrix[m].known(domain))
        bits = (np.arange(2 ** len(names))[:, None] >> np.arange(len(names))) & 1  # (subsets, methods), best method first
        cost = bits @ np.array([matrix[m].own for m in names]) + (bits * np.array([matrix[m].shared for m in names])).max(
            1, initial=0
        )
        worth = _worth(bits, names, matrix, domain)
        liked = bits @ np.array([m in primary for m in names], dtype=float)
        order = np.lexsort((-liked, cost.round(9), np.where(cost <= passes + 1e-9, -worth.round(9), math.inf)))
        return [m for m, used in zip(names, bits[order[0]], strict=True) if used]


def passes_of(chosen: Iterable[str], matrix: Matrix) -> float:
    """Passes over the data of a set of methods: the dearest of the shared sweeps once, and what each does on its own."""
    rows = [matrix[m] for m in chosen]
    return max((r.shared for r in rows), default=0.0) + sum(r.own for r in rows)


def _worth(bits: np.ndarray, names: Sequence[str], matrix: Matrix, domain: str) -> np.ndarray:
    """Σ fidelity · ½^k, k being how many better ones of its family are in the set: relatives say the same twice."""
    worth = np.zeros(len(bits))
    for family in {matrix[m].family for m in names}:
        columns = [i for i, m in enumerate(names) if matrix[m].family == family]
        before = np.cumsum(bits[:, columns], axis=1) - bits[:, columns]
        worth += (bits[:, columns] * np.array([matrix[names[i]].known(domain) for i in columns]) * 0.5**before).sum(1)
    return worth


def _in_order(names: Iterable[str], matrix: Matrix, passes: float) -> list[str]:
    chosen: list[str] = []
    for name in dict.fromkeys(names):
        if name in matrix and passes_of([*chosen, name], matrix) <= passes + 1e-9:
            chosen.append(name)
    return chosen


def _budget(given: float | str, data_size: int) -> float:
    if data_size < 0:
        raise UsageError(f"The data size {data_size} is negative.")
    if isinstance(given, str):
        if given not in BUDGETS:
            raise UsageError(f"Unknown budget {given!r}.", remedy=nearest(given, BUDGETS))
        return BUDGETS[given] * data_size
    if not given >= 0:
        raise UsageError(f"The budget {given} is no number of forward passes.")
    return float(given)


def _tracked(tracker: PerformanceTracker | None, domain: str) -> dict[str, float]:
    """Method → mean over tracked models of Spearman with `layer_ablation` in the same report; 1 for that method itself.

    Both were measured on the same samples, which flatters a little; the benchmark's table holds them apart.
    """
    if tracker is None:
        return {}
    rows = tracker.layer_scores()
    rows = rows if domain == ANY or domain not in set(rows["domain"]) else rows[rows["domain"] == domain]
    found: dict[str, dict[str, list[float]]] = {}
    for _, report in rows.groupby("report", sort=True):
        wide = report.pivot(index="layer", columns="method", values="score").astype(float)
        for method in wide.columns if MEASURE in wide else ():
            both = wide[[MEASURE]].assign(other=wide[method]).dropna()
            rho = spearman(both[MEASURE].to_numpy(), both["other"].to_numpy())
            if math.isfinite(rho):
                found.setdefault(str(method), {}).setdefault(str(report["model"].iloc[0]), []).append(rho)
    return {m: _mean_over_models(by) for m, by in found.items() if len(by) >= FEWEST_MODELS}


def _mean_over_models(by_model: Mapping[str, Sequence[float]]) -> float:
    return float(np.mean([np.mean(values) for values in by_model.values()]))


@cache
def read_methods(path: Path = SHIPPED) -> Matrix:
    """The table at `path`."""
    try:
        return {name: Method(**row) for name, row in json.loads(path.read_text(encoding="utf-8"))["methods"].items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptRun(f"This is no table of methods: {error!r}.", place=str(path)) from error


def write_methods(results: str | Path, path: str | Path = SHIPPED, *, op: str = "skip") -> Matrix:
    """Writes the table with the fidelities of a faithfulness benchmark: mean over models of Spearman with the damage of `op`.

    `results` has ``rows`` as `layerwise.stacking.fit_meta` takes them; with a column ``domain`` also per domain.
    """
    import pandas as pd

    results = Path(results)
    rows = pd.DataFrame(json.loads(results.read_text(encoding="utf-8"))["rows"])
    rows = rows[rows["op"] == op]
    domains = sorted(set(rows["domain"])) if "domain" in rows else []
    parts = {ANY: rows} | {domain: rows[rows["domain"] == domain] for domain in domains}
    table = {name: replace(row, fidelity=_fidelities(name, parts)) for name, row in read_methods(SHIPPED).items()}
    data = {
        "format": 1,
        "provenance": f"costs by construction, own passes at 12 layers; fidelities from {results.name}, damage of {op}",
        "methods": {name: asdict(row) for name, row in table.items()},
    }
    write_atomic(path, json.dumps(data, indent=1) + "\n")
    read_methods.cache_clear()
    return table


def _fidelities(method: str, parts: Mapping[str, pd.DataFrame]) -> dict[str, float]:
    found = {}
    for domain, rows in parts.items():
        if f"score.{method}" not in rows:
            continue
        pairs = [(m, p[[f"score.{method}", "damage"]].astype(float).dropna()) for m, p in rows.groupby("model")]
        rho = [spearman(p.iloc[:, 0].to_numpy(), p.iloc[:, 1].to_numpy()) for _, p in pairs]
        if known := [r for r in rho if math.isfinite(r)]:
            found[str(domain)] = round(float(np.mean(known)), 4)
    return found
