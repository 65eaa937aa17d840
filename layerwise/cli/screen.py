"""What a command says: tables and progress bars for people, one JSON document for programs.

Decision: results go to stdout, progress and errors to stderr. Control codes are written to a terminal only; a pipe gets plain
text of a fixed width. rich is imported when something is drawn.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TextIO

from layerwise.errors import printable

SHORT = 24  # characters; cells of a column that has none longer are not broken
PIPE_WIDTH = 120  # columns, where no terminal says how many
Progress = Callable[[int, int], None]


class Screen:
    """Where one command writes. With `as_json` only `document` writes to stdout."""

    def __init__(self, *, as_json: bool = False, debug: bool = False) -> None:
        self.as_json = as_json
        self.debug = debug
        self.beat: Callable[[], None] = lambda: None

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        sys.stdout.flush()

    def say(self, text: str = "") -> None:
        """One paragraph for people; control characters in it are escaped."""
        if not self.as_json:
            lines = [printable(line) for line in text.split("\n")]
            self._console(sys.stdout).print("\n".join(lines), soft_wrap=not sys.stdout.isatty())

    def note(self, text: str) -> None:
        """One line on stderr, such as a warning."""
        print(printable(text), file=sys.stderr, flush=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", right: str = "") -> None:
        """A table for people. Columns named in `right` (with spaces between) hold numbers and are aligned to the right."""
        if self.as_json:
            return
        from rich import box
        from rich.table import Table

        table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for i, column in enumerate(columns):
            longest = max((len(row[i]) for row in rows), default=0)
            justify: Any = "right" if column in right.split() else "left"
            table.add_column(column, justify=justify, no_wrap=longest <= SHORT, overflow="fold")
        for row in rows:
            table.add_row(*(printable(cell) for cell in row))
        self._console(sys.stdout).print(table)

    def document(self, data: Any) -> None:
        """The result for programs. NaN and infinity, which JSON does not know, become null."""
        if self.as_json:
            print(json.dumps(plain(data), ensure_ascii=False, indent=1))

    @contextlib.contextmanager
    def progress(self, label: str) -> Iterator[Progress]:
        """Yields a function (done, total) that moves a bar on stderr and beats the heart of `--timeout`."""
        if not sys.stderr.isatty():
            yield lambda done, total: self.beat()
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        parts = (SpinnerColumn("line"), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*parts, console=self._console(sys.stderr), transient=True, refresh_per_second=8) as bars:
            bar = bars.add_task(label, total=None)

            def moved(done: int, total: int) -> None:
                self.beat()
                bars.update(bar, completed=done, total=total)

            yield moved

    def _console(self, stream: TextIO) -> Any:
        from rich.console import Console

        terminal = stream.isatty()
        width = None if terminal else int(os.environ.get("COLUMNS") or PIPE_WIDTH)
        return Console(file=stream, width=width, markup=False, highlight=False, emoji=False, no_color=not terminal)


def plain(data: Any) -> Any:
    """`data` as JSON can hold it: numbers that are not finite become None, tuples lists, other objects text."""
    if isinstance(data, float) and not math.isfinite(data):
        return None
    if isinstance(data, Mapping):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple | set | frozenset):
        return [plain(item) for item in data]
    return data if isinstance(data, str | int | float | bool | None) else str(data)
