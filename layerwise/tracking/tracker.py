"""`PerformanceTracker`: tell it a result, ask it who is best and where a model came from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Engine, insert, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from layerwise.errors import UsageError, nearest
from layerwise.result import CompressionResult
from layerwise.tracking.address import describe, resolve
from layerwise.tracking.database import BUSY_SECONDS, LOST_SECONDS, open_database, transact
from layerwise.tracking.leaderboard import rank, to_frame
from layerwise.tracking.models import DOMAINS, FaithfulnessRow, LayerScoreRow, Run
from layerwise.tracking.record import FIGURES, faithfulness_values, measured_values, reported_values, score_values

if TYPE_CHECKING:
    import pandas as pd

    from layerwise.importance import ImportanceReport

T = TypeVar("T")

# What a ranking reads: plans, proofs and versions stay in the database.
RANKED = [
    Run.id, Run.parent_id, Run.created, Run.model, Run.domain, Run.task, Run.data, Run.data_fingerprint, Run.device,
    Run.methods, Run.ratio, Run.before, Run.after, Run.proven, Run.seed,
]  # fmt: skip


@dataclass(frozen=True)
class PerformanceTracker:
    """Runs in the database at `url` (see `open_database`), which is opened when first needed.

    `timeout`: seconds to wait for another process's lock; `patience`: seconds to wait for a lost server to come back.
    Every method raises `DatabaseError` or `DatabaseBusy` where the database fails.
    """

    url: str | None = field(default=None, repr=False)  # it may hold a password
    timeout: float = BUSY_SECONDS
    patience: float = LOST_SECONDS

    @cached_property
    def engine(self) -> Engine:
        return open_database(self.url, timeout=self.timeout)

    @property
    def place(self) -> str:
        """Where the rows are, without the password."""
        return describe(resolve(self.url))

    def track(
        self,
        result: CompressionResult,
        *,
        report: ImportanceReport | None = None,
        parent: int | None = None,
        name: str | None = None,
        folder: str | PathLike[str] | None = None,
    ) -> int:
        """Store `result` and return its row id; the same result again gives the same id and changes nothing.

        `report`: the scores that led to the plan, kept per layer. `parent`: the row whose model was compressed further.
        `folder`: where the run lies. Raises `UsageError` when there is no row `parent`.
        """
        values = measured_values(result, name, folder)
        scores = None if report is None else score_values(report)
        return self._write(lambda session: _store(session, values, parent, scores))

    def track_compression_performance(
        self, model_name: str, task: str, compression_ratio: float, metrics: Mapping[str, float], **more: Any
    ) -> dict[str, Any]:
        """Store figures that were measured elsewhere; returns ``model, task, compression_ratio, metrics, timestamp`` of the row.

        `compression_ratio`: bytes after over bytes before. `more`: domain, data, data_fingerprint, fingerprint, device, seed,
        source, methods, before (metrics of the uncompressed model), folder, parent. The row has no proofs and ranks below
        those that do; the same figures again give the same row. Raises `UsageError` for what is no number or no field.
        """
        values, parent = reported(model_name, task, compression_ratio, metrics, **more)
        row = self.row(self._write(lambda session: _store(session, values, parent, None)))
        return {
            "model": row["model"],
            "task": row["task"],
            "compression_ratio": row["ratio"],
            "metrics": row["after"]["metrics"],
            "timestamp": row["created"].isoformat(),
        }

    def track_reported(self, rows: Iterable[Mapping[str, Any]]) -> list[int]:
        """Store many figures in one transaction, all or none, and return their row ids in order.

        Each of `rows` holds what `track_compression_performance` takes, by name; one that is there already gives its id.
        """
        values = [reported(**row) for row in rows]
        return self._write(lambda session: [_store(session, columns, parent, None) for columns, parent in values])

    def track_report(self, report: ImportanceReport) -> str:
        """Store the layer scores of `report` and return its digest, under which a run refers to them."""
        digest, rows = score_values(report)
        self._write(lambda session: _store_scores(session, digest, rows))
        return digest

    def generate_leaderboard(
        self,
        domain: str | None = None,
        *,
        task: str | None = None,
        metric: str | None = None,
        model: str | None = None,
        limit: int | None = None,
    ) -> pd.DataFrame:
        """Runs ranked best first within the same task, data, device and quality metric, proven before unproven.

        `metric` ranks by another figure than the task's quality; `limit`: rows per group. The columns and the rule are in
        `layerwise.tracking.leaderboard`. Raises `UsageError` for an unknown domain or metric, or a negative `limit`.
        """
        if domain is not None and domain not in DOMAINS:
            raise UsageError(f"Unknown domain {domain!r}.", remedy=nearest(domain, DOMAINS))
        if limit is not None and limit < 0:
            raise UsageError(f"The limit {limit} is negative.")
        chosen = {Run.domain: domain, Run.task: task, Run.model: model}
        query = select(*RANKED).where(*(column == value for column, value in chosen.items() if value is not None))
        runs = self._read(lambda session: [dict(row._mapping) for row in session.execute(query)])
        return to_frame(rank(runs, metric=metric, limit=limit)) if runs else to_frame([])

    def row(self, id: int) -> dict[str, Any]:
        """Everything the run `id` knows, as plain data. Raises `UsageError` when there is none."""
        return self._read(lambda session: _columns(_run(session, id)))

    def lineage(self, id: int) -> list[dict[str, Any]]:
        """The runs that led to `id`, the first ancestor first and `id` last. Raises `UsageError` when there is no such run."""

        def trace(session: Session) -> list[dict[str, Any]]:
            runs = [_run(session, id)]
            while (parent := runs[-1].parent_id) is not None:
                runs.append(_run(session, parent))
            return [_columns(run) for run in reversed(runs)]

        return self._read(trace)

    def layer_scores(self, *, model: str | None = None, domain: str | None = None, report: str | None = None) -> pd.DataFrame:
        """Stored scores, one row per report, method and layer."""
        import pandas as pd

        names = [column.key for column in LayerScoreRow.__table__.columns if column.key != "id"]
        chosen = {LayerScoreRow.model: model, LayerScoreRow.domain: domain, LayerScoreRow.report: report}
        query = select(*(getattr(LayerScoreRow, name) for name in names)).order_by(LayerScoreRow.id)
        query = query.where(*(column == value for column, value in chosen.items() if value is not None))
        rows = self._read(lambda session: [tuple(row) for row in session.execute(query)])
        return pd.DataFrame(rows, columns=names).astype({"rank": "Int64"})

    def record_faithfulness(self, results: Mapping[str, Any]) -> str:
        """Store the correlations of ``layerwise benchmark faithfulness`` and return their digest; once, however often told.

        Raises `UsageError` for what is no such result.
        """
        digest, rows = faithfulness_values(results)
        self._write(lambda session: _store_once(session, FaithfulnessRow.benchmark, digest, rows))
        return digest

    def faithfulness(self, *, model: str | None = None, method: str | None = None, benchmark: str | None = None) -> pd.DataFrame:
        """Stored correlations, one row per benchmark, model, method, damage and metric, as they were recorded."""
        import pandas as pd

        names = [column.key for column in FaithfulnessRow.__table__.columns if column.key != "id"]
        chosen = {FaithfulnessRow.model: model, FaithfulnessRow.method: method, FaithfulnessRow.benchmark: benchmark}
        query = select(*(getattr(FaithfulnessRow, name) for name in names)).order_by(FaithfulnessRow.id)
        query = query.where(*(column == value for column, value in chosen.items() if value is not None))
        rows = self._read(lambda session: [tuple(row) for row in session.execute(query)])
        return pd.DataFrame(rows, columns=names).astype(dict.fromkeys(FIGURES, "float64"))

    def close(self) -> None:
        """Give the connections back; the next call opens new ones."""
        engine = vars(self).pop("engine", None)
        if engine is not None:
            engine.dispose()

    def __enter__(self) -> PerformanceTracker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read(self, work: Callable[[Session], T]) -> T:
        return transact(self.engine, work, patience=self.patience)

    def _write(self, work: Callable[[Session], T]) -> T:
        return transact(self.engine, work, write=True, patience=self.patience)


def reported(
    model_name: str, task: str, compression_ratio: float, metrics: Mapping[str, float], **more: Any
) -> tuple[dict[str, Any], int | None]:
    """The columns of a reported row, and the row it came from."""
    return reported_values(model_name, task, compression_ratio, metrics, more), more.get("parent")


def _store(
    session: Session, values: Mapping[str, Any], parent: int | None, scores: tuple[str, list[dict[str, Any]]] | None
) -> int:
    # Looking first is not an optimization: after a lost connection this finds the row whose commit nobody confirmed.
    found = session.scalar(select(Run.id).where(Run.key == values["key"]))
    if found is not None:
        return found
    if parent is not None:
        _run(session, parent)
    if scores is not None:
        _store_scores(session, *scores)
    run = Run(**values, parent_id=parent, report=scores[0] if scores else None)
    session.add(run)
    session.flush()
    return run.id


def _store_scores(session: Session, digest: str, rows: list[dict[str, Any]]) -> None:
    _store_once(session, LayerScoreRow.report, digest, rows)


def _store_once(session: Session, key: InstrumentedAttribute[str], digest: str, rows: list[dict[str, Any]]) -> None:
    """The rows of one digest, all of them, unless they are there."""
    known = session.scalar(select(key).where(key == digest).limit(1))
    if known is None and rows:
        session.execute(insert(key.class_), rows)


def _run(session: Session, id: int) -> Run:
    run = session.get(Run, id) if 0 < id < 2**31 else None
    if run is None:
        raise UsageError(f"There is no run {id}.", remedy="`layerwise leaderboard` lists the ids.")
    return run


def _columns(run: Run) -> dict[str, Any]:
    return {column.key: getattr(run, column.key) for column in Run.__table__.columns}
