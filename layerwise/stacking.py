"""The learned stacker: damage predicted from cheap methods' ranks, depth, kind and size, judged on models it has not seen.

A ridge regression and nothing finer: the models to learn from are few (below ten, only rank averages or a ridge are defensible),
and layers of one model are no independent samples. So every choice, the penalty included, is made by leaving whole models out.
The stacker counts only where it beats both depth alone and the plain mean of ranks by more than a standard error over models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from layerwise.consensus import UNIT, UNVOTED, combined
from layerwise.errors import CorruptRun, UsageError
from layerwise.files import write_atomic
from layerwise.ranks import shares, spearman
from layerwise.scores import LayerScore, Scores, Status

if TYPE_CHECKING:
    import pandas as pd

SHIPPED = Path(__file__).parent / "tables" / "meta.json"
# label → (analyzer, settings that it must have): what the stacker may look at. One sweep gives all; none measures damage.
COMPONENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "layer_correlation": ("layer_correlation", {"measure": "block_influence", "tokens": "all"}),
    "gradient_based": ("gradient_based", {"form": "absolute"}),
    "gradient_based(activation)": ("gradient_based", {"form": "activation"}),
    "fisher_information": ("fisher_information", {"per_parameter": False, "weighting": "none"}),
    "weight_norm": ("weight_norm", {"per_parameter": False}),
}
QUIET = frozenset({"weight_norm"})  # baselines among them: they have a coefficient and no vote
PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)
FEWEST_MODELS = 4  # one is held out, one more to choose the penalty, and two remain to learn from
COVERED = 0.9
Columns = tuple[str, ...]
PRIOR: Columns = ("depth", "depth²")


class Placed(Protocol):
    """A layer of a model or of a saved report."""

    @property
    def name(self) -> str: ...
    @property
    def index(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def parameters(self) -> int: ...


@dataclass(frozen=True)
class Stacker:
    """Coefficients of one operation's damage. `held_out`: model → Spearman with damage of (stacker, depth alone, mean of ranks).

    `error` is the root mean square of the held-out models' residuals, `interval` the half width that covers 90 % of them; both in
    shares of layers ranked below, the unit of what `predict` gives.
    """

    methods: Columns
    coefficients: Mapping[str, float]
    penalty: float
    error: float
    interval: float
    rows: int
    held_out: Mapping[str, tuple[float, float, float]]

    @property
    def learned(self) -> bool:
        """Whether it beats depth alone and the mean of ranks by more than a standard error over the held-out models."""
        rho = np.array(list(self.held_out.values()))
        return all(_better(rho[:, 0] - rho[:, other]) for other in (1, 2))

    def predict(self, rows: pd.DataFrame) -> np.ndarray:
        """The predicted share of layers ranked below, of one model's `rows` (columns as `fit_meta` takes, without damage)."""
        x = features(rows, self.methods)
        weights = {k: v for k, v in self.coefficients.items() if k != "intercept"}
        known = {k: x[k] if k in x else np.zeros(len(x)) for k in weights}
        return 0.5 + self.coefficients["intercept"] + sum((weights[k] * np.asarray(known[k]) for k in weights), np.zeros(len(x)))


def fit_meta(
    rows: pd.DataFrame, methods: Sequence[str] = tuple(COMPONENTS), *, target: Literal["rank", "damage"] = "rank"
) -> Stacker:
    """A ridge of damage on the rank-transformed scores of `methods`, depth, kind and size; each model counts the same.

    Parameters
    ----------
    rows
        One per layer and model: ``model, layer, depth`` (0 … 1), ``parameters, kind, damage``, and ``score.<method>`` per method
        (NaN: no score). One operation's damage only; a column ``op`` that says otherwise is an error.
    target
        ``rank``: the share of a model's layers with less damage (default: damage of different models has no common scale, and one
        vital layer would decide the fit). ``damage``: the column as it is.

    Raises
    ------
    UsageError
        For fewer than 4 models, several operations, or a missing column.
    """
    rows = _checked(rows, methods)
    x, y, groups = features(rows, methods), _target(rows, target), rows["model"].to_numpy()
    x = x.drop(columns=[c for c in _kinds(x) if len(set(groups[x[c].to_numpy() > 0])) < 2])  # one model's own kind is its name
    plain = x[[f"score.{m}" for m in methods if m not in QUIET]].mean(axis=1).to_numpy()
    guesses = _held_out(x.to_numpy(), y, groups)
    prior = _held_out(x[list(PRIOR)].to_numpy(), y, groups)
    residuals = np.abs(y - guesses)
    penalty = _penalty(x.to_numpy(), y, groups)
    intercept, weights = _ridge(x.to_numpy(), y, groups, penalty)
    judged = {
        str(m): tuple(spearman(g[groups == m], y[groups == m]) for g in (guesses, prior, plain)) for m in dict.fromkeys(groups)
    }
    return Stacker(
        methods=tuple(methods),
        coefficients={"intercept": intercept} | dict(zip(x.columns, map(float, weights), strict=True)),
        penalty=penalty,
        error=float(np.sqrt((residuals**2).mean())),
        interval=float(np.quantile(residuals, COVERED, method="higher")),
        rows=len(rows),
        held_out={m: r for m, r in judged.items() if all(map(math.isfinite, r))},  # type: ignore[misc]
    )


def held_out_models(groups: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows to learn from, rows to judge by) for each model left out in turn: whole models, never single layers."""
    for model in dict.fromkeys(groups):
        yield groups != model, groups == model


def features(rows: pd.DataFrame, methods: Sequence[str]) -> pd.DataFrame:
    """The regressors, each centred on 0 within its model: ranks in −½ … ½ (0 where there is no score), depth, kind and size."""
    import pandas as pd

    model = rows["model"]

    def ranked(column: pd.Series) -> np.ndarray:
        below = column.astype(float).groupby(model.to_numpy(), sort=False).transform(lambda v: shares(v.to_numpy()))
        return np.nan_to_num(below.to_numpy() - 0.5)

    missing = pd.Series(math.nan, index=rows.index)
    found = {f"score.{m}": ranked(rows.get(f"score.{m}", missing)) for m in methods}
    depth = rows["depth"].to_numpy(float) - 0.5
    found |= {"depth": depth, "depth²": 4 * depth**2 - 1 / 3, "parameters": ranked(rows["parameters"])}
    found |= {f"kind={k}": (rows["kind"] == k).to_numpy(float) for k in sorted(set(rows["kind"]))}
    return pd.DataFrame(found, index=rows.index)


def stacked(layers: Sequence[Placed], scores: Mapping[str, Scores], voters: Mapping[str, Scores], op: str) -> Scores:
    """The shipped stacker's consensus; the mean of `voters`' ranks, saying so in `settings`, where no stacker has earned it."""
    settings = standing(op)
    if not settings["learned"]:
        plain = combined([x.name for x in layers], voters, dict.fromkeys(voters, 1.0), "meta")
        return Scores("consensus", UNIT, plain.entries, settings={**plain.settings, **settings})
    stacker, scores = stackers()[op], _components(scores)
    guesses = stacker.predict(table(layers, scores))
    known = {n for m in stacker.methods if m in scores for n in scores[m].usable()}
    nothing = LayerScore.missing(Status.NOT_APPLICABLE, UNVOTED)
    entries = {
        x.name: LayerScore.measured(float(v), stacker.error) if x.name in known else nothing
        for x, v in zip(layers, guesses, strict=True)
    }
    absent = [m for m in stacker.methods if m not in scores]
    return Scores("consensus", UNIT, entries, settings={"how": "meta", "absent": absent} | settings)


def standing(op: str) -> dict[str, Any]:
    """Whether the shipped table has a stacker for `op` that counts, and why not: ``learned`` and ``why``."""
    stacker = stackers().get(op)
    if stacker is None:
        return {"learned": False, "why": f"no stacker was fitted for {op} yet: every method counts the same"}
    if not stacker.learned:
        return {"learned": False, "why": "on models left out it does not beat depth alone and the mean of ranks: these are used"}
    return {"learned": True, "why": f"fitted on {len(stacker.held_out)} models"}


def table(layers: Sequence[Placed], scores: Mapping[str, Scores]) -> pd.DataFrame:
    """One model's rows as `fit_meta` takes them, without the damage."""
    import pandas as pd

    last = max(len(layers) - 1, 1)
    columns: dict[str, list[Any]] = {
        "model": [""] * len(layers),
        "layer": [x.name for x in layers],
        "depth": [x.index / last for x in layers],
        "parameters": [x.parameters for x in layers],
        "kind": [x.kind for x in layers],
    }
    usable = {m: s.usable() for m, s in scores.items()}
    return pd.DataFrame(columns | {f"score.{m}": [u.get(x.name, math.nan) for x in layers] for m, u in usable.items()})


@cache
def stackers(path: Path = SHIPPED) -> dict[str, Stacker]:
    """Operation → stacker, from the JSON that `write_stackers` wrote."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))["stackers"]
        return {op: Stacker(**{**s, "methods": tuple(s["methods"])}) for op, s in data.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptRun(f"This is no table of stackers: {error!r}.", place=str(path)) from error


def write_stackers(results: str | Path, path: str | Path = SHIPPED) -> dict[str, Stacker]:
    """Fits one stacker per operation to the ``rows`` of a faithfulness benchmark's result file and writes the table to `path`."""
    import pandas as pd

    results = Path(results)
    rows = pd.DataFrame(json.loads(results.read_text(encoding="utf-8"))["rows"])
    found = {str(op): fit_meta(part) for op, part in rows.groupby("op", sort=True) if part["model"].nunique() >= FEWEST_MODELS}
    data = {
        "format": 1,
        "provenance": f"{results.name}, {len(rows)} rows",
        "stackers": {op: asdict(s) for op, s in found.items()},
    }
    write_atomic(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    stackers.cache_clear()
    return found


def _components(scores: Mapping[str, Scores]) -> dict[str, Scores]:
    """Those of `scores` that are components, by the component's label: whatever the report calls them, the settings decide."""
    return {
        label: s
        for label, (name, settings) in COMPONENTS.items()
        for s in scores.values()
        if s.method == name and all(s.settings.get(k) == v for k, v in settings.items())
    }


def _kinds(x: pd.DataFrame) -> list[str]:
    return [str(c) for c in x.columns if str(c).startswith("kind=")]


def _checked(rows: pd.DataFrame, methods: Sequence[str]) -> pd.DataFrame:
    needed = ["model", "depth", "parameters", "kind", "damage", *(f"score.{m}" for m in methods)]
    if lost := [name for name in needed if name not in rows]:
        raise UsageError(f"The rows lack {', '.join(lost)}.", remedy=f"They have {', '.join(map(str, rows.columns))}.")
    if "op" in rows and rows["op"].nunique() > 1:
        raise UsageError(f"The rows mix the operations {', '.join(sorted(set(rows['op'])))}.", remedy="Fit one at a time.")
    rows = rows[np.isfinite(rows["damage"].astype(float))].reset_index(drop=True)
    if rows["model"].nunique() < FEWEST_MODELS:
        raise UsageError(f"{rows['model'].nunique()} models are too few to learn from.", remedy=f"Give {FEWEST_MODELS} or more.")
    return rows


def _target(rows: pd.DataFrame, target: str) -> np.ndarray:
    damage = rows["damage"].astype(float)
    if target == "damage":
        return damage.to_numpy()
    return damage.groupby(rows["model"], sort=False).transform(lambda v: shares(v.to_numpy())).to_numpy() - 0.5


def _ridge(x: np.ndarray, y: np.ndarray, groups: np.ndarray, penalty: float) -> tuple[float, np.ndarray]:
    """Intercept and weights of the ridge in which every model has the same total weight; the intercept is not penalized."""
    counts = {m: float((groups == m).sum()) for m in set(groups)}
    weight = np.array([1.0 / counts[m] for m in groups]) * len(groups) / len(counts)
    centre, level = np.average(x, axis=0, weights=weight), float(np.average(y, weights=weight))
    xc, yc = x - centre, y - level
    gram = (xc * weight[:, None]).T @ xc + penalty * np.eye(x.shape[1])
    solved = np.linalg.solve(gram, (xc * weight[:, None]).T @ yc)
    return level - float(centre @ solved), solved


def _guesses(x: np.ndarray, y: np.ndarray, groups: np.ndarray, penalty: float) -> np.ndarray:
    guesses = np.empty(len(y))
    for learn, judge in held_out_models(groups):
        intercept, weights = _ridge(x[learn], y[learn], groups[learn], penalty)
        guesses[judge] = intercept + x[judge] @ weights
    return guesses


def _penalty(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> float:
    return min(PENALTIES, key=lambda p: float(((y - _guesses(x, y, groups, p)) ** 2).mean()))


def _held_out(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Each model's predictions by a ridge whose weights and penalty come from the other models only."""
    guesses = np.empty(len(y))
    for learn, judge in held_out_models(groups):
        intercept, weights = _ridge(x[learn], y[learn], groups[learn], _penalty(x[learn], y[learn], groups[learn]))
        guesses[judge] = intercept + x[judge] @ weights
    return guesses


def _better(difference: np.ndarray) -> bool:
    return len(difference) > 1 and float(difference.mean()) > float(difference.std(ddof=1)) / math.sqrt(len(difference))
