"""The schema's version: what a database is, and how an old one becomes new, wholly or not at all.

Decision: the whole migration is one transaction under one lock, so a step that fails leaves the old schema; Alembic only
runs when the revision differs, because importing it costs more than the query that finds out.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, Engine, column, inspect, select, table, text

from layerwise.errors import DatabaseError
from layerwise.files import staged_file
from layerwise.tracking.address import describe, sqlite_file

if TYPE_CHECKING:
    from alembic.config import Config

HEAD = "0002"  # the newest revision below `migrations/versions`
VERSION_TABLE = "layerwise_version"  # not Alembic's default name: another application's table is not mistaken for ours
MIGRATIONS = Path(__file__).with_name("migrations")
WRITE = "layerwise_write"  # execution option: begin by taking the write lock
ADVISORY_LOCK = 0x6C617965  # "laye": any number that all layerwise processes agree on

# SQLite needs no more than the write lock that the transaction began with.
LOCKS: dict[str, Callable[[Connection], object]] = {
    "sqlite": lambda connection: None,
    "postgresql": lambda connection: connection.execute(text(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})")),
}


def revision_of(connection: Connection) -> str | None:
    """The schema's revision, None for an empty database. Raises `DatabaseError` LW-B102 for another application's."""
    tables = set(inspect(connection).get_table_names())
    if VERSION_TABLE in tables:
        return connection.execute(select(column("version_num")).select_from(table(VERSION_TABLE))).scalar()
    if not tables:
        return None
    names = ", ".join(sorted(tables)[:5])
    raise DatabaseError(
        f"The database belongs to another application (tables: {names}); it was left as it is.",
        place=describe(connection.engine.url),
        remedy="Give layerwise a database of its own.",
        code="LW-B102",
    )


def upgrade(engine: Engine) -> None:
    """Bring the database to this version's schema: under a lock, after a backup of an SQLite file, all or nothing.

    Raises `DatabaseError`: LW-B102 when it is newer than this version or another application's (then it is untouched),
    LW-B17 when a migration fails (then the old schema is still there, and so is the backup).
    """
    with engine.connect() as connection:
        if revision_of(connection) == HEAD:
            return
    with engine.execution_options(**{WRITE: True}).begin() as connection:
        LOCKS[engine.dialect.name](connection)
        revision = revision_of(connection)  # again: another process may have been first
        if revision != HEAD:
            require_known(revision, describe(engine.url))
            _migrate(connection, _back_up(sqlite_file(engine.url), revision))


def require_known(revision: str | None, place: str) -> None:
    """Raise `DatabaseError` LW-B102 for a revision that this version does not have."""
    if revision is None or revision == HEAD:
        return
    from alembic.script import ScriptDirectory

    known = {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}
    if revision not in known:
        raise DatabaseError(
            f"The schema is newer than this version of layerwise (revision {revision!r}, known up to {HEAD!r}); "
            "it was left as it is.",
            place=place,
            remedy="Update layerwise: pip install --upgrade layerwise",
            code="LW-B102",
        )


def _config() -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    return config


def _migrate(connection: Connection, backup: Path | None) -> None:
    from alembic import command

    config = _config()
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except Exception as error:
        kept = f" A backup is at {backup}." if backup else ""
        raise DatabaseError(
            f"The migration failed and was rolled back: {type(error).__name__}: {error}.",
            place=describe(connection.engine.url),
            remedy=f"The old schema and all rows are still there.{kept}",
            code="LW-B17",
        ) from error


def _back_up(file: Path | None, revision: str | None) -> Path | None:
    """A copy of an SQLite database beside it, through SQLite itself: a plain copy would miss what is still in the WAL."""
    if file is None or revision is None:
        return None
    target = file.with_name(f"{file.name}.backup-{revision}")
    with staged_file(target) as partial, closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(partial)) as copy:
        source.backup(copy)
    return target
