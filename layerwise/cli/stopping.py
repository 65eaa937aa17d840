"""Stopping in good order: Ctrl-C and SIGTERM, and a deadline for work that makes no progress.

Decision: state is saved by the work itself, atomically, after every batch and stage. So stopping is an exception in the main
thread and nothing more; a timer ends the process where that exception cannot get through (a call that never returns to
Python). A second signal ends it at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from layerwise.errors import RunError

GRACE = 8.0  # seconds after the first signal; a service manager's patience ends at 10
PACKAGE = Path(__file__).parents[1]
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal came. `resume` is the command that goes on from what is saved.

    Not a `KeyboardInterrupt`: typer would take that for its own, and the exit code of SIGTERM would be lost.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.resume = ""


class Timeout(RunError):
    """Nothing progressed for the time given by ``--timeout``."""

    code = "LW-R24"


def exit_code(stop: BaseException) -> int:
    """128 plus the number of the signal: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + (stop.number if isinstance(stop, Stopped) else int(signal.SIGINT))


def resume_line(stop: BaseException) -> str:
    """The command that goes on, where there is one."""
    return stop.resume if isinstance(stop, Stopped) else ""


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM raise `Stopped` in the main thread; the handlers of before come back afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers; whoever started this one owns the signals
        return
    state = _State()
    before = {number: signal.signal(number, state.stop) for number in SIGNALS}
    try:
        yield
    finally:
        state.end()
        for number, handler in before.items():
            signal.signal(number, handler)


class _State:
    """Whether a signal has come already, and the timer that it started."""

    def __init__(self) -> None:
        self.timer: threading.Timer | None = None

    def stop(self, number: int, frame: FrameType | None) -> NoReturn:
        if self.timer is not None:  # a second signal
            os._exit(128 + number)
        self.timer = threading.Timer(GRACE, os._exit, (128 + number,))
        self.timer.daemon = True
        self.timer.start()
        raise Stopped(number)

    def end(self) -> None:
        if self.timer is not None:
            self.timer.cancel()


class _Expired(BaseException):
    """Raised inside the work that hangs: not an `Exception`, so that no handler on the way takes it for the model's own."""


class Deadline:
    """The time that may pass without a `beat`, and where the work was when it had passed."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.last = time.monotonic()  # a clock that is set meanwhile does not matter
        self.place = ""
        self.ended = threading.Event()
        self.lock = threading.Lock()

    def beat(self) -> None:
        """There is progress: the time starts again."""
        self.last = time.monotonic()

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.last + self.seconds - time.monotonic()

    def end(self) -> None:
        """The work is done: no signal from here on."""
        with self.lock:
            self.ended.set()

    def error(self) -> Timeout:
        """The error for a deadline that has passed."""
        return Timeout(
            f"No progress for {self.seconds:g} s: a forward that never ends, or one that needs longer.",
            place=self.place,
            remedy="Look at the loop there, use a smaller --batch-size, or a longer --timeout.",
        )

    def expired(self, number: int, frame: FrameType | None) -> NoReturn:
        """The signal handler."""
        self.place = _where(frame)
        raise _Expired


@contextlib.contextmanager
def deadline(seconds: float | None) -> Iterator[Callable[[], None]]:
    """Yields the heart beat to call on progress. Without one for `seconds` the work is interrupted: `Timeout`.

    Work that does not return to Python within another moment is ended with the whole process, exit code 4.
    Without `seconds` nothing is watched.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    watch = Deadline(seconds)
    before = signal.signal(signal.SIGALRM, watch.expired)
    threading.Thread(target=_watch, args=(watch,), daemon=True).start()
    try:
        yield watch.beat
    except _Expired:
        raise watch.error() from None
    finally:
        watch.end()
        signal.signal(signal.SIGALRM, before)


def _watch(watch: Deadline) -> None:
    while not watch.ended.wait(max(0.01, watch.left())):
        with watch.lock:  # else the signal could come after its handler has gone
            if watch.left() <= 0 and not watch.ended.is_set():
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
                break
    if not watch.ended.wait(GRACE):
        print(watch.error(), file=sys.stderr, flush=True)
        os._exit(watch.error().exit_code)


def _where(frame: FrameType | None) -> str:
    """``file:line`` of the innermost code that is neither a library's nor ours; the innermost of all where there is none."""
    innermost = f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else ""
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(("<", str(PACKAGE), sys.prefix, sys.base_prefix)) and os.path.isfile(file):
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return innermost
