"""Migrations: the old schema or the new one, a backup first, models and schema in step."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text
from tracking_factory import result

from layerwise.errors import DatabaseError
from layerwise.tracking import PerformanceTracker, open_database, schema
from layerwise.tracking.models import Base

STEP = """
import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade():
    op.create_table("notes", sa.Column("id", sa.Integer(), primary_key=True))
    op.add_column("runs", sa.Column("mood", sa.Text()))
    op.execute("UPDATE runs SET mood = 'changed', model = 'changed'")
    {last}


def downgrade():
    pass
"""


def next_version(folder: Path, monkeypatch: pytest.MonkeyPatch, last: str) -> None:
    """A layerwise whose newest schema is revision 0003, which ends with the statement `last`."""
    copy = folder / "migrations"
    shutil.copytree(schema.MIGRATIONS, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "versions" / "r0003_notes.py").write_text(STEP.format(last=last))
    monkeypatch.setattr(schema, "MIGRATIONS", copy)
    monkeypatch.setattr(schema, "HEAD", "0003")


def shape(file: Path) -> list[tuple[str, str]]:
    with closing(sqlite3.connect(file)) as connection:
        found = connection.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()
        return [*found, ("rows", str(connection.execute("SELECT id, model FROM runs").fetchall()))]


def test_head_is_the_newest_revision() -> None:
    assert ScriptDirectory.from_config(schema._config()).get_current_head() == schema.HEAD


def test_models_and_migrations_agree(tmp_path: Path) -> None:
    engine = open_database(f"sqlite:///{tmp_path}/board.db")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": schema.VERSION_TABLE, "compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()


def test_a_migration_that_fails_leaves_the_old_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "board.db"
    with PerformanceTracker(f"sqlite:///{file}") as tracker:
        id = tracker.track(result())
    old = shape(file)
    with monkeypatch.context() as patch:
        next_version(tmp_path, patch, last="raise RuntimeError('the lights went out')")
        with pytest.raises(DatabaseError, match="the lights went out") as caught:
            open_database(f"sqlite:///{file}")
    assert caught.value.code == "LW-B17"
    backup = tmp_path / "board.db.backup-0002"
    assert str(backup) in str(caught.value)
    assert shape(file) == shape(backup) == old
    with PerformanceTracker(f"sqlite:///{file}") as tracker:  # the old version works as before
        assert tracker.row(id)["model"] == "tiny"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["board.db", backup.name, "migrations"]


def test_a_migration_that_succeeds_keeps_the_old_rows_in_the_backup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "board.db"
    with PerformanceTracker(f"sqlite:///{file}") as tracker:
        tracker.track(result())
        old = shape(file)
    with monkeypatch.context() as patch:
        next_version(tmp_path, patch, last="pass")
        engine = open_database(f"sqlite:///{file}")
        with engine.connect() as connection:
            assert connection.execute(text("SELECT mood FROM runs")).scalar() == "changed"
            assert schema.revision_of(connection) == "0003"
        engine.dispose()
    assert shape(tmp_path / "board.db.backup-0002") == old
    with pytest.raises(DatabaseError, match="newer") as caught:  # this version does not know 0003
        open_database(f"sqlite:///{file}")
    assert caught.value.code == "LW-B102"


def test_a_new_database_needs_no_backup(tmp_path: Path) -> None:
    open_database(f"sqlite:///{tmp_path}/board.db").dispose()
    open_database(f"sqlite:///{tmp_path}/board.db").dispose()
    assert [p.name for p in tmp_path.iterdir()] == ["board.db"]


def test_a_path_with_signs_of_its_own(tmp_path: Path) -> None:
    for name in ("50%(x)s #é.db", "a  b.db"):
        for _ in range(2):
            open_database(f"sqlite:///{tmp_path}/{name}").dispose()
        assert (tmp_path / name).is_file()
    with pytest.raises(DatabaseError, match="not a database URL"):  # a '?' begins a query, which would be cut off
        open_database(f"sqlite:///{tmp_path}/what?.db")
    assert not (tmp_path / "what").exists()
