"""gzip and zip, with their claims checked before anything is unpacked, and in memory only: nothing is written to the disk."""

from __future__ import annotations

import gzip
import io
import stat
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import IO

from layerwise.errors import DataError
from layerwise.readers.table import damaged

MAX_RATIO = 200  # unpacked to packed: text and images stay below 50, a bomb of zeros reaches 1000
HARMLESS = 16 * 2**20  # bytes that may be unpacked whatever the ratio
CHUNK = 2**20


def gunzipped(packed: IO[bytes], place: str) -> IO[bytes]:
    """The content. Raises `DataShardError` LW-D35 for a file cut short or damaged, `DataError` LW-D37 for a bomb."""
    size = packed.seek(0, io.SEEK_END)
    packed.seek(0)
    content = io.BytesIO()
    try:
        with gzip.GzipFile(fileobj=packed) as handle:
            while chunk := handle.read(CHUNK):
                content.write(chunk)
                if content.tell() > max(HARMLESS, MAX_RATIO * size):
                    raise _bomb(place, content.tell(), size)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise damaged(place, f"is no whole gzip file: {error}.") from error
    content.seek(0)
    return content


def unzipped(path: Path) -> dict[str, Callable[[], IO[bytes]]]:
    """Name → opener of each file of the archive.

    Raises `DataError` LW-D36 for a name that leads outside, LW-D37 for a bomb, `DataShardError` LW-D35 for damage.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise damaged(str(path), f"is no whole zip archive: {error}.") from error
    files = [info for info in archive.infolist() if not info.is_dir()]
    for info in files:
        _check_name(info, path)
    unpacked, packed = sum(i.file_size for i in files), sum(i.compress_size for i in files)
    if unpacked > max(HARMLESS, MAX_RATIO * packed):
        raise _bomb(str(path), unpacked, packed)
    return {info.filename: _opener(archive, info, path) for info in files}


def _check_name(info: zipfile.ZipInfo, path: Path) -> None:
    name = PurePosixPath(info.filename)
    outside = name.is_absolute() or ".." in name.parts or set(info.filename) & {"\\", "\0", ":"}
    if outside or stat.S_ISLNK(info.external_attr >> 16):
        what = f"The archive's entry {info.filename!r} leads outside of it; nothing was unpacked."
        remedy = "Do not use it: such an archive is an attack or broken."
        raise DataError(what, place=str(path), remedy=remedy, code="LW-D36")


def _opener(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> Callable[[], IO[bytes]]:
    def opened() -> IO[bytes]:
        place = f"{path}, entry {info.filename}"
        try:
            with archive.open(info) as handle:
                return io.BytesIO(handle.read(info.file_size + 1))  # the directory's claim, which was checked, is the limit
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
            raise damaged(place, f"cannot be unpacked: {error}.") from error

    return opened


def _bomb(place: str, unpacked: int, packed: int) -> DataError:
    what = f"{packed:,} bytes unpack to {unpacked:,} or more, {unpacked // max(packed, 1):,} to 1; this was stopped."
    return DataError(what, place=place, remedy=f"Unpack it yourself if you trust it (limit: {MAX_RATIO} to 1).", code="LW-D37")
