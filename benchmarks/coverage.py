"""How many architectures layerwise works with: ``python benchmarks/coverage.py`` makes ``docs/coverage.md``.

Each model is judged by `layerwise.benchmark.coverage` in a worker process with a time and a memory limit, so that no model can
stop the run; a worker serves a few dozen models, since importing the libraries takes longer than judging. What is finished lies
in ``runs/coverage`` and is not done again (``--fresh``: all is, ``--failed``: what did not work is). ``--groups`` and ``--only``
judge a part and leave the committed results alone, ``--page`` only writes the page anew.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import selectors
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "coverage.json", ROOT / "docs" / "coverage.md"
OUT = ROOT / "runs" / "coverage"
SECONDS, MEMORY = 240, 10 * 2**30  # for one model
SERVED = 150  # models per worker: what libraries keep for themselves must not add up


def limited() -> None:
    """In the worker, before it becomes Python: no more memory than one model may take."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def serve() -> None:
    """A worker: reads ``group name`` lines, writes one JSON line for each."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not come between the answers
    from layerwise.benchmark.catalogue import examined

    for line in sys.stdin:
        group, _, name = line.strip().partition(" ")
        answers.write(json.dumps(examined(group, name)) + "\n")


class Worker:
    """A process that judges one model after another, and is replaced when it dies, hangs or has served long enough."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.served = 0

    def judge(self, group: str, name: str) -> dict[str, Any]:
        """The model's record; where the worker was lost, how."""
        if self.process is None or self.served >= SERVED:
            self.stop()
            self.start()
        assert self.process is not None  # started
        assert self.process.stdin is not None  # a pipe
        self.served += 1
        self.process.stdin.write(f"{group} {name}\n")
        self.process.stdin.flush()
        answer = self._answer()
        if answer:
            return json.loads(answer)
        code = self.process.poll()
        self.stop()
        lost = f"no answer within {SECONDS} s" if code is None else f"the process died ({code})"
        return {"group": group, "name": name, "built": True, "error": lost}

    def _answer(self) -> str:
        assert self.process is not None  # started
        assert self.process.stdout is not None  # a pipe
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            ready = selector.select(SECONDS)
        return self.process.stdout.readline() if ready else ""

    def start(self) -> None:
        command = [sys.executable, "-W", "ignore", __file__, "--worker"]
        settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=settings, preexec_fn=limited, cwd=ROOT
        )
        self.served = 0

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process = None


def main() -> None:
    chosen = arguments()
    if chosen.worker:
        serve()
        return
    from layerwise.benchmark.coverage_page import page
    from layerwise.files import write_atomic

    if not chosen.page:
        records, listed = judged(chosen)
        if chosen.groups or chosen.only:
            return  # a part is no result
        write_atomic(RESULTS, json.dumps({**machine(), "listed": listed, "records": records}, indent=1) + "\n")
    write_atomic(PAGE, page(json.loads(RESULTS.read_text(encoding="utf-8"))))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", nargs="*", help="only these groups; the committed results stay as they are")
    parser.add_argument("--only", default="", help="only names that match this regular expression; likewise")
    parser.add_argument("--fresh", action="store_true", help="judge again what was judged before")
    parser.add_argument("--failed", action="store_true", help="judge again what did not work before")
    parser.add_argument("--collect", action="store_true", help="judge nothing more: write what has been judged so far")
    parser.add_argument("--page", action="store_true", help="only write the page from the committed results")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def judged(chosen: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The records of all chosen models, each as soon as it is there kept in `OUT`, and how many models each group lists."""
    from layerwise.benchmark.catalogue import GROUPS
    from layerwise.benchmark.coverage_page import passed
    from layerwise.benchmark.store import Store

    store, worker, records, listed = Store(OUT, "2"), Worker(), [], {}
    for group in chosen.groups or GROUPS:
        names = store.once(f"{group}/names", GROUPS[group].names, version(group))
        listed[group] = len(names)
        for name in names:
            if not re.search(chosen.only, name):
                continue
            piece = f"{group}/models/{name}"
            record = None if chosen.fresh else store.once(piece, lambda: None)
            if chosen.collect and record is None:
                continue
            if record is None or (chosen.failed and not passed(record)):
                record = worker.judge(group, name) | {"kinds": list(GROUPS[group].kinds(name))}
                store.replace(piece, record)
                print(group, name, record.get("seconds", ""), *said(record), flush=True)
            records.append(record)
    worker.stop()
    return records, listed


def version(group: str) -> str:
    """Of the library that the group's names come from: another one may have others."""
    package = {"graph": "torch_geometric"}.get(group, group)
    return metadata.version(package)


def said(record: dict[str, Any]) -> list[str]:
    if record.get("error"):
        return ["ERROR" if record["built"] else "NOT BUILT", record["error"][:300]]
    return [f"{name}: {why[:300]}" for name, why in record["failures"].items()] or ["ok", str(record["layers"])]


def machine() -> dict[str, Any]:
    from layerwise.config import RunConfig
    from layerwise.environment import environment

    found = environment(RunConfig())
    kept = {key: found[key] for key in ("python", "cpu", "packages")}
    return {"environment": kept, "limits": f"{SECONDS} s and {MEMORY // 2**30} GB"}


if __name__ == "__main__":
    main()
