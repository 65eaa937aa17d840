"""The one tree of exceptions. No torch here: the command line prints these before anything heavy is imported.

::

    LayerwiseError                 code     exit
    ├── UsageError                 LW-C     2    a wrong argument or flag
    ├── ConfigError                LW-F     2    a wrong key or value in a configuration file
    ├── MissingDependency          LW-E     2    an optional package is not installed
    ├── DatabaseError              LW-B     2    a leaderboard URL that cannot be used
    │   └── DatabaseBusy           LW-B15   4    another process held the write lock for too long
    ├── DataError                  LW-D     3    rows that cannot become batches
    │   └── DataShardError         LW-D12   3    one file of a data set is damaged
    ├── ModelError                 LW-M     3    weights or a model that cannot be used
    │   ├── ModelFormatError       LW-M     3    a file that is not what it should be
    │   └── NonFiniteWeights       LW-M04   3    NaN or infinity in a tensor
    ├── UserModelError             LW-U     3    the user's own module failed
    ├── PluginError                LW-P     4    a plugin failed
    ├── ProofFailed                LW-V     1    a check of a compressed model did not hold
    │   └── ExportMismatch         LW-V21   1    an artifact computes something else than the model
    ├── TargetMissed               LW-T     1    no plan meets the budget
    └── RunError                   LW-R     4    the machine, not the input
        ├── OutOfMemory            LW-R01   4
        ├── DiskFull               LW-R02   4
        ├── WorkerLost             LW-R13   4    a worker process died again and again
        ├── OutputBusy             LW-R23   4    another run writes to the same place
        └── CorruptRun             LW-R11   4    a saved run does not match its manifest
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LayerwiseError(Exception):
    """What went wrong (`what`), where (`place`), and the way out (`remedy`), under a stable `code`."""

    code = "LW"
    exit_code = 4

    def __init__(self, what: str, *, place: str = "", remedy: str = "", code: str | None = None) -> None:
        super().__init__(what)
        self.what = printable(what)
        self.place = printable(place)
        self.remedy = printable(remedy)
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        where = f"{self.place}: " if self.place else ""
        way_out = f" {self.remedy}" if self.remedy else ""
        return f"{self.code} {where}{self.what}{way_out}"

    def to_dict(self) -> dict[str, str]:
        """The error as plain data, for ``--json`` and reports."""
        return {"code": self.code, "what": self.what, "place": self.place, "remedy": self.remedy}


class UsageError(LayerwiseError):
    code, exit_code = "LW-C", 2


class ConfigError(LayerwiseError):
    code, exit_code = "LW-F", 2


class MissingDependency(LayerwiseError):
    code, exit_code = "LW-E", 2


class DatabaseError(LayerwiseError):
    code, exit_code = "LW-B", 2


class DatabaseBusy(DatabaseError):
    code, exit_code = "LW-B15", 4


class DataError(LayerwiseError):
    code, exit_code = "LW-D", 3


class DataShardError(DataError):
    code = "LW-D12"


class ModelError(LayerwiseError):
    code, exit_code = "LW-M", 3


class ModelFormatError(ModelError):
    pass


class NonFiniteWeights(ModelError):
    code = "LW-M04"


class UserModelError(LayerwiseError):
    code, exit_code = "LW-U", 3


class PluginError(LayerwiseError):
    code = "LW-P"


class ProofFailed(LayerwiseError):
    code, exit_code = "LW-V", 1


class ExportMismatch(ProofFailed):
    code = "LW-V21"


class TargetMissed(LayerwiseError):
    code, exit_code = "LW-T", 1


class RunError(LayerwiseError):
    code, exit_code = "LW-R", 4


class OutOfMemory(RunError):
    code = "LW-R01"


class DiskFull(RunError):
    code = "LW-R02"


class WorkerLost(RunError):
    code = "LW-R13"


class OutputBusy(RunError):
    code = "LW-R23"


class CorruptRun(RunError):
    code = "LW-R11"


def printable(text: str) -> str:
    """`text` on one line, control characters and broken Unicode escaped: user input is echoed, never interpreted."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def nearest(name: str, known: Iterable[str]) -> str:
    """``"Did you mean 'x'?"`` or, with nothing near, the list of what there is."""
    names = sorted(known)
    best = max(names, key=lambda n: _likeness(name, n), default="")
    if best and _likeness(name, best) >= 0.6:
        return f"Did you mean {best!r}?"
    return "Known: " + ", ".join(names) + "." if names else "None are known."


def _likeness(name: str, known: str) -> float:
    """0 … 1, as a whole or as a beginning: 'fischer' means 'fisher_information', whose length is no fault of the user's."""
    parts = (known, known[: len(name)])
    return max(difflib.SequenceMatcher(None, name.lower(), part.lower()).ratio() for part in parts)


def missing_dependency(package: str, extra: str, purpose: str) -> MissingDependency:
    """The error for an optional package that is not there, with the line that installs it."""
    return MissingDependency(
        f"{purpose} needs the package {package!r}, which is not installed.",
        remedy=f"Install it with: pip install 'layerwise[{extra}]'",
    )
