"""Where the database is: URL → checked `sqlalchemy.URL`, without ever printing a password.

Decision: a URL that cannot be read is not echoed, because nobody knows which part of it is the password. Drivers are a
closed table: what is not tested (asynchronous drivers, other servers) is refused rather than half working.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import quote, quote_plus

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from layerwise.errors import DatabaseError, nearest

VARIABLE = "LAYERWISE_DB"
SQLITE = "sqlite+pysqlite"
POSTGRES = "postgresql+psycopg"
DRIVERS = {
    "sqlite": SQLITE,
    SQLITE: SQLITE,
    "postgresql": POSTGRES,  # SQLAlchemy's own default for this name changed between 2.0 and 2.1
    "postgres": POSTGRES,
    POSTGRES: POSTGRES,
}
EXAMPLES = "Write sqlite:////absolute/path/leaderboard.db or postgresql://user:password@host/database."
ENCODE = "Percent-encode special characters of the password ('@' is %40, '/' is %2F, '?' is %3F)."

MOUNTS = Path("/proc/self/mounts")  # Linux; elsewhere a network mount goes unnoticed until SQLite refuses WAL
NETWORK = re.compile(r"nfs\d?|cifs|smb\w*|9p|afs|ceph|lustre|glusterfs|fuse\.(sshfs|s3fs|rclone|glusterfs|ceph-fuse|nfs)")


def default_file() -> Path:
    """``$XDG_DATA_HOME/layerwise/leaderboard.db``, or the same below ``~/.local/share``."""
    home = os.environ.get("XDG_DATA_HOME", "")
    # The XDG specification: a relative path there is to be ignored.
    base = Path(home) if Path(home).is_absolute() else Path.home() / ".local" / "share"
    return base / "layerwise" / "leaderboard.db"


def resolve(url: str | None) -> URL:
    """The address that `url`, else the variable ``LAYERWISE_DB``, else the default place stands for.

    Raises `DatabaseError` LW-B97 for what is no URL, LW-B98 for a dialect or driver that layerwise does not speak.
    """
    place = "database URL"
    if url is None and VARIABLE in os.environ:
        url, place = os.environ[VARIABLE], VARIABLE
    if url is None:
        return URL.create(SQLITE, database=str(default_file()))
    return _checked(_parse(url, place), place)


def _parse(text: str, place: str) -> URL:
    if not text.strip():
        raise DatabaseError("The URL is empty.", place=place, remedy=EXAMPLES, code="LW-B97")
    try:
        url = make_url(text.strip())
        if url.query or "?" not in text:  # what follows a lone '?' would be dropped in silence, also from a file's name
            return url
    except (ArgumentError, ValueError):
        pass  # raised below, outside this block: the parser's message may quote the password and must not be in the chain
    raise DatabaseError("This is not a database URL.", place=place, remedy=f"{EXAMPLES} {ENCODE}", code="LW-B97")


def _checked(url: URL, place: str) -> URL:
    driver = DRIVERS.get(url.drivername)
    if driver is None:
        raise DatabaseError(
            f"No such database: {url.drivername!r}.", place=place, remedy=nearest(url.drivername, DRIVERS), code="LW-B98"
        )
    url = url.set(drivername=driver)
    return _checked_sqlite(url, place) if driver == SQLITE else _checked_postgres(url, place)


def _checked_sqlite(url: URL, place: str) -> URL:
    if url.host or url.username or url.password or url.port or url.query:
        raise DatabaseError(
            "A sqlite URL has a path and nothing else.",
            place=place,
            remedy="Write three slashes before a relative path, four before an absolute one.",
            code="LW-B97",
        )
    if "\0" in (url.database or ""):
        raise DatabaseError("The path holds a null character.", place=place, code="LW-B97")
    if in_memory(url):
        return url
    return url.set(database=str(Path(url.database or "").expanduser().absolute()))


def _checked_postgres(url: URL, place: str) -> URL:
    # 'user:pa@ss@host' parses, with half of the password in the host, and would be printed there.
    if "@" in (url.host or "") or "@" in (url.database or ""):
        raise DatabaseError("The URL holds one '@' too many.", place=place, remedy=ENCODE, code="LW-B97")
    password = url.query.get("password")
    if isinstance(password, str):  # SQLAlchemy hides the password only in its proper place
        url = url.set(password=password).difference_update_query(["password"])
    if any("password" in key for key in url.query):
        remedy = "Put it into a libpq service file and name that: ?service=..."
        raise DatabaseError("A password does not belong into the URL's query.", place=place, remedy=remedy, code="LW-B97")
    return url


def in_memory(url: URL) -> bool:
    """Whether this is SQLite's database that dies with the process."""
    return url.drivername == SQLITE and url.database in {None, "", ":memory:"}


def sqlite_file(url: URL) -> Path | None:
    """The file of an SQLite address; None for a server or for memory."""
    return Path(url.database or "") if url.drivername == SQLITE and not in_memory(url) else None


def describe(url: URL) -> str:
    """The address for people: password as ``***``, no query."""
    return url.set(drivername=url.get_backend_name(), query={}).render_as_string(hide_password=True)


def redact(text: str, url: URL) -> str:
    """`text` without the password of `url`, plain or percent-encoded."""
    password = str(url.password or "")
    for form in sorted({password, quote(password, safe=""), quote(password), quote_plus(password)}, key=len, reverse=True):
        text = text.replace(form, "***") if form else text
    return text


def check_place(file: Path) -> None:
    """Raise `DatabaseError` LW-B100 unless an SQLite database can live at `file`. Makes the folder of the default place."""
    try:
        problem = _problem(file)
    except OSError as error:
        problem = error.strerror or type(error).__name__
    if problem:
        remedy = f"Choose another place, by argument or by {VARIABLE}."
        raise DatabaseError(f"{problem[:1].upper()}{problem[1:]}.", place=str(file), remedy=remedy, code="LW-B100")


def _problem(file: Path) -> str:
    folder = file.parent
    if file == default_file():
        folder.mkdir(parents=True, exist_ok=True)
    if not folder.is_dir():
        return f"the folder {folder} does not exist"
    if file.is_dir():
        return "this is a folder, not a database file"
    if not os.access(folder, os.W_OK):  # SQLite keeps its journal beside the file
        return f"the folder {folder} is read-only"
    if file.exists() and not os.access(file, os.W_OK):
        return "the file is read-only"
    kind = network_mount(folder)
    return f"the folder is a network mount ({kind}), where SQLite's locks are not safe; use PostgreSQL" if kind else ""


def network_mount(folder: Path) -> str:
    """The type of network file system that holds `folder`, or nothing for a local one."""
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    resolved, depth, found = folder.resolve(), -1, ""
    for _, point, kind, *_ in (line.split() for line in lines):
        mount = Path(point.replace("\\040", " "))
        if resolved.is_relative_to(mount) and len(mount.parts) >= depth:  # a later mount covers an earlier one
            depth, found = len(mount.parts), kind
    return found if NETWORK.fullmatch(found) else ""
