"""The same behaviour on PostgreSQL: a server of its own per test session, where the binaries and psycopg are installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, event, inspect, text
from test_schema import next_version
from tracking_factory import faithfulness_results, result

from layerwise.errors import DatabaseBusy, DatabaseError
from layerwise.tracking import PerformanceTracker, database, open_database, schema

PASSWORD = "s3cr3t/p@ss"
ENCODED = "s3cr3t%2Fp%40ss"
BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
WRITER = Path(__file__).with_name("tracking_factory.py")

pytestmark = pytest.mark.skipif(not BINARIES, reason="no PostgreSQL binaries in /usr/lib/postgresql/*/bin")
psycopg = pytest.importorskip("psycopg", reason="psycopg is an extra: pip install 'layerwise[postgres]'")


def as_server(*command: str) -> None:
    """Run a server program; it refuses root, so root becomes nobody."""
    change = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"] if os.geteuid() == 0 else []
    done = subprocess.run([*change, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd="/")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """``user:password@host:port`` of a fresh server."""
    binaries = BINARIES[-1].parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Below /tmp and not pytest's folder, whose parents only its owner may enter.
    folder = Path(tempfile.mkdtemp(prefix="layerwise-pg-", dir="/tmp"))
    try:
        secret = folder / "password"
        secret.write_text(PASSWORD)
        if os.geteuid() == 0:
            for path in (folder, secret):
                shutil.chown(path, "nobody", "nogroup")
        data = str(folder / "data")
        as_server(f"{binaries}/initdb", "-D", data, "-U", "app", "-A", "scram-sha-256", f"--pwfile={secret}", "-E", "UTF8")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -k {folder} -c fsync=off"
        as_server(f"{binaries}/pg_ctl", "-D", data, "-l", f"{folder}/log", "-w", "-o", options, "start")
        try:
            yield f"app:{ENCODED}@127.0.0.1:{port}"
        finally:
            as_server(f"{binaries}/pg_ctl", "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def url(server: str) -> Iterator[str]:
    """A URL of an empty database."""
    admin = create_engine(f"postgresql+psycopg://{server}/postgres", isolation_level="AUTOCOMMIT")
    name = f"board_{time.monotonic_ns()}"
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield f"postgresql://{server}/{name}"
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


@pytest.fixture
def tracker(url: str) -> Iterator[PerformanceTracker]:
    with PerformanceTracker(url, timeout=0.5, patience=20) as tracker:
        yield tracker


def test_a_row_comes_back(tracker: PerformanceTracker) -> None:
    told = result(name="a\0b\ud800", source={"path": "x\0\ud800"})
    first = tracker.track(told)
    assert tracker.track(told) == first
    second = tracker.track(result(seed=8), parent=first)
    row = tracker.row(first)
    assert row["after"] == told.after.to_dict()
    assert row["proofs"][1]["measured"] != row["proofs"][1]["measured"]  # NaN, which JSONB has no word for
    assert row["created"].utcoffset().total_seconds() == 0
    assert [r["id"] for r in tracker.lineage(second)] == [first, second]
    assert tracker.generate_leaderboard("vision", metric="size")["id"].to_list() == [first, second]
    reported = tracker.track_compression_performance("m", "classification", 0.5, {"accuracy": float("inf")})
    assert reported["metrics"] == {"accuracy": float("inf")}


def test_a_benchmark_comes_back(tracker: PerformanceTracker) -> None:
    first = tracker.record_faithfulness(faithfulness_results())
    assert tracker.record_faithfulness(faithfulness_results()) == first
    frame = tracker.faithfulness(method="depth")
    assert frame[["benchmark", "model", "rho", "layers"]].values.tolist() == [[first, "net", 0.5, 8]]
    assert frame["partial"].isna().all()


def test_the_columns_are_jsonb(tracker: PerformanceTracker) -> None:
    tracker.track(result())
    with tracker.engine.connect() as connection:
        query = text("SELECT after -> 'metrics' ->> 'accuracy' FROM runs WHERE methods ? 'remove'")
        assert connection.execute(query).scalar() == "0.88"


def test_a_wrong_password_is_not_repeated(server: str) -> None:
    wrong = server.replace(ENCODED, "wr0ng%40word")
    for url in (
        f"postgresql://{wrong}/postgres",
        f"postgresql://{wrong.replace(':wr0ng%40word', '')}/postgres?password=wr0ng%40word",
    ):
        with pytest.raises(DatabaseError) as caught:
            open_database(url)
        said = str(caught.value) + repr(caught.value) + "".join(traceback.format_exception(caught.value))
        assert (caught.value.code, "authentication failed" in said, "wr0ng" in said) == ("LW-B99", True, False)
        assert caught.value.__context__ is caught.value.__cause__ is None


def test_another_applications_database_is_left_alone(url: str) -> None:
    other = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with other.begin() as connection:
        connection.execute(text("CREATE TABLE songs (id INTEGER)"))
    with pytest.raises(DatabaseError, match="songs") as caught:
        open_database(url)
    assert caught.value.code == "LW-B102"
    assert inspect(other).get_table_names() == ["songs"]
    other.dispose()


def test_a_migration_that_fails_leaves_the_old_schema(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with PerformanceTracker(url) as tracker:
        id = tracker.track(result())
        old = inspect(tracker.engine).get_table_names()
    with monkeypatch.context() as patch:
        next_version(tmp_path, patch, last="raise RuntimeError('the lights went out')")
        with pytest.raises(DatabaseError, match="the lights went out"):
            open_database(url)
    with PerformanceTracker(url) as tracker:
        assert inspect(tracker.engine).get_table_names() == old
        assert tracker.row(id)["model"] == "tiny"
    assert schema.HEAD == "0002"


def test_a_held_lock_is_named(tracker: PerformanceTracker) -> None:
    tracker.track(result(seed=1))
    with tracker.engine.connect() as holder:
        holder.execute(text("LOCK TABLE runs IN ACCESS EXCLUSIVE MODE"))
        started = time.monotonic()
        with pytest.raises(DatabaseBusy, match="lock timeout"):
            tracker.track(result(seed=2))
        assert time.monotonic() - started >= 0.5
    assert len(tracker.generate_leaderboard()) == 1


def terminated(tracker: PerformanceTracker, session: Any) -> None:
    """The server ends this session's connection, as it does when it goes down."""
    pid = session.execute(text("SELECT pg_backend_pid()")).scalar()
    with tracker.engine.connect() as other:
        assert other.execute(text(f"SELECT pg_terminate_backend({pid})")).scalar()


def test_a_lost_connection_is_repeated(tracker: PerformanceTracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "FIRST_PAUSE", 0.01)
    pids: list[int] = []

    def work(session: Any) -> int:
        pids.append(session.execute(text("SELECT pg_backend_pid()")).scalar())
        if len(pids) == 1:
            terminated(tracker, session)
        return session.execute(text("SELECT 42")).scalar()

    assert database.transact(tracker.engine, work, write=True) == 42
    assert len(set(pids)) == 2


def test_an_unconfirmed_commit_is_looked_up(tracker: PerformanceTracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "FIRST_PAUSE", 0.01)
    commit: Callable[[Any], None] = tracker.engine.dialect.do_commit
    lost = []

    def commit_and_lose(connection: Any) -> None:
        commit(connection)
        if not lost:
            lost.append(1)
            connection.dbapi_connection.close()
            raise psycopg.OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr(tracker.engine.dialect, "do_commit", commit_and_lose)
    id = tracker.track(result())
    assert lost == [1]
    assert tracker.generate_leaderboard()["id"].to_list() == [id]


def test_writers_at_once_lose_no_row_and_share_equal_ones(url: str) -> None:
    """Two pairs write the same rows: whoever comes second gets the first one's id."""
    writers = [
        subprocess.Popen(
            [sys.executable, str(WRITER), url, str(pair), "15"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for pair in (0, 0, 1, 1)
    ]
    told = []
    for process in writers:
        out, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        told.append([int(line) for line in out.split()])
    assert told[0] == told[1]
    assert told[2] == told[3]
    with PerformanceTracker(url) as tracker:
        assert sorted(tracker.generate_leaderboard()["id"]) == sorted(told[0] + told[2])


def test_a_server_that_is_gone_for_good_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "FIRST_PAUSE", 0.05)
    engine = create_engine("postgresql+psycopg://app@127.0.0.1:1/db")
    tries: list[int] = []
    event.listen(engine, "do_connect", lambda *_: tries.append(1))
    with pytest.raises(DatabaseError, match="refused") as caught:
        database.transact(engine, lambda session: session.execute(text("SELECT 1")), patience=0.5)
    assert caught.value.code == "LW-B99"
    assert 1 < len(tries) < 50
    engine.dispose()
