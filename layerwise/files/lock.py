"""The lock of an output: two jobs never write to the same place.

Decision: the lock is a file that names its holder, so that the second job can say who; a dead holder's is taken over.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from layerwise.errors import OutputBusy
from layerwise.files.atomic import TEMPORARY, disk_errors


@contextlib.contextmanager
def output_lock(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Hold ``<path>.lock`` for the block; yields the lock file. Raises `OutputBusy` naming the pid that holds it.

    The lock of a dead process of this host is taken over, and what its writes left beside `path` is removed. The lock
    of another host is believed, since nobody can ask there.
    """
    path = Path(path).absolute()
    lock = path.parent / f"{path.name}.lock"
    with disk_errors(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        _acquire(lock, path)
    try:
        yield lock
    finally:
        with disk_errors(lock):
            _release(lock)


def _acquire(lock: Path, path: Path) -> None:
    with _exclusive(lock) as descriptor:
        owner = _owner(descriptor)
        if owner and _alive(owner):
            raise OutputBusy(
                f"process {owner['pid']} on {owner['host']} has been writing here since {owner['since']}.",
                place=str(path),
                remedy=f"Wait for it or choose another output. If that machine is gone for good, delete {lock.name}.",
            )
        if owner:
            _sweep(path, owner["pid"])
        mine = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(mine | {"ticks": _start_ticks(os.getpid())}).encode(), 0)
        os.fsync(descriptor)


def _release(lock: Path) -> None:
    if lock.exists():  # deleted by hand: another may hold it by now, or nobody
        with _exclusive(lock) as descriptor:
            owner = _owner(descriptor)
            if not owner or (owner["pid"], owner["host"]) == (os.getpid(), socket.gethostname()):
                lock.unlink()


@contextlib.contextmanager
def _exclusive(lock: Path) -> Iterator[int]:
    """An open descriptor of the lock file under a short flock: only one process at a time judges it and writes it.

    The flock is not the lock: forked workers inherit it, and it says nothing about who holds it.
    """
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(descriptor, lock):  # else its last owner removed it while we waited: open the new one
                yield descriptor
                return
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, lock: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(lock, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _owner(descriptor: int) -> dict[str, Any] | None:
    """Who holds the lock; None for an empty or torn file, which only a killed process leaves."""
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return None
    fits = isinstance(owner, dict) and type(owner.get("pid")) is int and {"host", "since", "ticks"} <= owner.keys()
    return owner if fits else None


def _alive(owner: dict[str, Any]) -> bool:
    if owner["host"] != socket.gethostname():
        return True
    # The same pid with another start is another process: pids come round again.
    return _running(owner["pid"]) and owner["ticks"] in (None, _start_ticks(owner["pid"]))


def _running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _start_ticks(pid) != -1


def _start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; -1 when it has ended but is not reaped, None without /proc."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if state in "ZX" else int(fields[18])


def _sweep(path: Path, pid: int) -> None:
    """Remove what the writes of the dead process `pid` left at and in `path`: half files that nobody will finish."""
    if _running(pid):  # the pid came round again, and its files may be alive
        return
    for rest in [*path.parent.glob(f".{path.name[:60]}.{pid}-*.tmp"), *path.glob(f".*.{pid}-*.tmp")]:
        if TEMPORARY.match(rest.name):
            shutil.rmtree(rest) if stat.S_ISDIR(rest.lstat().st_mode) else rest.unlink()
