"""A process that answers one question after another, and is replaced when it dies, hangs or has served long enough.

Importing the libraries takes longer than most questions, and a model that fills the memory or never ends must not stop a run.
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS, MEMORY = 240, 10 * 2**30  # of this processor's time and bytes, for one question
PATIENCE = 3 * SECONDS  # by the clock: other work on the machine is no fault of a model's
SERVED = 150  # questions per process: what libraries keep for themselves must not add up


def limited() -> None:
    """In the worker, before it becomes Python: no more memory than one question may take."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def serve(answer: Callable[[str], dict[str, Any]]) -> None:
    """In the worker: reads a question a line, writes one JSON line for each."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not come between the answers
    for line in sys.stdin:
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        resource.setrlimit(resource.RLIMIT_CPU, (int(used) + SECONDS, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        answers.write(json.dumps(answer(line.strip())) + "\n")


class Worker:
    """Runs ``python script *arguments``, which must `serve`, in `folder`."""

    def __init__(self, script: str | Path, *arguments: str, folder: Path) -> None:
        self.command = [sys.executable, "-W", "ignore", str(script), *arguments]
        self.folder = folder
        self.process: subprocess.Popen[str] | None = None
        self.served = 0

    def ask(self, question: str) -> dict[str, Any] | str:
        """The answer; where the process was lost, how, in words."""
        if self.process is None or self.served >= SERVED:
            self.stop()
            self.start()
        assert self.process is not None  # started
        assert self.process.stdin is not None  # a pipe
        self.served += 1
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        if answer:
            return json.loads(answer)
        code = self._ended()
        self.stop()
        if code == -signal.SIGXCPU:
            return f"no answer within {SECONDS} s of the processor's time"
        return f"no answer within {PATIENCE} s" if code is None else f"the process died ({code})"

    def _ended(self) -> int | None:
        """The exit code, of a process that may be dying; None for one that runs on."""
        assert self.process is not None  # started
        try:
            return self.process.wait(1)
        except subprocess.TimeoutExpired:
            return None

    def _answer(self) -> str:
        assert self.process is not None  # started
        assert self.process.stdout is not None  # a pipe
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            ready = selector.select(PATIENCE)
        return self.process.stdout.readline() if ready else ""

    def start(self) -> None:
        settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(self.folder)}
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=settings, preexec_fn=limited,
            cwd=self.folder,
        )  # fmt: skip
        self.served = 0

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process = None


__all__ = ["MEMORY", "SECONDS", "Worker", "serve"]
