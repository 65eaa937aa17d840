"""The folder of a run while it grows: what is finished, what is kept on resume, and how it becomes final. No torch.

Decision: the run works in ``DIR.partial`` beside its final name. ``stages.json`` records for each finished stage the settings
it depended on and the SHA-256 of its files; a stage counts as done only while both still hold. At the end the manifest is
written last and the folder is renamed: what bears the final name is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerwise.errors import UsageError
from layerwise.files import disk_errors, sha256_file, write_atomic, write_manifest

RECORD = "stages.json"
CHECKPOINTS = "checkpoints"
CONFIG = "config.yaml"
FORMAT = 1


@dataclass
class RunFolder:
    """One run's place: `final` is where it will be, `partial` where it is until then. `stages`: name → what it left."""

    final: Path
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def partial(self) -> Path:
        return partial_of(self.final)

    def path(self, name: str) -> Path:
        """A file or folder of the run."""
        return self.partial / name

    def checkpoint(self, key: str) -> Path:
        """The folder of the unfinished stage with this key; those of other keys are removed."""
        folder = self.path(CHECKPOINTS) / key[:16]
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for other in folder.parent.iterdir():
                if other != folder:
                    shutil.rmtree(other)
        return folder

    def kept(self, stage: str, key: str) -> tuple[bool, str]:
        """Whether the recorded stage still holds; if it was finished once and does not hold, why."""
        record = self.stages.get(stage)
        if record is None:
            return False, ""
        if record["key"] != key:
            return False, "its settings have changed"
        for name, digest in record["files"].items():
            file = self.path(name)
            if not file.is_file():
                return False, f"{name} is missing"
            if sha256_file(file) != digest:
                return False, f"{name} is damaged"
        return True, ""

    def record(self, stage: str, key: str, outputs: Iterable[str], seconds: float) -> None:
        """Notes a finished stage with the SHA-256 of the files in `outputs` (files and folders, as far as it made them)."""
        files = {file.relative_to(self.partial).as_posix(): sha256_file(file) for file in self._files(outputs)}
        self.stages[stage] = {"key": key, "seconds": round(seconds, 3), "files": files}
        self._save()

    def forget(self, stages: Iterable[str]) -> None:
        """Takes back stages that must be repeated."""
        if [self.stages.pop(name) for name in stages if name in self.stages]:
            self._save()

    def finish(self, *, force: bool) -> Path:
        """Removes the checkpoints, writes the manifest last and gives the folder its final name.

        An older folder of that name goes only then, and only with `force`. Raises `UsageError` LW-C07 without.
        """
        with disk_errors(self.final):
            shutil.rmtree(self.path(CHECKPOINTS), ignore_errors=True)
            _sync_tree(self.partial)
            write_manifest(self.partial)
            if os.path.lexists(self.final):
                refuse_existing(self.final, force)
                _replace(self.partial, self.final)
            else:
                os.rename(self.partial, self.final)
            _sync(self.final.parent)
        return self.final

    def _files(self, outputs: Iterable[str]) -> list[Path]:
        found: list[Path] = []
        for path in map(self.path, outputs):
            found += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.is_file() else []
        return found

    def _save(self) -> None:
        write_atomic(self.path(RECORD), json.dumps({"format": FORMAT, "stages": self.stages}, indent=1) + "\n")


def new_folder(out: Path, *, force: bool) -> RunFolder:
    """A fresh run at `out`. Raises `UsageError` LW-C07 when a run, finished or not, is there and not `force`."""
    final = out.absolute()
    refuse_existing(final, force)
    partial = partial_of(final)
    if os.path.lexists(partial):
        if not force:
            raise UsageError(
                "An unfinished run is here.",
                place=str(partial),
                remedy=f"Go on with: {resume_command(final)} (or start again with --force).",
                code="LW-C07",
            )
        with disk_errors(partial):
            shutil.rmtree(partial)
    with disk_errors(partial):
        partial.mkdir(parents=True)
    return RunFolder(final)


def resumed_folder(out: Path) -> tuple[RunFolder, list[str]]:
    """The unfinished run at `out` (or its ``.partial``), and remarks on what is damaged.

    Raises `UsageError` LW-C13 where there is none or where it is finished.
    """
    final = final_of(out)
    check_resumable(final)
    try:
        saved = json.loads((partial_of(final) / RECORD).read_text(encoding="utf-8"))
        stages = {name: _checked(record) for name, record in saved["stages"].items()}
    except FileNotFoundError:
        return RunFolder(final), []
    except (ValueError, KeyError, TypeError, AttributeError):
        return RunFolder(final), [f"The record of finished stages ({RECORD}) is damaged; every stage is repeated."]
    return RunFolder(final, stages), []


def check_resumable(final: Path) -> None:
    """Raises `UsageError` LW-C13 unless an unfinished run is there."""
    partial = partial_of(final)
    if (partial / CONFIG).is_file():
        return
    if (final / "manifest.json").is_file():
        raise UsageError("This run is finished: there is nothing to resume.", place=str(final), code="LW-C13")
    raise UsageError(
        "There is no unfinished run here.",
        place=str(final),
        remedy=f"Looked for {partial.name}/{CONFIG} beside it. Start it with: layerwise run ... --out DIR",
        code="LW-C13",
    )


def refuse_existing(path: Path, force: bool) -> None:
    """Raises `UsageError` LW-C07 for an output that exists, unless `force`; LW-C05 for what a folder cannot replace."""
    if not os.path.lexists(path):
        return
    if not force:
        raise UsageError("output exists.", place=str(path), remedy="Choose another name, or add --force.", code="LW-C07")
    if path.is_symlink() or not path.is_dir():
        raise UsageError("is not a folder, and is not replaced by one.", place=str(path), code="LW-C05")
    if not (path / "manifest.json").is_file() and any(path.iterdir()):
        raise UsageError(
            "holds files that no run has written, and is not replaced.",
            place=str(path),
            remedy="Choose another name.",
            code="LW-C07",
        )


def final_of(path: Path) -> Path:
    """The final name of a run, given either of its two names."""
    path = Path(path).absolute()
    return path.with_name(path.name.removesuffix(".partial"))


def partial_of(final: Path) -> Path:
    """Where the run lies while it is not finished."""
    return final.with_name(final.name + ".partial")


def resume_command(final: Path) -> str:
    """The exact line that goes on with a run."""
    return f"layerwise run --resume {shlex.quote(str(final))}"


def key_of(settings: Mapping[str, Any], before: str) -> str:
    """SHA-256 (hex) of a stage's settings and of the key of the stage before it."""
    text = json.dumps([settings, before], sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()


def _checked(record: Any) -> dict[str, Any]:
    fits = isinstance(record["key"], str) and all(
        isinstance(d, str) and ".." not in Path(f).parts for f, d in record["files"].items()
    )
    if not fits:
        raise TypeError(record)
    return dict(record)


def _replace(partial: Path, final: Path) -> None:
    """The old folder steps aside, the new one takes its name, then the old one goes."""
    old = final.with_name(f"{final.name}.replaced-{os.getpid()}")
    os.rename(final, old)
    try:
        os.rename(partial, final)
    except BaseException:
        os.rename(old, final)
        raise
    shutil.rmtree(old)


def _sync_tree(folder: Path) -> None:
    for path in [p for p in folder.rglob("*") if not p.is_symlink()] + [folder]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
