"""Audio: clips decoded by soundfile, from a manifest that names their files, or from bytes in a column."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from layerwise.errors import DataError, DataShardError, missing_dependency
from layerwise.rows import Record

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif")
MAX_SAMPLES = 500_000_000  # three hours at 44.1 kHz: 2 GB once decoded


def decoded(row: Record, folder: Path | None) -> Record:
    """The row with ``audio`` as float32 samples (one channel) and ``sample_rate`` in Hz.

    ``audio`` came as bytes, ``{"bytes": …}``, ``{"array": …, "sampling_rate": …}``, samples, or a path relative to `folder`;
    samples keep their own rate, if the row says one, and a row without a clip stays as it is: models of several modalities read
    such rows. Raises `DataError` or `DataShardError`.
    """
    value = row["audio"]
    if value is None:
        return row
    if isinstance(value, dict):
        row = Record({**row, "sample_rate": value.get("sampling_rate", row.get("sample_rate"))}, row.place)
        value = value.get("array") if value.get("array") is not None else value.get("bytes") or value.get("path")
    if isinstance(value, np.ndarray | list | Tensor):
        return Record({**row, "audio": _numbers(value, row.place)}, row.place)
    samples, rate = _decode(value, folder, row.place)
    return Record({**row, "audio": samples, "sample_rate": rate}, row.place)


def _numbers(value: Any, place: str) -> np.ndarray:
    try:
        plain = value.numpy(force=True) if isinstance(value, Tensor) else value
        return np.asarray(plain, dtype=np.float32)
    except (TypeError, ValueError) as error:
        what = f"The samples of the clip are no numbers: {error}."
        raise DataError(what, place=place, remedy="Give bytes, a path or samples.", code="LW-D32") from error


def _decode(value: Any, folder: Path | None, place: str) -> tuple[np.ndarray, int]:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the C library is missing
        raise missing_dependency("soundfile", "audio", "Reading audio") from error
    if not isinstance(value, bytes | str):
        raise DataError(f"The audio came as {type(value).__name__}.", place=place, remedy="Give bytes or a path.", code="LW-D32")
    source: Any = io.BytesIO(value) if isinstance(value, bytes) else (folder or Path()) / value
    if isinstance(source, Path) and not source.is_file():
        raise DataError(
            f"There is no audio file {value!r}.", place=place, remedy=f"Looked for {source.absolute()}.", code="LW-D32"
        )
    try:
        with soundfile.SoundFile(source) as clip:
            if clip.frames > MAX_SAMPLES:
                what = f"The clip claims {clip.frames:,} samples; at most {MAX_SAMPLES:,} are read."
                raise DataError(what, place=place, remedy="Cut it into pieces.", code="LW-D37")
            samples = clip.read(dtype="float32", always_2d=True).mean(1)
            return samples, int(clip.samplerate)
    except soundfile.SoundFileError as error:
        raise DataShardError(
            f"The audio cannot be decoded: {error}", place=place, remedy="Copy it again or leave it out."
        ) from error
