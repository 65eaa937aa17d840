"""The whole walk in one folder: analyze → plan → compress → export → track → report, each stage done once.

Decision: a stage is a small function that reads what the stages before it wrote and writes its own files. It is repeated on
resume only if a setting that it reads, or one of its files, is no longer the same. Tracking comes before the report, so that
the report's leaderboard holds the run's own row; the row is keyed, so telling it twice gives one.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from layerwise import engine
from layerwise.config import RunConfig, config_to_yaml
from layerwise.data import Data
from layerwise.environment import environment, same_environment
from layerwise.errors import CorruptRun, LayerwiseError, ProofFailed, TargetMissed, UsageError
from layerwise.files import output_lock, staged_file, write_atomic
from layerwise.importance import ImportanceReport
from layerwise.method import METHODS, CompressionMethod, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.result import CompressionResult, Measurement, Proof
from layerwise.runfolder import CONFIG, RunFolder, final_of, key_of, new_folder, resumed_folder
from layerwise.spec import built, parted

Progress = Callable[[int, int], None]

MODEL = ("model", "weights", "head", "task", "device", "seed")
COLUMNS = (
    "text_column", "text_pair_column", "image_column", "audio_column", "x_columns", "smiles_column", "label_column",
    "label_columns", "target_column", "answer_column",
)  # fmt: skip
DATA = ("data", "split", "limit", "batch_size", "max_bad_shards", *COLUMNS)
EVALUATION = ("eval_data", "eval_split", "eval_limit")
TRAINING = ("train_data", "train_split", "train_limit")


class Listener(Protocol):
    """Who hears how far the run is."""

    def note(self, text: str) -> None:
        """One remark, such as a damaged file that is made again."""

    def progress(self, label: str) -> contextlib.AbstractContextManager[Progress]:
        """A function (done, total) to call while the block named `label` works."""


class Quiet:
    """A `Listener` that says nothing."""

    def note(self, text: str) -> None:
        pass

    @contextlib.contextmanager
    def progress(self, label: str) -> Iterator[Progress]:
        yield lambda done, total: None


@dataclass(frozen=True)
class Stage:
    """One step of the walk: its `work`, the files and folders it leaves, the settings that it depends on, and words for it."""

    name: str
    label: str
    work: Callable[[Walk, Progress], None]
    outputs: tuple[str, ...]
    reads: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """A finished run: its `folder`, what was found, and the targets that the measured model misses (in words)."""

    folder: Path
    report: ImportanceReport
    result: CompressionResult
    artifacts: tuple[dict[str, Any], ...]
    missed: tuple[str, ...]


class Walk:
    """One run's settings and place, and what it has so far: made in this process, or read from the stages' files."""

    def __init__(self, config: RunConfig, folder: RunFolder, listener: Listener) -> None:
        self.config = config
        self.folder = folder
        self.listener = listener
        self.checkpoint: Path | None = None

    @cached_property
    def model(self) -> UniversalModel:
        c = self.config
        if not c.model:
            raise UsageError("--model is missing.", code="LW-C03")
        model = open_model(c)
        for note in model.notes:
            self.listener.note(note)
        return model

    @cached_property
    def data(self) -> Data:
        return self._load(self.config.data, self.config.split, self.config.limit)

    @cached_property
    def evaluation(self) -> Data:
        """What the compressed model is measured on."""
        c = self.config
        if not (c.eval_data or c.eval_split or c.eval_limit):
            return self.data
        return self._load(c.eval_data or c.data, c.eval_split or c.split, c.eval_limit)

    @cached_property
    def training(self) -> Data | None:
        """What steps that train learn from; None where no such data are named."""
        return open_training(self.config, self.model)

    def _load(self, spec: str | None, split: str | None, limit: int | None) -> Data:
        c = self.config
        if not spec:
            raise UsageError("--data is missing.", code="LW-C03")
        return open_data(c, self.model, spec, split, limit)

    @cached_property
    def report(self) -> ImportanceReport:
        report = ImportanceReport.load(self.folder.path("report.json"))
        if report.fingerprint != self.model.fingerprint:
            raise CorruptRun(
                "The model's weights are not those that were analyzed.",
                place=str(self.folder.partial),
                remedy="Bring them back, or start again with --force.",
            )
        return report

    @cached_property
    def plan(self) -> CompressionPlan:
        return CompressionPlan.load(self.folder.path("plan.yaml"))

    @cached_property
    def result(self) -> CompressionResult:
        """The result as it was saved, its model loaded from the run's ``model`` folder."""
        saved = json.loads(self.folder.path("result.json").read_text(encoding="utf-8"))
        return CompressionResult(
            engine.load(str(self.folder.path("model")), self.config.task, device=self.config.device),
            CompressionPlan.from_dict(saved["plan"]),
            Measurement.from_dict(saved["before"]),
            Measurement.from_dict(saved["after"]),
            tuple(Proof.from_dict(proof) for proof in saved["proofs"]),
            saved["original"],
        )

    @property
    def shipped(self) -> CompressionResult:
        """The result with the proofs of its artifacts."""
        proofs = tuple(Proof.from_dict(artifact["proof"]) for artifact in self.artifacts)
        return replace(self.result, proofs=(*self.result.proofs, *proofs))

    @cached_property
    def artifacts(self) -> list[dict[str, Any]]:
        """What was exported, as plain data."""
        return list(json.loads(self.folder.path("artifacts.json").read_text(encoding="utf-8")))

    def write(self, name: str, text: str) -> None:
        """A text file of the run, whole or not at all."""
        write_atomic(self.folder.path(name), text)


def run(config: RunConfig, *, resume: bool = False, listener: Listener | None = None, stages: tuple[Stage, ...] = ()) -> Outcome:
    """Does the walk into the folder ``config.out``, or goes on with it, and gives what came out.

    Raises `OutputBusy` while another run writes there, `UsageError` LW-C07 where something is and LW-C13 where there is
    nothing to resume, `TargetMissed` and `ProofFailed` with the analysis kept; whatever a stage raises. What is finished stays
    in ``<out>.partial``.
    """
    listener = listener or Quiet()
    if not config.out:
        raise UsageError("--out is missing: the folder for the run.", code="LW-C03")
    final = final_of(Path(config.out))
    with output_lock(final):
        folder, remarks = resumed_folder(final) if resume else (new_folder(final, force=config.force), [])
        for remark in remarks:
            listener.note(remark)
        walk = Walk(config, folder, listener)
        _begin(walk, resume)
        try:
            _stages(walk, stages or STAGES)
        except (TargetMissed, ProofFailed):
            _show_failure(walk)
            raise
        outcome = _outcome(walk)
        return Outcome(folder.finish(force=config.force), *outcome)


def _begin(walk: Walk, resume: bool) -> None:
    walk.write(CONFIG, config_to_yaml(walk.config))
    here, saved = environment(walk.config), walk.folder.path("environment.json")
    if resume and saved.is_file():
        for difference in same_environment(saved, here):
            walk.listener.note(f"Not as at the start of this run: {difference}.")
    else:
        walk.write("environment.json", json.dumps(here, indent=1) + "\n")


def _stages(walk: Walk, stages: tuple[Stage, ...]) -> None:
    key = ""
    for position, stage in enumerate(stages):
        key = key_of({name: getattr(walk.config, name) for name in stage.reads} | {"stage": stage.name}, key)
        kept, why = walk.folder.kept(stage.name, key)
        if kept:
            continue
        if why:
            walk.listener.note(f"{stage.name} is done again: {why}.")
        walk.folder.forget(s.name for s in stages[position:])
        _work(walk, stage, key)


def _work(walk: Walk, stage: Stage, key: str) -> None:
    walk.checkpoint = walk.folder.checkpoint(key)
    torch.manual_seed(walk.config.seed)  # a stage must not depend on what ran before it in this process
    started = time.monotonic()
    with walk.listener.progress(stage.label) as progress:
        stage.work(walk, progress)
    walk.folder.record(stage.name, key, stage.outputs, time.monotonic() - started)


def _analyze(walk: Walk, progress: Progress) -> None:
    c = walk.config
    report = engine.analyze(
        walk.model,
        walk.data,
        methods_of(c.methods),
        seed=c.seed,
        progress=progress,
        checkpoint=walk.checkpoint,
        granularity=c.granularity,
        executor=c.executor,
    )
    for remark in report.notes:
        walk.listener.note(remark)
    walk.write("report.json", report.to_json() + "\n")
    with staged_file(walk.folder.path("scores.parquet")) as temporary:
        report.to_frame().to_parquet(temporary)
    walk.report = report


def _plan(walk: Walk, progress: Progress) -> None:
    c = walk.config
    walk.plan = engine.plan(
        walk.model, walk.report, c.all_targets, walk.data, compressors_of(c.compress_methods), seed=c.seed, progress=progress
    )
    for remark in walk.plan.notes:
        walk.listener.note(remark)
    walk.write("plan.yaml", walk.plan.to_yaml())


def _compress(walk: Walk, progress: Progress) -> None:
    steps = [step_of(method, ()) for method in recovery_of(walk.config)]
    result = engine.compress(
        walk.model,
        replace(walk.plan, steps=(*walk.plan.steps, *steps)),
        walk.evaluation,
        report=walk.report,
        training=walk.training,
        checkpoint=walk.checkpoint,
        progress=progress,
    )
    walk.result = result
    require_proven(result)
    result.save(walk.folder.path("model"), force=True)
    walk.write("result.json", json.dumps(result.to_dict(), indent=1) + "\n")


def _export(walk: Walk, progress: Progress) -> None:
    wanted = [artifact_of(entry) for entry in walk.config.export]
    calibration = None if walk.evaluation is walk.data else walk.data
    place = walk.folder.path("artifacts")
    made = []
    for position, (name, settings) in enumerate(wanted):
        place.mkdir(exist_ok=True)
        artifact = engine.export(
            walk.result.model, place / name, walk.evaluation, force=True, calibration=calibration, **settings
        )
        about = {"name": name, "kind": artifact.format, "path": f"artifacts/{name}", "size": artifact.bytes}
        made.append(artifact.to_dict() | about | {"proof": artifact.proof().to_dict()})
        progress(position + 1, len(wanted))
    walk.artifacts = made
    walk.write("artifacts.json", json.dumps(made, indent=1) + "\n")


def _track(walk: Walk, progress: Progress) -> None:
    c = walk.config
    engine.track(walk.shipped, database=c.database, report=walk.report, folder=str(walk.folder.final))


def _report(walk: Walk, progress: Progress) -> None:
    from layerwise.report import write_report

    c = walk.config
    write_report(
        walk.folder.partial,
        walk.report,
        plan=walk.plan,
        result=walk.shipped,
        leaderboard=engine.leaderboard(walk.report.domain or None, database=c.database),
        reproduce=["layerwise run --config config.yaml --out again"],
        artifacts=[_row(a) for a in walk.artifacts],
        lang=c.lang,
    )


def _row(artifact: dict[str, Any]) -> dict[str, Any]:
    """What the report's table shows of an artifact; all of it is in artifacts.json."""
    shown = {key: artifact[key] for key in ("name", "format", "path", "size", "runtime", "sha256")}
    parity = artifact["parity"]
    return shown | {"parity": f"{parity['relative']:.2g} of the largest output (bound {parity['bound']:g})"}


STAGES = (
    Stage(
        "analyze", "Ranking the layers", _analyze, ("report.json", "scores.parquet"), (*MODEL, *DATA, "methods", "granularity")
    ),
    Stage("plan", "Choosing what to cut", _plan, ("plan.yaml",), ("targets", "ratio", "compress_methods")),
    Stage("compress", "Cutting and proving", _compress, ("model", "result.json"), (*EVALUATION, *TRAINING, "recover")),
    Stage("export", "Exporting", _export, ("artifacts", "artifacts.json"), ("export",)),
    Stage("track", "Recording", _track, (), ("database",)),
    Stage("report", "Writing the report", _report, ("report.html", "figures"), ("lang",)),
)


def open_model(config: RunConfig) -> UniversalModel:
    """The model that the settings name."""
    assert config.model  # whoever calls has checked
    return engine.load(config.model, config.task, config.weights, device=config.device, head=config.head)


def open_training(config: RunConfig, model: UniversalModel) -> Data | None:
    """The training data that the settings name; with a split or a limit alone, that part of ``--data``."""
    c = config
    spec = c.train_data or (c.data if c.train_split or c.train_limit else None)
    return open_data(c, model, spec, c.train_split, c.train_limit) if spec else None


def open_data(config: RunConfig, model: UniversalModel, spec: str, split: str | None, limit: int | None) -> Data:
    """Batches for `model` from `spec`, read as the settings say."""
    return engine.load_data(
        spec,
        model,
        split,
        limit,
        config.batch_size,
        columns=config.columns,
        seed=config.seed,
        max_bad_shards=config.max_bad_shards,
    )


def methods_of(names: tuple[str, ...]) -> str | list[str]:
    """Names as the verbs take them: ``auto`` alone is a word of its own."""
    return names[0] if len(names) == 1 else list(names)


def compressors_of(names: tuple[str, ...]) -> str | list[str | CompressionMethod]:
    """As the planner takes them: ``auto``, a name for all its variants, ``NAME(setting=value)`` for exactly these settings.

    Raises `UsageError` with the nearest name of a method or setting.
    """
    if names == ("auto",):
        return "auto"
    made = {name: built(METHODS, name) for name in names}
    return [made[name] if "(" in name else name for name in names]


def recovery_of(config: RunConfig) -> list[CompressionMethod]:
    """The methods of ``recover``. Raises `UsageError` for an unknown one, and (LW-C15) where they lack data to learn from."""
    methods = [built(METHODS, spec) for spec in config.recover]
    for method in methods:
        trainable(config, method)
    return methods


def trainable(config: RunConfig, method: CompressionMethod) -> None:
    """Raises `UsageError` (LW-C15) where `method` learns and the settings name no data for it."""
    if "training" in method.needs and not (config.train_data or config.train_split or config.train_limit):
        raise UsageError(f"{method.name} needs training data.", place="--train-data", remedy="Name them.", code="LW-C15")


def artifact_of(entry: str) -> tuple[str, dict[str, str]]:
    """The file of an ``export`` entry and the exporter's settings: ``model.onnx(quantize=auto)``."""
    name, settings = parted(entry, "artifact") if "(" in entry else (entry, {})
    return artifact_name(name), settings


def artifact_name(entry: str) -> str:
    """The file of an ``export`` entry: a plain file name, or a format (``onnx`` → ``model.onnx``)."""
    if Path(entry).name != entry or entry.startswith("."):
        raise UsageError(
            f"{entry!r} is not a plain file name.", place="--export", remedy="Artifacts go into the run's folder.", code="LW-C08"
        )
    return entry if "." in entry else f"model.{entry}"


def require_proven(result: CompressionResult) -> None:
    """Raises `ProofFailed` with the first proof that does not hold."""
    for proof in result.proofs:
        if proof.passed is False:
            raise ProofFailed(
                f"{proof.name}: {proof.detail}",
                place=proof.layer,
                remedy="The compressed model is not what it should be, and was not saved.",
            )


def _outcome(walk: Walk) -> tuple[Any, ...]:
    return walk.report, walk.shipped, tuple(walk.artifacts), tuple(walk.result.missed())


def _show_failure(walk: Walk) -> None:
    """A report of what there is, so that a missed budget or a failed proof can be looked at; its own trouble is second."""
    from layerwise.report import write_report

    with contextlib.suppress(LayerwiseError, OSError):
        made = {name: value for name, value in vars(walk).items() if name in {"plan", "result"}}
        page = write_report(walk.folder.partial, walk.report, lang=walk.config.lang, **made)
        walk.listener.note(f"What was found so far: {page}")
