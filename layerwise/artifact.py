"""`Artifact`: a model exported to a file of another runtime, checked there against torch before it gets its name.

Decision: an exporter writes into a folder beside the final place, runs what it wrote in its own runtime and compares. Only then
the file is moved: an export that computes something else leaves nothing behind that could be taken for a good one.
"""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from layerwise.data import Data
from layerwise.errors import UsageError, nearest
from layerwise.files import disk_errors, sha256_file
from layerwise.files.atomic import beside, full_disk, sync
from layerwise.model import UniversalModel
from layerwise.registry import Registry
from layerwise.result import Proof


@dataclass(frozen=True)
class Parity:
    """How near the artifact's outputs are to torch's: largest absolute difference, and that relative to the largest output.

    `bound` is on the relative one; `samples` how many were compared, in batches of other sizes than the export's.
    """

    absolute: float
    relative: float
    bound: float
    samples: int


@dataclass(frozen=True)
class Artifact:
    """A file that was run and compared. `bytes` counts the files that belong to it, `sha256` (hex) is of the one at `path`."""

    path: Path
    format: str
    bytes: int
    sha256: str
    parity: Parity
    runtime: str
    notes: tuple[str, ...] = ()
    figures: Mapping[str, Any] = field(
        default_factory=dict
    )  # of a quantized one: what was done, quality and latency before, after

    def proof(self) -> Proof:
        """The fourth proof, for a result's list."""
        detail = (
            f"{self.format} in {self.runtime}: largest difference relative to the largest output, {self.parity.samples} samples"
        )
        detail = "; ".join([detail, *self.notes])
        return Proof("export_parity", self.parity.relative <= self.parity.bound, detail, self.parity.relative, self.parity.bound)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"path": str(self.path)}


@dataclass(frozen=True)
class Written:
    """What an exporter says of the file it wrote."""

    parity: Parity
    runtime: str
    notes: tuple[str, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)


class Exporter(ABC):
    """One file format. A frozen dataclass of settings."""

    suffix: ClassVar[str]
    format: ClassVar[str]

    @abstractmethod
    def write(self, model: UniversalModel, path: Path, data: Data, calibration: Data) -> Written:
        """Writes `path` (and what belongs to it beside it), runs it in its runtime on `data` and compares with torch.

        What a format fixes by watching activations it watches on `calibration`.

        Raises `ExportMismatch` naming the first diverging layer, `UserModelError` (LW-U79) for what the format cannot say.
        """


EXPORTERS: Registry[Exporter] = Registry("exporter", "layerwise.export")


def exporter_for(path: Path, settings: Mapping[str, Any] | None = None) -> Exporter:
    """The exporter for the suffix of `path`. Raises `UsageError` with the nearest suffix, or the nearest name of a setting."""
    suffixes = {cls.suffix: cls for cls in EXPORTERS.values()}
    if path.suffix not in suffixes:
        what = f"No exporter writes {path.suffix!r} files." if path.suffix else "The name has no suffix to choose a format by."
        raise UsageError(what, place=str(path), remedy=nearest(path.suffix, suffixes))
    cls = suffixes[path.suffix]
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]  # every exporter is a dataclass
    for key in settings or {}:
        if key not in known:
            raise UsageError(f"The exporter {cls.format} has no setting {key!r}.", remedy=nearest(key, known))
    return cls(**settings or {})


def export(
    model: UniversalModel,
    path: str | Path,
    data: Data | None = None,
    *,
    force: bool = False,
    calibration: Data | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Artifact:
    """Writes `model` in the format that the suffix of `path` names, and compares it with torch on `data` (or on the example).

    `settings` are the exporter's; `calibration` is watched where they ask for it (default: `data`, and a note says so).
    Raises `UsageError` LW-C07 when `path` exists and not `force`, `ExportMismatch` with nothing left at `path`, `DiskFull`.
    """
    path = Path(path)
    exporter = exporter_for(path, settings)
    if os.path.lexists(path) and not force:
        raise UsageError(
            "output exists.", place=str(path.absolute()), remedy="Choose another name, or add --force.", code="LW-C07"
        )
    given = data if data is not None else Data.of([model.example], name="a made-up batch")
    watched = calibration if calibration is not None else given
    model.see(given[0].to(model.device))
    with _moved_when_whole(path) as folder:
        written = exporter.write(model, folder / path.name, given, watched)
        made = folder / path.name
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        digest = sha256_file(made if made.is_file() else made / "manifest.json")  # which holds the sums of all others
    notes = list(written.notes)
    if written.figures and watched is given:
        notes.append("the data that quality was measured on is also what activations were watched on")
    if data is None:
        notes.append("compared on a made-up batch: no data was given")
    return Artifact(path, exporter.format, size, digest, written.parity, written.runtime, tuple(notes), written.figures)


@contextmanager
def _moved_when_whole(path: Path) -> Iterator[Path]:
    """A folder beside `path`; after the block its files are moved to where `path` is, the one of that name last."""
    folder = beside(path)
    with disk_errors(path):
        folder.mkdir(parents=True)
    try:
        with full_disk(path):
            yield folder
        with disk_errors(path):
            for file in sorted(folder.iterdir(), key=lambda f: f.name == path.name):
                sync(file)
                _put(file, path.parent / file.name)
            sync(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # what counts is the error that is on its way


def _put(made: Path, place: Path) -> None:
    """Moves a file or a folder to where an older one may be. An older folder goes first, as it cannot be replaced in one step;
    raises `UsageError` LW-C08 for one that no export wrote.
    """
    if made.is_dir() and place.is_dir() and not place.is_symlink():
        if not (place / "manifest.json").is_file():
            raise UsageError("is a folder that no export wrote, and is not replaced.", place=str(place), code="LW-C08")
        shutil.rmtree(place)
    os.replace(made, place)
