"""How many architectures layerwise works with: ``python benchmarks/coverage.py`` makes ``docs/coverage.md``.

Each model is judged by `layerwise.benchmark.coverage` in a worker process with a time and a memory limit, so that no model can
stop the run; a worker serves a few dozen models, since importing the libraries takes longer than judging. What is finished lies
in ``runs/coverage`` and is not done again (``--fresh``: all is, ``--failed``: what did not work is). ``--groups`` and ``--only``
judge a part and leave the committed results alone, ``--page`` only writes the page anew.
"""

from __future__ import annotations

import argparse
import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from layerwise.benchmark.worker import MEMORY, SECONDS, Worker, serve

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "coverage.json", ROOT / "docs" / "coverage.md"
OUT = ROOT / "runs" / "coverage"


def main() -> None:
    chosen = arguments()
    if chosen.worker:
        from layerwise.benchmark.catalogue import examined

        serve(lambda line: examined(*line.split(" ", 1)))
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

    store, worker, records, listed = Store(OUT, "2"), Worker(__file__, "--worker", folder=ROOT), [], {}
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
                answer = worker.ask(f"{group} {name}")
                lost = {"group": group, "name": name, "built": True, "error": answer}
                record = (lost if isinstance(answer, str) else answer) | {"kinds": list(GROUPS[group].kinds(name))}
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
