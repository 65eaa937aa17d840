"""`ImportanceReport`: several methods' scores of one model side by side, how far they agree, and what they say together."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np

from layerwise import consensus as ensembles
from layerwise.consensus import Disagreement
from layerwise.errors import CorruptRun, UsageError, nearest
from layerwise.files import write_atomic
from layerwise.ranks import spearman, spearman_rows
from layerwise.registry import Registry
from layerwise.scores import Scores
from layerwise.stacking import stacked
from layerwise.transfer import fit_kernel, transferred

if TYPE_CHECKING:
    import pandas as pd

    from layerwise.model import UniversalModel

FORMAT = 1
MOST_DRAWN, FEWEST_RESAMPLES = 2_000_000, 100  # values that a bootstrap over thousands of channels draws at once
NAMED = 3  # disagreeing pairs that a warning spells out
How = Literal["borda", "reliability", "meta"]
CONSENSUS: tuple[str, ...] = get_args(How)
COLUMNS = [
    "layer", "index", "kind", "parameters", "method", "score", "stderr", "rank", "status", "reason", "seconds", "samples",
    "granularity", "parent",
]  # fmt: skip


class Renderer(Protocol):
    """Turns a report into a document. The page is built a floor above this one, so it is found by name and not imported."""

    def __call__(self, report: ImportanceReport, **details: Any) -> str: ...


RENDERERS: Registry[Renderer] = Registry("renderer", "layerwise.report")


@dataclass(frozen=True)
class LayerInfo:
    """A layer as plain data: what remains of it in a saved report."""

    name: str
    index: int
    kind: str
    parameters: int
    skippable: bool
    group: str
    reason: str = ""
    granularity: str = "block"
    parent: str = ""  # the block that a sublayer, head or channel is inside of


@dataclass(frozen=True)
class Agreement:
    """Spearman rank correlation of two methods with a bootstrap interval over layers, and the number of layers compared."""

    first: str
    second: str
    rho: float
    low: float
    high: float
    layers: int


@dataclass(frozen=True)
class RemovalCurve:
    """Measured: the `metric` when the first k layers of `order` are skipped, k = 0 … len(order)."""

    metric: str
    order: tuple[str, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class ImportanceReport:
    """Scores of `methods` × `layers` for one model, task and data set; plain frozen data, saved as JSON."""

    model: str
    task: str
    data: str
    layers: tuple[LayerInfo, ...]
    scores: Mapping[str, Scores]
    metrics: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    removal: RemovalCurve | None = None
    fingerprint: str = ""
    domain: str = ""
    seed: int = 0
    device: str = "cpu"

    def __getitem__(self, method: str) -> Scores:
        try:
            return self.scores[method]
        except KeyError:
            raise UsageError(f"The report holds no method {method!r}.", remedy=nearest(method, self.scores)) from None

    @property
    def methods(self) -> list[str]:
        return list(self.scores)

    @property
    def granularities(self) -> tuple[str, ...]:
        """Of which sizes the layers are, from coarse to fine."""
        return tuple(dict.fromkeys(layer.granularity for layer in self.layers))

    def at(self, granularity: str) -> ImportanceReport:
        """The report on the layers of one granularity. Raises `UsageError` with the nearest for one that it does not hold."""
        if granularity not in self.granularities:
            found = nearest(granularity, self.granularities)
            raise UsageError(f"The report holds no layers of granularity {granularity!r}.", remedy=found)
        if len(self.granularities) == 1:
            return self
        layers = tuple(layer for layer in self.layers if layer.granularity == granularity)
        names = {layer.name for layer in layers}
        kept = {m: replace(s, entries={n: e for n, e in s.entries.items() if n in names}) for m, s in self.scores.items()}
        removal = self.removal if self.removal is not None and names.issuperset(self.removal.order) else None
        return replace(self, layers=layers, scores=kept, removal=removal)

    def coarsest(self) -> ImportanceReport:
        """The report on the coarsest of its layers: what is said in words of a report of several granularities."""
        return self.at(self.granularities[0]) if len(self.granularities) > 1 else self

    def ranks(self, scores: Scores) -> dict[str, tuple[int, int]]:
        """Layer → (rank, of how many). 1 is the most important, equal scores share a rank, granularities are ranked apart."""
        found: dict[str, tuple[int, int]] = {}
        for granularity in self.granularities:
            names = {layer.name for layer in self.layers if layer.granularity == granularity}
            ranks = replace(scores, entries={n: e for n, e in scores.entries.items() if n in names}).ranks()
            found |= {name: (rank, len(ranks)) for name, rank in ranks.items()}
        return found

    def to_frame(self) -> pd.DataFrame:
        """One row per layer and method; `rank` 1 is the most important layer, missing where there is no score."""
        import pandas as pd  # 80 MB, which scores alone never need

        rows = [
            (
                layer.name, layer.index, layer.kind, layer.parameters, method, entry.value, entry.stderr,
                ranks[layer.name][0] if layer.name in ranks else None, str(entry.status), entry.reason, scores.seconds,
                scores.samples, layer.granularity, layer.parent,
            )
            for method, scores in self.scores.items()
            for ranks in [self.ranks(scores)]
            for layer in self.layers
            for entry in [scores.entries[layer.name]]
        ]  # fmt: skip
        return pd.DataFrame(rows, columns=COLUMNS).astype({"rank": "Int64"})

    def voters(self) -> dict[str, Scores]:
        """The methods that count: not what is combined from other methods, nor baselines, unless nothing else was run."""
        measures = {m: s for m, s in self.scores.items() if not s.settings.get("baseline")} or dict(self.scores)
        return {m: s for m, s in measures.items() if not s.settings.get("components")} or measures

    def consensus(self, how: How = "borda") -> Scores:
        """The mean over methods of the share of layers ranked below this one (0 … 1), ties counting half.

        Baselines do not vote unless nothing else was run. The standard error is that over methods. `settings` hold the weights.
        Layers compete with those of their own granularity only; the weights are then those of the coarsest.

        Parameters
        ----------
        how
            ``borda``: every method counts the same (default). ``reliability``: each counts by how well its ranks survive its own
            standard errors (`layerwise.consensus.reliability`). ``meta``: the stacker of `meta_learning` for skipped layers, from
            whichever of its methods the report holds.
        """
        voters = self.voters()
        if how not in CONSENSUS:
            raise UsageError(f"Unknown consensus {how!r}.", remedy=nearest(how, CONSENSUS))
        if len(self.granularities) > 1:
            parts = [self.at(g).consensus(how) for g in self.granularities]
            return replace(parts[0], entries={name: e for part in parts for name, e in part.entries.items()})
        if how == "meta":
            return stacked(self.layers, self.scores, voters, "skip")
        weights = dict.fromkeys(voters, 1.0) if how == "borda" else ensembles.reliability_weights(voters, seed=self.seed)
        return ensembles.combined([layer.name for layer in self.layers], voters, weights, how)

    def disagreements(self) -> list[Disagreement]:
        """The pairs of voting methods whose ranks correlate below 0.4, the worst first, with the layers most in dispute."""
        return ensembles.disagreements(self.coarsest().voters())

    def disagreement(self) -> str:
        """A warning, one line per pair, that names which methods disagree about which layers; '' where none do."""
        found = self.disagreements()
        more = [f"So do {len(found) - NAMED} more pairs of methods."] if len(found) > NAMED else []
        return "\n".join([*map(str, found[:NAMED]), *more])

    def agreement(self, *, resamples: int = 1000) -> list[Agreement]:
        """Spearman's rho for each pair of methods with a 95 % percentile bootstrap interval over layers."""
        names = list(self.scores)
        generator, scores = np.random.default_rng(self.seed), self.coarsest().scores
        return [_agree(scores[a], scores[b], resamples, generator) for i, a in enumerate(names) for b in names[i + 1 :]]

    def agreement_matrix(self, *, resamples: int = 1000) -> pd.DataFrame:
        """`agreement` as a table: ``matrix["rho"]`` is methods × methods; ``matrix["low"]`` and ``["high"]`` are its interval."""
        import pandas as pd

        names = list(self.scores)
        grids = {key: pd.DataFrame(1.0, index=names, columns=names) for key in ("rho", "low", "high")}
        for pair in self.agreement(resamples=resamples):
            for key, grid in grids.items():
                grid.loc[pair.first, pair.second] = grid.loc[pair.second, pair.first] = getattr(pair, key)
        return pd.concat(grids, axis=1)

    def transfer_to(self, other: UniversalModel, *more: ImportanceReport) -> ImportanceReport:
        """An estimate for the layers of `other`, which is not run: this consensus mapped by relative depth, kind and size.

        The report's one method, ``transfer``, has the share of layers ranked below and a standard error that grows with the
        distance to the nearest known layer. `more` reports of other models make it better, and its error honest: one model
        alone cannot show how much models differ. It is no measurement; check it with `analyze` where that can be paid.
        """
        reports = (self, *more)
        layers = tuple(LayerInfo(x.name, x.index, x.kind, x.parameters, x.skippable, x.group, x.reason) for x in other.layers)
        scores = transferred(fit_kernel([(r.layers, r.consensus()) for r in reports]), layers)
        note = f"Estimated from the scores of {', '.join(r.model for r in reports)}; {other.name} itself was not measured."
        return ImportanceReport(
            model=other.name,
            task=other.task.name if other.task else "",
            data="",
            layers=layers,
            scores={scores.method: scores},
            notes=(note,),
            fingerprint=other.fingerprint,
            domain=other.domain,
            seed=self.seed,
            device=str(other.device),
        )

    def to_dict(self) -> dict[str, Any]:
        data = {k: v for k, v in vars(self).items() if k not in {"layers", "scores", "removal"}}
        return data | {
            "format": FORMAT,
            "metrics": dict(self.metrics),
            "notes": list(self.notes),
            "layers": [asdict(layer) for layer in self.layers],
            "scores": {name: s.to_dict() for name, s in self.scores.items()},
            "removal": None if self.removal is None else asdict(self.removal),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ImportanceReport:
        """The inverse of `to_dict`."""
        rest = {k: v for k, v in data.items() if k not in {"format", "layers", "scores", "removal", "notes"}}
        removal = data["removal"]
        if removal is not None:
            removal = RemovalCurve(removal["metric"], tuple(removal["order"]), tuple(removal["values"]))
        return cls(
            layers=tuple(LayerInfo(**layer) for layer in data["layers"]),
            scores={name: Scores.from_dict(s) for name, s in data["scores"].items()},
            removal=removal,
            notes=tuple(data["notes"]),
            **rest,
        )

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False)

    def to_html(self, path: str | Path | None = None, **details: Any) -> str:
        """The report as one HTML page that works offline; `details` are the keywords of `layerwise.report.render`.

        With `path` the page is also written there, whole or not at all.
        """
        text = RENDERERS["html"]()(self, **details)
        if path is not None:
            write_atomic(path, text)
        return text

    def save(self, path: str | Path) -> Path:
        """Writes the JSON that `load` reads, whole or not at all; into a folder as ``report.json``. Gives the file's path."""
        path = Path(path)
        path = path / "report.json" if path.is_dir() else path
        write_atomic(path, self.to_json())
        return path

    @classmethod
    def load(cls, path: str | Path) -> ImportanceReport:
        """Reads the JSON that `save` wrote (a file, or the ``report.json`` of a run folder)."""
        path = Path(path)
        path = path / "report.json" if path.is_dir() else path
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptRun(f"This is not a saved report: {error!r}.", place=str(path)) from error


def _agree(a: Scores, b: Scores, resamples: int, generator: np.random.Generator) -> Agreement:
    left, right = a.usable(), b.usable()
    common = [name for name in left if name in right]
    x = np.array([left[n] for n in common])
    y = np.array([right[n] for n in common])
    resamples = min(resamples, max(MOST_DRAWN // max(len(common), 1), FEWEST_RESAMPLES))
    picks = generator.integers(0, max(len(common), 1), size=(resamples, len(common)))
    draws = spearman_rows(x[picks], y[picks]) if len(common) > 2 else np.empty(0)
    draws = draws[np.isfinite(draws)]
    low, high = np.percentile(draws, [2.5, 97.5]) if len(draws) else (math.nan, math.nan)
    return Agreement(a.method, b.method, spearman(x, y), float(low), float(high), len(common))
