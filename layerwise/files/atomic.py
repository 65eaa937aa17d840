"""One file, written so that it is whole or absent, and the errors of the disk in words.

A failed sync means "not saved": the kernel may have dropped the pages and report success on the second try, so no sync
is ever repeated on the same descriptor.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from layerwise.errors import DiskFull, LayerwiseError, RunError, UsageError

TEMPORARY = re.compile(r"^\..*\.\d+-[0-9a-f]{8}\.tmp$")


def need_space(path: str | os.PathLike[str], size: int) -> None:
    """Raise `DiskFull` unless `size` bytes are free where `path` is or will be. Reserves nothing."""
    have = _free(Path(path))
    if have < size:
        raise _disk_full(Path(path), size, have)


@contextlib.contextmanager
def disk_errors(path: str | os.PathLike[str], need: int | None = None) -> Iterator[None]:
    """Turn every `OSError` of the block into one of ours, at `path`; `need` is the size in bytes of what is written.

    A full disk or quota becomes `DiskFull`; no permission, a read-only disk or a wrong path `UsageError`; the rest
    (an I/O error of the device) `RunError` LW-R09: not saved.
    """
    try:
        yield
    except OSError as error:
        raise _translated(error, Path(path), need) from error


def _translated(error: OSError, path: Path, need: int | None) -> LayerwiseError:
    place = str(path.absolute())
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _disk_full(path, need, _free(path))
    reason = error.strerror or str(error)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "Choose a place that you may write to, or change its permissions."
        return UsageError(f"cannot be written: {reason}.", place=place, remedy=remedy, code="LW-C06")
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP):
        remedy = "Check the path; its folder must exist."
        return UsageError(f"is not a place to write to: {reason}.", place=place, remedy=remedy, code="LW-C05")
    remedy = "Nothing was saved under the final name. Check the disk, then repeat."
    return RunError(f"could not be saved: {reason}.", place=place, remedy=remedy, code="LW-R09")


def _disk_full(path: Path, need: int | None, have: int) -> DiskFull:
    needed = "more than was left" if need is None else f"{need:,} bytes"
    return DiskFull(
        f"The disk is full: needs {needed}, {have:,} bytes are free.",
        place=str(path.absolute()),
        remedy="What was there before is unchanged. Free some space or choose another place.",
    )


def _free(path: Path) -> int:
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


@contextlib.contextmanager
def full_disk(path: Path, need: int | None = None) -> Iterator[None]:
    """Translate only the full disk: any other `OSError` of the caller's block may concern files that are not ours."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _translated(error, Path(error.filename or path), need) from error
        raise


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write `data` (text as UTF-8) so that `path` holds the whole old or the whole new content at any moment.

    Raises `DiskFull`, `UsageError` (LW-C05, LW-C06) or `RunError`; then the old content is intact.
    """
    path = Path(path)
    content = data.encode() if isinstance(data, str) else data
    with disk_errors(path, len(content)), _replacing(path) as temporary, open(temporary, "xb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


@contextlib.contextmanager
def staged_file(path: str | os.PathLike[str], *, size: int | None = None) -> Iterator[Path]:
    """For a writer that wants a file name: yields a temporary one beside `path`, moved there when the block succeeds.

    `size`: the expected bytes, checked against the free space first. Raises as `write_atomic` does.
    """
    path = Path(path)
    if size is not None:
        need_space(path, size)
    with full_disk(path, size), _replacing(path) as temporary:
        yield temporary
        with disk_errors(path):
            sync(temporary)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A fresh name beside `path` for a file that the block fills and syncs."""
    temporary = beside(path)
    try:
        yield temporary
        with disk_errors(path):
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with disk_errors(path):
        sync(path.parent)


def beside(path: Path) -> Path:
    # The owner's pid is in the name, so that a later run can tell what a killed one left behind.
    return path.parent / f".{path.name[:60]}.{os.getpid()}-{secrets.token_hex(4)}.tmp"


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
