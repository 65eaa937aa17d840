"""The verbs: load, analyze, plan, compress, export, track. Each arrow of docs/architecture.md is one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from layerwise.analyzer import ANALYZERS, ImportanceAnalyzer
from layerwise.artifact import Artifact
from layerwise.artifact import export as export_artifact
from layerwise.damage import removal_curve
from layerwise.data import Data
from layerwise.distillation import Distillation
from layerwise.errors import UsageError
from layerwise.heads import fit_head
from layerwise.importance import ImportanceReport, LayerInfo
from layerwise.loading import load, load_data
from layerwise.measure import compare
from layerwise.method import CompressionMethod, apply_plan
from layerwise.model import UniversalModel
from layerwise.observe import Observation, Progress, observe
from layerwise.plan import CompressionPlan, asks_energy
from layerwise.planner import Planner
from layerwise.proofs import BATCHES, judged, prove
from layerwise.result import CompressionResult, Proof
from layerwise.scores import Scores
from layerwise.selection import AUTO
from layerwise.spec import built, written
from layerwise.supplies import Supplies
from layerwise.target import Target
from layerwise.training import Trained, TrainingSettings, kept_zeros, train_
from layerwise.units import Granularity, granularities
from layerwise.weights import check_finite
from layerwise.zeroshot import SCHEME, WeightAnalyzer, only_weights, score_file

if TYPE_CHECKING:
    import pandas as pd

LONGEST_CURVE = 64  # layers; each costs a run of everything after it on all the data
ZERO_SHOT = ("spectral_analysis", "neural_persistence", "quantization_error", "weight_norm")  # "auto" for a file of weights

Methods = str | ImportanceAnalyzer | Sequence[str | ImportanceAnalyzer]


def analyze(
    model: UniversalModel | nn.Module | str,
    data: Any = None,
    methods: Methods = "auto",
    *,
    seed: int = 0,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
    executor: str = "local",
    granularity: Granularity = "block",
) -> ImportanceReport:
    """Scores every layer of `model` by every method in one pass over `data`, and measures the removal curve of their consensus.

    Parameters
    ----------
    model
        A model, what `load` takes, or ``"weights:FILE_OR_FOLDER"``: then the layers of the weights in it are scored tensor by
        tensor, without class, data or curve, by methods that read weights only.
    methods
        ``"auto"``, ``"all"``, names such as ``"fisher_information"`` or with settings ``"fisher_information(kind=true)"``,
        analyzer instances, or a list of these.
    data
        Batches in any accepted form; None is enough for methods that read weights only.
    checkpoint
        A folder in which the state is saved every few seconds and from which it resumes to the same bits.
    executor
        ``local``, or ``ray`` / ``ray:N`` to share the batches between N worker processes; the scores are the same to the bit.
    granularity
        ``block``, ``sublayer``, ``head`` or ``channel``, or several of them in one report; see docs/granularity.md. The removal
        curve is that of the coarsest, and is left out beyond `LONGEST_CURVE` layers.

    Raises
    ------
    NonFiniteWeights
        Before any work, when a weight is NaN or infinite.
    """
    if isinstance(model, str) and model.startswith(SCHEME):
        if granularities(granularity) != ("block",):
            raise UsageError("A file of weights has blocks only; smaller units are found by running the model.", place=model)
        return _of_file(model.removeprefix(SCHEME), data, methods)
    model = _universal(model)
    analyzers = chosen_analyzers(methods, seed)
    check_finite(model.module)
    batches = None if data is None else Data.of(data)
    if batches is not None:
        model.see(batches[0])
    if granularities(granularity) != ("block",):
        model = model.at(granularity)
    statistics = {name: a.statistic(model) for name, a in analyzers.items()}
    fed = {name: s for name, s in statistics.items() if s is not None}
    if fed and batches is None:
        raise UsageError(f"{', '.join(fed)} need data.", remedy="Pass batches, or only methods that read weights.")
    seen = Observation.empty()
    if fed and batches is not None:
        seen = observe(model, batches, fed, seed=seed, progress=progress, checkpoint=checkpoint, executor=executor)
    scores = {name: a.finish(model, statistics[name], seen.cost_of(statistics[name], name)) for name, a in analyzers.items()}
    report = _report(model, batches, scores, seed, seen)
    return report if batches is None else _with_curve(report, model, batches, progress)


def plan(
    model: UniversalModel | nn.Module,
    report: ImportanceReport | None,
    targets: Iterable[str | Target],
    data: Any,
    methods: str | Sequence[str | CompressionMethod] = "auto",
    *,
    calibration: Any = None,
    recovery: Sequence[CompressionMethod] = (),
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> CompressionPlan:
    """The best plan found that meets every target, measured on `data`; see docs/planning.md.

    `report` adds starts to the search and may be None. Methods that watch activations watch `calibration` (default: the first of
    `data`); `recovery` are methods that train, appended to the plan for `compress` to carry out.

    Raises `TargetMissed` with the nearest candidate's figures when none does, `UsageError` for a target that cannot be read.
    """
    wanted = [t if isinstance(t, Target) else Target.parse(t) for t in ([targets] if isinstance(targets, str) else targets)]
    watched = None if calibration is None else Data.of(calibration)
    return Planner(_universal(model), report, wanted, Data.of(data), methods, seed, progress, watched, recovery).make()


def compress(
    model: UniversalModel | nn.Module,
    plan: CompressionPlan,
    data: Any,
    *,
    report: ImportanceReport | None = None,
    training: Any = None,
    calibration: Any = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> CompressionResult:
    """Carries out `plan` on a copy, measures both models side by side on `data` and proves the result.

    Steps that train learn from `training` and stop by `data`; steps that watch activations watch `calibration` (default: the
    training data, or else `data`). `checkpoint` is a folder from which training resumes to the same result. The original is left
    alone. Proofs that fail are in ``result.proofs``; nothing is raised for them here.
    """
    original, batches = _universal(model), Data.of(data)
    original.see(batches[0])
    supplies = Supplies(
        calibration=Data.of(calibration if calibration is not None else training if training is not None else batches),
        training=None if training is None else Data.of(training),
        validation=batches,
        checkpoint=checkpoint,
        progress=progress,
    )
    seen = [b.to(original.device) for b in islice(batches, BATCHES)]
    steps = list[Proof]()
    applied = apply_plan(
        original, plan, supplies, watch=lambda old, new, step: steps.append(judged(old, new, step, seen, supplies))
    )
    before, after = compare(original, applied.model, batches, joules=asks_energy(plan), progress=progress)
    proofs = prove(original, applied.model, applied.plan, batches, before=before, after=after, steps=steps)
    about = {
        "name": original.name,
        "source": original.source.to_dict() if original.source else {},
        "fingerprint": original.fingerprint,
        "domain": original.domain,
        "task": original.task.name if original.task else "",
        "data": batches.name,
        "data_fingerprint": batches.fingerprint,
        "seed": plan.seed,
        "methods": report.methods if report else [],
        "remarks": list(applied.remarks),
    }
    return CompressionResult(applied.model, applied.plan, before, after, proofs, about)


def distill(
    student: UniversalModel | nn.Module | str,
    teacher: UniversalModel | nn.Module | str,
    data: Any,
    objectives: str | Distillation = "response",
    *,
    validation: Any = None,
    recipe: TrainingSettings | None = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> tuple[UniversalModel, Trained]:
    """A copy of `student` that was trained under `teacher` on `data`, and what the training did; the given models are left alone.

    `objectives`: names joined by ``+`` (``response+feature``), or a `Distillation` with its settings. Zeros of pruned weights
    stay. `checkpoint` is a folder from which it resumes to the same result. Raises `UsageError` for models that do not share
    vocabulary or classes, and for objectives that do not suit them.
    """
    pupil, master, batches = _universal(student), _universal(teacher), Data.of(data)
    pupil.see(batches[0])
    pupil = pupil.clone()
    supplies = Supplies(
        training=batches,
        validation=None if validation is None else Data.of(validation),
        teacher=master,
        checkpoint=checkpoint,
        progress=progress,
    )
    objective = Distillation(tuple(objectives.split("+"))) if isinstance(objectives, str) else objectives
    return pupil, train_(pupil, supplies, objective, recipe, after_step=kept_zeros(pupil.module))


def export(
    model: UniversalModel, path: str | Path, data: Any = None, *, force: bool = False, calibration: Any = None, **settings: Any
) -> Artifact:
    """Writes `model` in the format that the suffix of `path` names, runs it in its own runtime and compares.

    `settings` are the exporter's own, such as ``quantize="auto"`` of ONNX, which watches activations on `calibration` (default:
    `data`). Raises `ExportMismatch`, with nothing left at `path`, when the artifact computes something else.
    """
    batches, watched = (None if given is None else Data.of(given) for given in (data, calibration))
    return export_artifact(model, Path(path), batches, force=force, calibration=watched, settings=settings)


def track(result: CompressionResult, *, database: str | None = None, **details: Any) -> int:
    """Records `result` in the database (a URL; default ``LAYERWISE_DB`` or the user's own) and returns the row's id."""
    from layerwise.tracking import PerformanceTracker  # the database library is loaded by whoever records

    return PerformanceTracker(database).track(result, **details)


def leaderboard(domain: str | None = None, *, database: str | None = None, **filters: Any) -> pd.DataFrame:
    """Recorded results, best first within each task, data set and device."""
    from layerwise.tracking import PerformanceTracker

    return PerformanceTracker(database).generate_leaderboard(domain, **filters)


def chosen_analyzers(methods: Methods, seed: int = 0) -> dict[str, ImportanceAnalyzer]:
    """Label → analyzer. A second analyzer of the same method gets its settings into its label.

    Raises `UsageError` with the nearest name for one that is not known.
    """
    entries: list[str | ImportanceAnalyzer] = [methods] if isinstance(methods, str | ImportanceAnalyzer) else list(methods)
    chosen: dict[str, ImportanceAnalyzer] = {}
    for entry in entries:
        names = {"auto": AUTO, "all": tuple(ANALYZERS)}.get(entry, (entry,)) if isinstance(entry, str) else (entry,)
        for one in names:
            analyzer = _analyzer(one, seed) if isinstance(one, str) else one
            label = analyzer.method
            if chosen.get(label, analyzer) != analyzer:
                label = written(label, _telling(analyzer))
            chosen[label] = analyzer
    if not chosen:
        raise UsageError("No method was named.", remedy="Use methods='auto'.")
    return chosen


def _telling(analyzer: ImportanceAnalyzer) -> dict[str, Any]:
    """The settings that differ from the default ones; all where none does."""
    default = type(analyzer)().settings()
    settings = {k: v for k, v in analyzer.settings().items() if k != "baseline"}
    return {k: v for k, v in settings.items() if v != default[k]} or settings


def _analyzer(spec: str, seed: int) -> ImportanceAnalyzer:
    """The analyzer that ``NAME`` or ``NAME(setting=value, ...)`` stands for; `seed` is its seed unless it names one itself."""
    analyzer: Any = built(ANALYZERS, spec)
    seeded = "seed" in {f.name for f in fields(analyzer)} and "seed" not in spec
    return replace(analyzer, seed=seed) if seeded else analyzer


def _of_file(path: str, data: Any, methods: Methods) -> ImportanceReport:
    if data is not None:
        remedy = "Leave the data out, or load the model with its class."
        raise UsageError("A file of weights has no class to run data through.", place=path, remedy=remedy)
    words = {"auto": ZERO_SHOT, "all": tuple(name for name, a in ANALYZERS.items() if issubclass(a, WeightAnalyzer))}
    return score_file(path, only_weights(chosen_analyzers(words.get(methods, methods) if isinstance(methods, str) else methods)))


def _universal(model: UniversalModel | nn.Module | str) -> UniversalModel:
    return model if isinstance(model, UniversalModel) else load(model)


def _report(
    model: UniversalModel, data: Data | None, scores: Mapping[str, Scores], seed: int, seen: Observation
) -> ImportanceReport:
    layers = tuple(
        LayerInfo(x.name, x.index, x.kind, x.parameters, x.skippable, x.group, x.reason, x.granularity, x.parent)
        for x in model.layers
    )
    return ImportanceReport(
        model=model.name,
        task=model.task.name if model.task else "",
        data=data.name if data else "",
        layers=layers,
        scores=scores,
        notes=(*model.notes, *seen.notes, *(data.notes if data else ()), *_remarks(model, data)),
        fingerprint=model.fingerprint,
        domain=model.domain,
        seed=seed,
        device=str(model.device),
    )


def _remarks(model: UniversalModel, data: Data | None) -> tuple[str, ...]:
    """What the model says of its own layers on the first batch, and where there is only one, how to see more."""
    own = () if data is None else model.adapter.remarks(model.module, data[0].to(model.device))
    if len(model.layers) > 1:
        return own
    (layer,) = model.layers
    times = f", which runs {layer.calls} times" if layer.calls > 1 else ""
    return (*own, f"One layer only{times}: granularity='sublayer' ranks the parts inside {layer.name}.")


def _with_curve(report: ImportanceReport, model: UniversalModel, data: Data, progress: Progress | None) -> ImportanceReport:
    """The report with the measured metrics and removal curve of the consensus, least important layer first."""
    coarsest = report.coarsest()
    consensus = coarsest.consensus()
    skippable = {layer.name for layer in coarsest.layers if layer.skippable}
    order = [name for name in sorted(consensus.usable(), key=lambda n: consensus[n]) if name in skippable]
    if coarsest.granularities != ("block",) and len(order) > LONGEST_CURVE:
        note = f"No removal curve was measured: it would take {len(order):,} runs, more than {LONGEST_CURVE}."
        report, order = replace(report, notes=(*report.notes, note)), []
    curve, metrics = removal_curve(model, data, order, progress=progress)
    return replace(report, removal=curve if order else None, metrics=metrics)


__all__ = [
    "analyze",
    "chosen_analyzers",
    "compress",
    "distill",
    "export",
    "fit_head",
    "leaderboard",
    "load",
    "load_data",
    "plan",
    "track",
]
