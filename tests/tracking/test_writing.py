"""Writing: held locks, lost connections, a full disk, concurrent and killed writers, all on SQLite."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, text
from tracking_factory import result

from layerwise.errors import DatabaseBusy, DatabaseError, DiskFull
from layerwise.result import Measurement
from layerwise.tracking import PerformanceTracker, database, open_database
from layerwise.tracking.models import Run

WRITER = Path(__file__).with_name("tracking_factory.py")


@contextlib.contextmanager
def write_lock(file: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(file, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        yield holder


def test_a_held_lock_is_waited_for_and_then_named(tmp_path: Path) -> None:
    file = tmp_path / "board.db"
    with PerformanceTracker(f"sqlite:///{file}", timeout=0.4) as tracker:
        first = tracker.track(result(seed=1))
        with write_lock(file) as holder:
            assert holder.in_transaction
            started = time.monotonic()
            with pytest.raises(DatabaseBusy) as caught:
                tracker.track(result(seed=2))
            assert 0.4 <= time.monotonic() - started < 10
            assert "database is locked" in str(caught.value)
            assert (caught.value.code, caught.value.exit_code) == ("LW-B15", 4)
            assert tracker.row(first)["seed"] == 1  # reading goes on
        assert tracker.track(result(seed=2)) == first + 1  # and so does writing, once the lock is free


def test_a_lock_that_is_refused_at_once_is_asked_for_again(tmp_path: Path) -> None:
    """SQLite answers "busy" without waiting while another process opens, closes or recovers the file."""
    file, tries = tmp_path / "board.db", []
    with write_lock(file) as holder, closing(sqlite3.connect(file, timeout=0, isolation_level=None)) as hasty:

        def begin() -> bool:
            tries.append(1)
            if len(tries) == 3:
                holder.execute("ROLLBACK")
            hasty.execute("BEGIN IMMEDIATE")
            return hasty.in_transaction

        assert database.patiently(begin, timeout=30)
    assert len(tries) == 3


def test_a_held_lock_stops_a_new_database_too(tmp_path: Path) -> None:
    with write_lock(tmp_path / "board.db"), pytest.raises(DatabaseBusy):
        open_database(f"sqlite:///{tmp_path}/board.db", timeout=0.2)


def test_a_read_and_a_write_in_one_transaction_wait_for_each_other(tmp_path: Path) -> None:
    """Two deferred transactions that read and then write would fail at once, with any timeout."""
    engine = open_database(f"sqlite:///{tmp_path}/board.db", timeout=0.3)

    def nested(session: Any) -> None:
        session.scalar(select(Run.id))
        with pytest.raises(DatabaseBusy):
            database.transact(engine, lambda inner: None, write=True)

    database.transact(engine, nested, write=True)
    engine.dispose()


def test_an_unconfirmed_commit_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit arrives, its confirmation does not: the repeated work finds the row instead of writing a second one."""
    monkeypatch.setattr(database, "FIRST_PAUSE", 0.01)
    with PerformanceTracker(f"sqlite:///{tmp_path}/board.db") as tracker:
        commit, lost = tracker.engine.dialect.do_commit, []

        def commit_and_lose(connection: Any) -> None:
            commit(connection)
            if not lost:
                lost.append(1)
                connection.dbapi_connection.close()
                raise sqlite3.ProgrammingError("Cannot operate on a closed database.")

        monkeypatch.setattr(tracker.engine.dialect, "do_commit", commit_and_lose)
        id = tracker.track(result())
        assert lost == [1]
        assert tracker.generate_leaderboard()["id"].to_list() == [id] == [1]


def test_a_connection_that_stays_lost_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "FIRST_PAUSE", 0.05)
    tries = []
    with PerformanceTracker(f"sqlite:///{tmp_path}/board.db", patience=0.5) as tracker:

        def work(session: Any) -> None:
            tries.append(1)
            session.connection().connection.dbapi_connection.close()
            session.execute(select(Run.id))

        with pytest.raises(DatabaseError, match="The connection was lost"):
            database.transact(tracker.engine, work, patience=tracker.patience)
    assert len(tries) > 1


def test_a_full_disk_is_said_and_harmless(tmp_path: Path) -> None:
    with PerformanceTracker(f"sqlite:///{tmp_path}/board.db") as tracker:
        id = tracker.track(result(seed=1))
        with tracker.engine.connect() as connection:  # the limit holds for this connection, which the pool hands out again
            pages = connection.execute(text("PRAGMA page_count")).scalar()
            connection.execute(text(f"PRAGMA max_page_count = {pages}"))
        with pytest.raises(DiskFull, match="full"):
            tracker.track(result(seed=2, source={"long": "x" * 100_000}))
        assert tracker.generate_leaderboard()["id"].to_list() == [id]


def writer(url: str, worker: int, rows: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(WRITER), url, str(worker), str(rows)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_eight_processes_lose_no_row(tmp_path: Path) -> None:
    """All eight find no database, make it together and write at once."""
    url = f"sqlite:///{tmp_path}/board.db"
    writers = [writer(url, worker, 20) for worker in range(8)]
    told: list[int] = []
    for process in writers:
        out, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        told += map(int, out.split())
    assert sorted(told) == list(range(1, 161))
    with PerformanceTracker(url) as tracker:
        frame = tracker.generate_leaderboard(limit=None)
        assert sorted(frame["id"]) == sorted(told)
        assert frame.groupby("model")["seed"].nunique().to_list() == [20] * 8


def test_a_killed_writer_leaves_whole_rows(tmp_path: Path) -> None:
    file = tmp_path / "board.db"
    told: list[int] = []
    for worker, rows in enumerate((1, 7, 15)):
        process = writer(f"sqlite:///{file}", worker, 100_000)
        assert process.stdout is not None
        assert process.stderr is not None
        with process.stdout, process.stderr:
            told += [int(process.stdout.readline()) for _ in range(rows)]
            process.kill()
            assert process.wait(timeout=60) == -signal.SIGKILL  # it was in the middle of its work
    with PerformanceTracker(f"sqlite:///{file}") as tracker:
        with tracker.engine.connect() as connection:
            assert connection.execute(text("PRAGMA integrity_check")).scalar() == "ok"
        ids = tracker.generate_leaderboard()["id"].to_list()
        assert set(told) <= set(ids)  # an id that was told is a row that is there
        for id in ids:
            row = tracker.row(id)
            assert Measurement.from_dict(row["after"]) == result().after
            assert len(row["proofs"]) == 2
