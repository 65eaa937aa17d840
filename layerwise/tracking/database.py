"""Engine, transactions and errors: from here on SQLite and PostgreSQL are the same.

Decision: a writing transaction takes SQLite's write lock when it begins (``BEGIN IMMEDIATE``), because one that reads first
and writes later is refused at once, whatever the busy timeout. A lost connection repeats the whole transaction: nobody knows
whether its commit arrived, so each unit of work first looks its row up by key. Driver errors are translated and never
chained, since they may quote the URL.
"""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from sqlalchemy import Connection, Engine, NullPool, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.orm import Session

from layerwise.errors import DatabaseBusy, DatabaseError, DiskFull, LayerwiseError
from layerwise.tracking.address import check_place, describe, redact, resolve, sqlite_file
from layerwise.tracking.schema import WRITE, require_known, revision_of, upgrade

T = TypeVar("T")

BUSY_SECONDS = 30.0
LOST_SECONDS = 300.0
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
CONNECT_SECONDS = 10
DRIVER_ERRORS = (SQLAlchemyError, sqlite3.Error)

BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}
PLACE = {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_IOERR}
NO_DATABASE = {sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT}
LOCK_TIMEOUT, UNIQUE, DEADLOCK, SERIALIZATION = "55P03", "23505", "40P01", "40001"  # SQLSTATE


def open_database(url: str | None = None, *, timeout: float = BUSY_SECONDS) -> Engine:
    """An engine on the leaderboard database, made or brought to the newest schema where needed.

    `url`: else the variable ``LAYERWISE_DB``, else SQLite in the user's data folder. `timeout`: seconds to wait for a lock
    that another process holds. Raises `DatabaseError`: LW-B97 no URL, B98 dialect or driver, B99 the server refuses, B100 the
    place, B101 not a database, B102 a newer schema or another application, B17 a migration; `DatabaseBusy` after `timeout`.
    """
    address = resolve(url)
    file = sqlite_file(address)
    if file is not None:
        check_place(file)
        _translating(lambda: _inspect(file, address), address)
    engine = _translating(lambda: _engine(address, timeout), address)
    try:
        _translating(lambda: upgrade(engine), address)
    except LayerwiseError:
        engine.dispose()
        raise
    return engine


def _inspect(file: Path, address: URL) -> None:
    """Refuse what is not ours before a writing connection could change it: even switching to WAL would."""
    if not file.exists():
        return
    source = f"file:{quote(str(file))}?mode=ro"
    looking = create_engine(address, creator=lambda: sqlite3.connect(source, uri=True, timeout=BUSY_SECONDS), poolclass=NullPool)
    with closing(looking.connect()) as connection:
        require_known(revision_of(connection), describe(address))


def _engine(address: URL, timeout: float) -> Engine:
    options: dict[str, Any] = {}
    if sqlite_file(address) is not None:
        options = {"connect_args": {"timeout": timeout}}
    elif address.get_backend_name() == "postgresql":
        options = {"connect_args": {"connect_timeout": CONNECT_SECONDS}}
    try:
        engine = create_engine(address, **options)
    except ImportError:
        engine = None
    if engine is None:
        raise DatabaseError(
            "PostgreSQL needs the package 'psycopg', which is not installed or finds no libpq.",
            place=describe(address),
            remedy="Install it with: pip install 'layerwise[postgres]'",
            code="LW-B98",
        )
    SETTINGS[engine.dialect.name](engine, timeout)
    return engine


def _set_up_sqlite(engine: Engine, timeout: float) -> None:
    @event.listens_for(engine, "connect")
    def connect(connection: sqlite3.Connection, record: object) -> None:
        connection.isolation_level = None  # the driver would begin by itself, late and deferred
        (mode,) = patiently(lambda: connection.execute("PRAGMA journal_mode=WAL").fetchone(), timeout)
        if mode not in {"wal", "memory"}:
            place, what = describe(engine.url), f"The file system does not carry SQLite's write-ahead log, only {mode!r}."
            raise DatabaseError(what, place=place, remedy="Use a local disk, or PostgreSQL.", code="LW-B100")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        kind = "IMMEDIATE" if connection.get_execution_options().get(WRITE) else "DEFERRED"
        driver = connection.connection.driver_connection
        assert isinstance(driver, sqlite3.Connection)
        patiently(lambda: driver.execute(f"BEGIN {kind}"), timeout)


def _set_up_postgres(engine: Engine, timeout: float) -> None:
    @event.listens_for(engine, "connect")
    def connect(connection: Any, record: object) -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"SET lock_timeout = {int(timeout * 1000)}")
        connection.commit()


SETTINGS: dict[str, Callable[[Engine, float], None]] = {"sqlite": _set_up_sqlite, "postgresql": _set_up_postgres}


def patiently(call: Callable[[], T], timeout: float) -> T:
    """`call` again, after a random short pause, while SQLite says it is locked and `timeout` seconds have not passed.

    SQLite's own busy timeout does not cover a database that is just being opened, closed or switched to WAL.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            return call()
        except sqlite3.OperationalError as error:
            if sqlite_code(error) not in BUSY or time.monotonic() >= deadline:
                raise
        time.sleep(random.uniform(0.002, 0.05))


def sqlite_code(error: BaseException | None) -> int:
    """SQLite's primary result code, -1 for other errors."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return -1 if code is None else code & 0xFF


def transact(engine: Engine, work: Callable[[Session], T], *, write: bool = False, patience: float = LOST_SECONDS) -> T:
    """What `work` returns, in one transaction; with `write` it holds the write lock from the start.

    When the connection is lost the whole `work` is repeated for up to `patience` seconds, so it must be idempotent.
    Raises `DatabaseBusy`, `DiskFull` and `DatabaseError`.
    """
    deadline, pause = time.monotonic() + patience, FIRST_PAUSE
    while True:
        try:
            with Session(engine.execution_options(**{WRITE: write}), expire_on_commit=False) as session, session.begin():
                if write:
                    session.connection()  # begins here and now; a session alone would begin with its first statement
                return work(session)
        except DRIVER_ERRORS as error:
            passing = _passing(error)
            problem = translate(error, engine.url)
        if not passing or time.monotonic() + pause > deadline:
            raise problem
        time.sleep(random.uniform(0, pause))
        pause = min(2 * pause, LONGEST_PAUSE)


def _translating(call: Callable[[], T], address: URL) -> T:
    try:
        return call()
    except DRIVER_ERRORS as error:
        problem = translate(error, address)
    raise problem  # outside the block above: the driver's error is not in the chain


def _passing(error: Exception) -> bool:
    """Whether the same work may succeed a moment later: connection lost, or another writer was first."""
    if not isinstance(error, DBAPIError):
        return False
    again = getattr(error.orig, "sqlstate", "") in {UNIQUE, DEADLOCK, SERIALIZATION}
    return again or error.connection_invalidated or _no_connection(error)


def _no_connection(error: Exception) -> bool:
    """Whether PostgreSQL could not be reached at all: such errors carry no SQLSTATE."""
    return isinstance(error, OperationalError) and getattr(error.orig, "sqlstate", "") is None


def translate(error: Exception, url: URL) -> LayerwiseError:
    """Our error for a driver's or SQLAlchemy's, in the driver's own words without the password."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    said = redact(" ".join(str(cause).split()), url)
    place, code = describe(url), sqlite_code(cause)
    if code in BUSY or getattr(cause, "sqlstate", "") == LOCK_TIMEOUT:
        remedy = "Try again when it is done; a process that hangs while it writes must be ended."
        return DatabaseBusy(f"Another process holds the write lock ({said}).", place=place, remedy=remedy)
    if code == sqlite3.SQLITE_FULL:
        return DiskFull(f"The disk is full ({said}).", place=place, remedy="Nothing was written. Free some space.")
    if code in NO_DATABASE:
        remedy = "Name another file, or restore this one from a backup."
        return DatabaseError(f"This is not a database ({said}).", place=place, remedy=remedy, code="LW-B101")
    if code in PLACE:
        return DatabaseError(f"The database cannot be opened or written ({said}).", place=place, code="LW-B100")
    if _no_connection(error):
        remedy = "Check host, port, database, user and password."
        return DatabaseError(f"The server does not let us in ({said}).", place=place, remedy=remedy, code="LW-B99")
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return DatabaseError(f"The connection was lost ({said}).", place=place, code="LW-B16")
    return DatabaseError(f"The database refused: {said}.", place=place)
