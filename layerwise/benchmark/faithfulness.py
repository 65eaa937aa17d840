"""Runs the faithfulness benchmark over its subjects and keeps the results: see `layerwise.benchmark.protocol`."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from layerwise.analyzer import ANALYZERS
from layerwise.benchmark import figures, ranks, study
from layerwise.benchmark.choice import auto_rule
from layerwise.benchmark.contenders import contenders, source_of
from layerwise.benchmark.page import page
from layerwise.benchmark.protocol import Protocol
from layerwise.benchmark.store import Store
from layerwise.benchmark.subjects import SUBJECTS, Subject
from layerwise.config import RunConfig
from layerwise.environment import environment
from layerwise.errors import CorruptRun, UsageError, nearest
from layerwise.files import write_atomic

RESULTS, PAGE = "faithfulness.json", "faithfulness.md"
Progress = Callable[[str, int, int], None]
LISTS = ("subjects", "targets", "correlations", "methods", "rows")


def run(
    out: Path,
    *,
    subjects: Sequence[str] = (),
    methods: Sequence[str] = (),
    protocol: Protocol | None = None,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """All results, also written to ``out/faithfulness.json`` and ``out/faithfulness.md``.

    What is finished lies below ``out/faithfulness.parts`` and is not done again. Raises `UsageError` for an unknown name.
    """
    protocol = protocol or Protocol()
    chosen = [_subject(name) for name in (subjects or SUBJECTS)]
    judged = contenders(protocol.seed, tuple(methods))
    started = time.perf_counter()
    results: dict[str, Any] = {
        "protocol": protocol.to_dict(),
        "seconds_of_this_call": {},
        "environment": _environment(protocol.seed),
    }
    results |= {"defaults": sorted(set(judged) & {n for n in ANALYZERS if not ANALYZERS[n].baseline})}
    results |= {key: [] for key in LISTS}
    for done, subject in enumerate(chosen):
        progress("subjects", done, len(chosen))
        found = _examined(subject, out / "faithfulness.parts", judged, protocol, progress)
        for key in LISTS:
            results[key] += found[key]
        results["seconds_of_this_call"][subject.name] = round(time.perf_counter() - started, 1)
        started = time.perf_counter()
    progress("subjects", len(chosen), len(chosen))
    results = rounded(results)
    results["auto"] = list(auto_rule(results))
    save(results, out / RESULTS)
    write_atomic(out / PAGE, page(results))
    return results


def _examined(
    subject: Subject, folder: Path, judged: Mapping[str, Any], protocol: Protocol, progress: Progress
) -> dict[str, Any]:
    """The subject's records: from the store where every method's code is as it was."""
    store = Store(folder / subject.name, json.dumps(protocol.to_dict(), sort_keys=True))
    code = "".join(Path(str(module.__file__)).read_text(encoding="utf-8") for module in (figures, ranks, study))
    key = hashlib.sha256("".join([code, *(f"{k}{source_of(a)}" for k, a in judged.items())]).encode()).hexdigest()[:16]

    def tell(what: str, done: int, total: int) -> None:
        progress(f"{subject.name}: {what}", done, total)

    def examine() -> dict[str, Any]:
        raw = study.Study(subject, protocol, store, tell).examine(judged)
        return figures.subject_records(raw, protocol)

    found: dict[str, Any] = store.once("records", examine, key)
    return found


def _environment(seed: int) -> dict[str, Any]:
    return environment(RunConfig(model="", seed=seed))


def _subject(name: str) -> Subject:
    if name not in SUBJECTS:
        raise UsageError(f"Unknown subject {name!r}.", remedy=nearest(name, SUBJECTS))
    return SUBJECTS[name]


def rounded(value: Any, digits: int = 6) -> Any:
    """Plain JSON with `digits` significant digits; what is not finite is null."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: rounded(v, digits) for k, v in value.items()}
    return [rounded(v, digits) for v in value] if isinstance(value, list | tuple) else value


def save(results: Mapping[str, Any], path: Path) -> None:
    """One record per line, so that two runs can be compared line by line."""
    parts = []
    for key, value in results.items():
        if key in LISTS:
            lines = ",\n".join("  " + json.dumps(entry, ensure_ascii=False) for entry in value)
            parts.append(f' "{key}": [\n{lines}\n ]')
        else:
            parts.append(f' "{key}": {json.dumps(value, ensure_ascii=False)}')
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "{\n" + ",\n".join(parts) + "\n}\n")


def load_results(path: Path) -> dict[str, Any]:
    """What `save` wrote. Raises `CorruptRun` for anything else."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptRun(f"These are no results of the benchmark: {error!r}.", place=str(path)) from error
    missing = [key for key in LISTS if key not in found]
    if missing:
        raise CorruptRun(f"These are no results of the benchmark: {missing[0]!r} is absent.", place=str(path))
    return found


__all__ = ["load_results", "run", "save"]
