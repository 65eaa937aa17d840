"""Structured pruning without any effort, on every architecture: ``python benchmarks/compression_structure.py``.

One process prunes a quarter of the units of every layer that can be treated, proves the cut and saves; a second one, which never
saw the model, builds it again from class, plan and safetensors (and by `from_pretrained` where the folder is a plain one of
transformers) and compares the outputs. What is finished lies in ``runs/cutting`` and is not done again (``--fresh``: all is,
``--failed``: what did not work is). ``--groups`` and ``--only`` do a part and leave the committed results alone.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from layerwise.benchmark.worker import Worker, serve

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "compression_structure.json"
OUT = ROOT / "runs" / "cutting"
COMMAND = "python benchmarks/compression_structure.py"
GROUPS = ("timm", "transformers", "torchvision", "torchaudio", "graph")
MUST = {"timm": 0.90, "transformers": 0.95}


def main() -> None:
    chosen = arguments()
    if chosen.worker:
        serve(answered)
        return
    records = list(judged(chosen))
    if chosen.groups or chosen.only:
        return  # a part is no result
    from layerwise.benchmark.catalogue import GROUPS as CATALOGUE
    from layerwise.files import write_atomic

    listed = {group: len(CATALOGUE[group].names()) for group in GROUPS}
    result = {"command": COMMAND, **machine(), "listed": listed, "rows": records}
    write_atomic(RESULTS, json.dumps(result, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", nargs="*", help="only these groups; the committed results stay as they are")
    parser.add_argument("--only", default="", help="only names that match this regular expression; likewise")
    parser.add_argument("--fresh", action="store_true", help="do again what was done before")
    parser.add_argument("--failed", action="store_true", help="do again what did not work before")
    parser.add_argument("--collect", action="store_true", help="run nothing: write what is done, else the rows that were there")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def answered(question: str) -> dict[str, Any]:
    """In a worker: ``cut FOLDER GROUP NAME`` or ``rebuilt FOLDER GROUP NAME``."""
    from layerwise.benchmark.cutting import cut, rebuilt

    verb, folder, group, name = question.split(" ", 3)
    return {"cut": cut, "rebuilt": rebuilt}[verb](group, name, Path(folder))


def judged(chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The records of all chosen models, each kept in `OUT` as soon as it is there."""
    from layerwise.benchmark.catalogue import GROUPS as CATALOGUE
    from layerwise.benchmark.cutting import why_not
    from layerwise.benchmark.store import Store

    made_by = {"commit": commit()}
    store, workers = Store(OUT, "1"), [Worker(__file__, "--worker", folder=ROOT) for _ in range(2)]
    earlier = {f"{r['group']}/{r['name']}": r for r in json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]}
    for group in chosen.groups or GROUPS:
        for name in CATALOGUE[group].names():
            if not re.search(chosen.only, name):
                continue
            piece = f"{group}/{name}"
            record = None if chosen.fresh else store.once(piece, lambda: None)
            if record is None and chosen.collect:
                if piece in earlier:
                    yield earlier[piece]
                continue
            if record is None or (chosen.failed and why_not(record)):
                record = one(workers, group, name) | {"kinds": list(CATALOGUE[group].kinds(name))} | made_by
                store.replace(piece, record)
                print(group, name, record.get("seconds", ""), why_not(record)[:300] or "ok", flush=True)
            yield record
    for worker in workers:
        worker.stop()


def one(workers: list[Worker], group: str, name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="layerwise-cutting-") as folder:
        record = workers[0].ask(f"cut {folder} {group} {name}")
        if isinstance(record, str):
            return {"group": group, "name": name, "built": True, "error": record}
        if record["built"] and not record.get("error"):
            again = workers[1].ask(f"rebuilt {folder} {group} {name}")
            record |= {"error": f"built again: {again}"} if isinstance(again, str) else again
        return record


def commit() -> str:
    """The code that makes the rows: short hash and subject."""
    said = subprocess.run(["git", "log", "-1", "--format=%h %s"], cwd=ROOT, capture_output=True, text=True, check=True)
    return said.stdout.strip()


def machine() -> dict[str, Any]:
    from layerwise.config import RunConfig
    from layerwise.environment import environment

    found = environment(RunConfig())
    return {"device": found["cpu"], "threads": 1, "versions": found["packages"], "seeds": [0]}


SAID = """A quarter of the units (attention heads or groups of them, hidden units, inner channels) of every layer, chosen by
magnitude, nothing set by hand and nothing trained. Counted is a model that has fewer parameters, whose outputs are those of the
uncut model with the same units masked (largest difference ≤ 1e-5 of the largest output in float32; where that is missed by less
than a hundredfold, ≤ 1e-7 in float64), and which a process that never saw it builds again to the same outputs. Random weights
(seed 0): what is shown is that the cut is right, not that it is good.
Finished rows are kept, so a row is as old as the code that made it; `--fresh` makes all of them anew."""


HEAD = (
    "| group | works, of those built | asked | of these not by earlier code | `from_pretrained` loads it alone "
    "| parameters left (median) |"
)


def section(result: dict[str, Any]) -> str:
    """The part of docs/compression_results.md: counts per group, and every miss with its reason."""
    made = Counter(r.get("commit", "earlier code") for r in result["rows"])
    groups = [g for g in GROUPS if any(r["group"] == g for r in result["rows"])]
    lines = [counted(group, [r for r in result["rows"] if r["group"] == group and r["built"]]) for group in groups]
    by = "; ".join(f"`{name}` ({count} rows)" for name, count in made.most_common())
    return "\n".join(
        [SAID, "", f"Code: {by}.", "", HEAD, "|---|---|---|---|---|---|", *lines, "", *notes(result), *missed(result)]
    )


def counted(group: str, built: list[dict[str, Any]]) -> str:
    """A line of the table."""
    from layerwise.benchmark.cutting import why_not

    good = [r for r in built if not why_not(r)]
    left = sorted(r["parameters"][1] / r["parameters"][0] for r in good)
    plain = sum(bool(r.get("plain")) for r in good)
    fresh = [sum("commit" in r for r in rows) for rows in (good, built)]
    asked = f"≥ {100 * MUST[group]:.0f} %" if group in MUST else "–"
    share = f"{len(good)} of {len(built)} ({100 * len(good) / max(len(built), 1):.1f} %)"
    median = left[len(left) // 2] if left else 0
    return f"| {group} | {share} | {asked} | {fresh[0]} of {fresh[1]} | {plain or '–'} | {median:.2f} |"


def notes(result: dict[str, Any]) -> list[str]:
    """What was not counted, what float64 had to judge, and what was not run."""
    unbuilt = Counter(r["group"] for r in result["rows"] if not r["built"])
    done = Counter(r["group"] for r in result["rows"])
    finer = [r["name"] for r in result["rows"] if r.get("in_double")]
    open_ = ", ".join(f"{n - done[g]} of {n} of {g}" for g, n in result["listed"].items() if done[g] < n)
    said = ", ".join(f"{n} of {group}" for group, n in unbuilt.items()) or "none"
    return [
        *(f"Not built here, and not counted: {said}.", ""),
        *([f"Over the bound in float32, and judged in float64: {', '.join(finer)}.", ""] if finer else []),
        *([f"Not yet run: {open_}.", ""] if open_ else []),
    ]


def missed(result: dict[str, Any]) -> list[str]:
    from layerwise.benchmark.cutting import why_not

    said = [(r, why_not(r)) for r in result["rows"] if r["built"]]
    lines = [f"| {r['group']} | {r['name']} | {why[:200].replace('|', '/')} |" for r, why in said if why]
    return ["What does not work:", "", "| group | model | why |", "|---|---|---|", *lines]


if __name__ == "__main__":
    main()
