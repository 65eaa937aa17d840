"""One folder, filled beside its final name and moved there when it is complete."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from layerwise.errors import UsageError
from layerwise.files.atomic import beside, disk_errors, full_disk, sync
from layerwise.files.manifest import regular_files, write_manifest

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def staged_folder(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; after the block it is synced, gets its manifest, and becomes `path`.

    After an error or Ctrl-C nothing is left, and nothing is at `path` that was not there before. Raises `UsageError`
    LW-C07 when `path` exists and not `force`; with `force` the old folder goes only after the new one is complete.
    """
    path = Path(path).absolute()
    _refuse_existing(path, force)
    staged = beside(path)
    with disk_errors(path):
        staged.mkdir(parents=True)
    try:
        with full_disk(path):
            yield staged
        with disk_errors(path):
            for file in regular_files(staged).values():
                sync(file)
            write_manifest(staged)
            for folder in (staged, *(p for p in staged.rglob("*") if p.is_dir())):
                sync(folder)
            _put_in_place(staged, path, force)
            sync(path.parent)
    except BaseException:
        # What counts is the first error; a rest that cannot be removed bears the name of a temporary folder.
        shutil.rmtree(staged, ignore_errors=True)
        raise


def _refuse_existing(path: Path, force: bool) -> None:
    if not os.path.lexists(path):
        return
    place = str(path.absolute())
    if not force:
        raise UsageError("output exists.", place=place, remedy="Choose another name, or add --force.", code="LW-C07")
    if path.is_symlink() or not path.is_dir():
        raise UsageError("is not a folder, and is not replaced by one.", place=place, code="LW-C05")
    # --force removes the old folder: never a home, a project or the disk.
    if any(keep.resolve().is_relative_to(path.resolve()) for keep in (Path.cwd(), Path.home())):
        raise UsageError("holds the folder you are in or your home, and is not replaced.", place=place, code="LW-C08")


def _put_in_place(staged: Path, path: Path, force: bool) -> None:
    if not os.path.lexists(path):
        os.rename(staged, path)
        return
    _refuse_existing(path, force)  # it may have appeared while we worked
    if not _exchange(staged, path):
        old = beside(path)
        os.rename(path, old)
        try:
            os.rename(staged, path)
        except BaseException:
            os.rename(old, path)
            raise
        os.rename(old, staged)
    sync(path.parent)  # the new folder is safe before the old one, now under the temporary name, goes
    shutil.rmtree(staged)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, where Linux and the file system can; False where they cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except AttributeError:
        return False
    return renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0
