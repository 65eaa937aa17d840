"""Opening: URLs, places, passwords, files that are not ours, settings."""

from __future__ import annotations

import os
import sqlite3
import sys
import traceback
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from tracking_factory import result

from layerwise.errors import DatabaseError, LayerwiseError
from layerwise.tracking import PerformanceTracker, address, database, open_database

SECRET = "s3cr3t%2Fp%40ss"  # the password s3cr3t/p@ss, as a URL has it
FORMS = ("s3cr3t", "p@ss", "p%40ss")


def everything_said(error: BaseException) -> str:
    """What any log, console or error tracker could print of `error`: itself, its repr, its traceback and whole chain."""
    parts, seen = [], set()
    queue: list[BaseException | None] = [error]
    while queue:
        one = queue.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            parts += [str(one), repr(one), repr(one.args), "".join(traceback.format_exception(one, chain=True))]
            queue += [one.__cause__, one.__context__]
    return "\n".join(parts)


def refusal(url: str | None, code: str, **options: Any) -> DatabaseError:
    with pytest.raises(DatabaseError) as caught:
        open_database(url, **options).dispose()
    assert caught.value.code == code, caught.value
    said = everything_said(caught.value)
    # The source lines in a traceback hold no secret, since the tests build their URLs from SECRET.
    assert not [form for form in FORMS if form in said], said
    return caught.value


@pytest.mark.parametrize(
    "url", ["", "  ", "leaderboard.db", "not a url", f"postgresql//app:{SECRET}@host/db", "://", "sqlite://board.db"]
)
def test_97_what_is_no_url(url: str) -> None:
    assert "sqlite" in str(refusal(url, "LW-B97")) or "three slashes" in str(refusal(url, "LW-B97"))


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://app:{SECRET}@host:port/db",
        "postgresql://app:s3cr3t/p@ss@host/db",
        "postgresql:///app:s3cr3t/p@ss@host/db",
        f"postgresql://app:{SECRET}@host/db?sslpassword={SECRET}",
        f"sqlite://app:{SECRET}@/board.db",
    ],
)
def test_97_garbage_with_a_password_is_not_echoed(url: str) -> None:
    refusal(url, "LW-B97")


def test_97_an_empty_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERWISE_DB", "")
    assert refusal(None, "LW-B97").place == "LAYERWISE_DB"


@pytest.mark.parametrize(
    ("url", "text"),
    [
        (f"postgrsql://app:{SECRET}@host/db", "Did you mean 'postgresql'"),
        (f"mysql://app:{SECRET}@host/db", "'mysql'"),
        ("sqlite+aiosqlite:///x.db", "sqlite+aiosqlite"),
    ],
)
def test_98_an_unknown_dialect_or_driver(url: str, text: str) -> None:
    assert text in str(refusal(url, "LW-B98"))


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_98_a_missing_driver_brings_the_install_line(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)  # what the import system does for a package that is not there
    error = refusal(f"{scheme}://app:{SECRET}@host/db", "LW-B98")
    assert "pip install 'layerwise[postgres]'" in str(error)
    assert error.place == "postgresql://app:***@host/db"


@pytest.mark.parametrize("query", ["", f"?password={SECRET}"])
def test_99_a_server_that_does_not_answer(query: str) -> None:
    pytest.importorskip("psycopg", reason="psycopg is an extra")
    user = "app" if query else f"app:{SECRET}"
    error = refusal(f"postgresql://{user}@127.0.0.1:1/db{query}", "LW-B99")
    assert "refused" in str(error)
    assert "app:***@127.0.0.1:1" in str(error)


def test_99_a_driver_that_quotes_the_password_is_redacted() -> None:
    url = address.resolve(f"postgresql://app:{SECRET}@host/db")
    cause = Exception(f"bad dsn: password=s3cr3t/p@ss url={SECRET}")
    said = str(database.translate(OperationalError("", {}, cause), url))
    assert "bad dsn: password=*** url=***" in said


def test_100_a_missing_folder(tmp_path: Path) -> None:
    assert f"{tmp_path}/no does not exist" in str(refusal(f"sqlite:///{tmp_path}/no/board.db", "LW-B100"))
    assert not (tmp_path / "no").exists()


def test_100_a_folder_instead_of_a_file(tmp_path: Path) -> None:
    assert "folder, not a database" in str(refusal(f"sqlite:///{tmp_path}", "LW-B100"))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc takes no files from anybody, root included")
def test_100_a_place_that_takes_no_files() -> None:
    assert "/proc/board.db" in refusal("sqlite:////proc/board.db", "LW-B100").place


def test_100_read_only_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "board.db"
    open_database(f"sqlite:///{file}").dispose()
    for closed, words in ((tmp_path, "is read-only"), (file, "The file is read-only")):
        # Root may write anywhere, so the answer of the system is replaced, not the mode of the file.
        monkeypatch.setattr(os, "access", lambda path, mode, closed=closed: Path(path) != closed)
        assert words in str(refusal(f"sqlite:///{file}", "LW-B100"))


@pytest.mark.parametrize(
    ("kind", "refused"), [("nfs4", True), ("cifs", True), ("9p", True), ("fuse.sshfs", True), ("ext4", False), ("tmpfs", False)]
)
def test_100_a_network_mount(tmp_path: Path, kind: str, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        f"/dev/root / ext4 rw 0 0\nserver:/x {str(tmp_path.resolve()).replace(' ', chr(92) + '040')} {kind} rw 0 0\n"
    )
    monkeypatch.setattr(address, "MOUNTS", mounts)
    if refused:
        assert kind in str(refusal(f"sqlite:///{tmp_path}/board.db", "LW-B100"))
        assert not (tmp_path / "board.db").exists()
    else:
        open_database(f"sqlite:///{tmp_path}/board.db").dispose()


@pytest.mark.parametrize(
    "content", [b"hello", b"<html>" * 1000, b"SQLite format 3\0" + b"\xff" * 5000], ids=["text", "page", "torn"]
)
def test_101_a_file_that_is_no_database(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "board.db"
    file.write_bytes(content)
    refusal(f"sqlite:///{file}", "LW-B101")
    assert file.read_bytes() == content
    assert os.listdir(tmp_path) == ["board.db"]


@pytest.mark.parametrize(
    "statements",
    [
        ["CREATE TABLE songs (id INTEGER)"],
        ["CREATE TABLE alembic_version (version_num TEXT)", "INSERT INTO alembic_version VALUES ('0001')"],
        ["CREATE TABLE layerwise_version (version_num TEXT)", "INSERT INTO layerwise_version VALUES ('9999')"],
    ],
    ids=["songs", "alembic", "newer"],
)
def test_102_what_is_not_ours_is_left_untouched(tmp_path: Path, statements: list[str]) -> None:
    file = tmp_path / "board.db"
    with closing(sqlite3.connect(file)) as other:
        for statement in statements:
            other.execute(statement)
        other.commit()
    content = file.read_bytes()
    error = refusal(f"sqlite:///{file}", "LW-B102")
    assert "it was left as it is" in str(error)
    assert ("newer" in str(error)) is ("9999" in statements[-1])
    assert file.read_bytes() == content
    assert os.listdir(tmp_path) == ["board.db"]


def test_the_default_place_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAYERWISE_DB", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    open_database().dispose()
    assert (tmp_path / "data" / "layerwise" / "leaderboard.db").is_file()
    monkeypatch.setenv("LAYERWISE_DB", f"sqlite:///{tmp_path}/named.db")
    open_database().dispose()
    assert (tmp_path / "named.db").is_file()
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert address.default_file() == tmp_path / ".local" / "share" / "layerwise" / "leaderboard.db"


def test_the_tracker_prints_no_password() -> None:
    tracker = PerformanceTracker(f"postgresql://app:{SECRET}@host/db")
    said = repr(tracker) + str(tracker) + tracker.place
    assert not [form for form in FORMS if form in said]
    assert tracker.place == "postgresql://app:***@host/db"


def test_sqlite_is_set_up_to_last(tmp_path: Path) -> None:
    engine = open_database(f"sqlite:///{tmp_path}/board.db")
    with engine.connect() as connection:
        told = {
            name: connection.execute(text(f"PRAGMA {name}")).scalar() for name in ("journal_mode", "synchronous", "foreign_keys")
        }
        assert told == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
        assert connection.execute(text("PRAGMA busy_timeout")).scalar() == 30_000
    engine.dispose()


def test_memory_works_while_the_tracker_lives() -> None:
    with PerformanceTracker("sqlite://") as tracker:
        assert tracker.row(tracker.track(result()))["model"] == "tiny"


def test_every_refusal_is_one_of_ours(tmp_path: Path) -> None:
    """A database that changes under our feet still ends in our error, with the driver's words."""
    with PerformanceTracker(f"sqlite:///{tmp_path}/board.db") as tracker:
        tracker.track(result())
        with tracker.engine.begin() as connection:
            connection.execute(text("DROP TABLE layer_scores"))
        with pytest.raises(LayerwiseError, match="no such table: layer_scores"):
            tracker.layer_scores()
