"""Rows of the leaderboard from the committed results of ``compression_*.py``, and why a row has none.

Decision: the parts keep the rows that suit them, and one function a part says here what such a row is in the leaderboard's
terms: bytes after over bytes before, the task's metrics before and after, seed, device. What was proved goes into `source`
with the command: the leaderboard calls proven only what it was told as a `CompressionResult` with its proofs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from layerwise.benchmark.cutting import why_not
from layerwise.tracking import PerformanceTracker

Result = Mapping[str, Any]
GROUPS = {"timm": "vision", "torchvision": "vision", "torchaudio": "audio", "graph": "graph"}
WORDS = {  # in the name of a subject or the kind of its task → domain, the first that is found
    "zero-shot": "multimodal", "image": "vision", "object": "vision", "segmentation": "vision", "mask generation": "vision",
    "vit": "vision", "resnet": "vision", "fsdd": "audio", "audio": "audio", "speech": "audio", "minilm": "text",
    "stories": "text", "language": "text", "text": "text", "sequence": "text",
}  # fmt: skip


@dataclass(frozen=True)
class Record:
    """One row, as `PerformanceTracker.track_compression_performance` takes it. `data` tells apart what must not be compared."""

    model: str
    task: str
    ratio: float
    metrics: Mapping[str, float]
    method: str
    data: str
    before: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    source: Mapping[str, Any] = field(default_factory=dict)
    domain: str = ""


@dataclass(frozen=True)
class Left:
    """A row that has no place there, and why."""

    row: str
    reason: str


def rows(part: str, result: Result) -> Iterator[Record | Left]:
    """One for every row of the part's result."""
    yield from PARTS[part](result)


def record(found: Mapping[str, Result], database: str | None) -> tuple[dict[str, int], list[Left]]:
    """Writes the rows of all parts; part → how many, and those that were left out. The same again changes nothing."""
    counts, left = dict.fromkeys(found, 0), list[Left]()
    with PerformanceTracker(database) as tracker:
        for part, result in found.items():
            every = list(rows(part, result))
            left += [row for row in every if isinstance(row, Left)]
            counts[part] = len(tracker.track_reported(_told(row, part, result) for row in every if isinstance(row, Record)))
    return counts, left


def _told(row: Record, part: str, result: Result) -> dict[str, Any]:
    made = {key: result[key] for key in ("command", "threads", "versions") if key in result}
    return {
        "model_name": row.model, "task": row.task, "compression_ratio": row.ratio, "metrics": row.metrics,
        "methods": [row.method], "before": row.before, "seed": row.seed, "data": row.data, "domain": domain_of(row),
        "device": result["device"], "source": {"kind": "benchmark", "part": part, **made, **row.source},
    }  # fmt: skip


def domain_of(row: Record) -> str:
    """What it says, else by the words in its task, then those in its name; ``other`` where none is known."""
    if row.domain:
        return row.domain
    text = f"{row.task} {row.model}".lower()
    return next((domain for word, domain in WORDS.items() if word in text), "other")


def structure(result: Result) -> Iterator[Record | Left]:
    """Random weights: no quality, so no rank; the ratio is that of parameters, all of them float32."""
    for row in result["rows"]:
        name = f"{row['group']} {row['name']}"
        if reason := why_not(row):
            yield Left(name, reason)
            continue
        before, after = row["parameters"]
        proofs = {"masked equivalence": row["equivalence"], "reload": row["reload"]}
        method, data = f"structured_pruning, {row['ratio']:g} of the units", "random weights, no quality (structure)"
        yield Record(
            row["name"], row["kinds"][0], after / before, {}, method, data,
            source={"proofs, relative difference": proofs, "parameters": [before, after], "macs": row["macs"]},
            domain=GROUPS.get(row["group"], ""),
        )  # fmt: skip


def pruning(result: Result) -> Iterator[Record | Left]:
    """The ratio is that of parameters; training changes none, and zeros are stored like other weights."""
    whole = {row["part"]: row["test"] / 100 for row in result["rows"] if row["method"] in ("uncut", "unpruned")}
    cut = {row["method"]: row for row in result["rows"] if row["part"] == "channels" and "params" in row}
    for row in result["rows"]:
        part, first = row["part"], cut.get(row["method"], row)
        ratio = first["params"] if part == "channels" else 1.0
        how = [f"{row['amount']:.0%} zeros" if row.get("amount") else "", "3 epochs" if row["trained"] else ""]
        how += ["distilled" if row.get("distilled") else ""]
        proofs = {"proofs passed": first["proofs"]} if "proofs" in first and not row["trained"] else {}
        more = {key: first[key] for key in ("macs", "zeros") if key in first}
        yield Record(
            row["subject"], "classification", ratio, {"accuracy": row["test"] / 100}, _named(row["method"], *how),
            f"{row['subject']} (pruning of {part})", {"accuracy": whole[part]}, int(row.get("seed") or 0), more | proofs,
        )  # fmt: skip


def planner(result: Result) -> Iterator[Record | Left]:
    tested = {cell["subject"]: cell["tests"] for cell in result["cells"]}
    for row in result["rows"]:
        metric, subject = row["metric"], row["subject"]
        data = f"{subject}, {tested[subject]} test samples (planner)"
        yield Record(
            subject, row["task"], row["ratio"], {**row["metrics"], metric: row["quality"]}, _named(row["method"], row["setting"]),
            data, {metric: row["whole"]}, row["seed"], {"steps": row["steps"], "damage": row["damage"]},
        )  # fmt: skip


def lowbit(result: Result) -> Iterator[Record | Left]:
    yield from _packed(result, "lowbit")


def torchao(result: Result) -> Iterator[Record | Left]:
    yield from _packed(result, "torchao")


def _packed(result: Result, part: str) -> Iterator[Record | Left]:
    whole = {row["subject"]: row for row in result["rows"] if row["method"] == "none"}
    for row in result["rows"]:
        base = whole[row["subject"]]
        proofs = {"proven": row["proven"]} if "proven" in row else {}
        yield Record(
            row["subject"], "language_modelling" if "perplexity" in row["metrics"] else "classification",
            row["bytes"] / base["bytes"], row["metrics"], _named(row["method"], f"{row['bits']} bits" if "bits" in row else ""),
            f"{row['subject']} ({part})", base["metrics"], int(row.get("seed") or 0), {"divergence": row["divergence"], **proofs},
        )  # fmt: skip


def onnx_int8(result: Result) -> Iterator[Record | Left]:
    """Bytes are those of the files."""
    for row in result["rows"]:
        name = _named(row["subject"], row["method"], f"seed {row['seed']}")
        if "refused" in row:
            yield Left(name, f"the export refused it: {row['refused']}")
            continue
        known = "accuracy_int8" in row
        after, before = ({"accuracy": row[f"accuracy_{k}"]} if known else {} for k in ("int8", "float32"))
        samples = f"{row['samples']} test samples" if known else "random weights, no quality"
        more = {"proof": row["proof"], "speed": row.get("speed", [])}
        yield Record(
            row["subject"], "classification", row["bytes"], after, _named(row["method"], row["setting"]),
            f"{row['subject']}, {samples} (onnx_int8)", before, row["seed"], more,
        )  # fmt: skip


def distill(result: Result) -> Iterator[Record | Left]:
    for row in result["rows"]:
        first = next(r for r in result["rows"] if (r["method"], r["setting"]) == ("teacher", row["setting"]))
        own = [
            r for r in result["rows"] if r["method"] == "teacher" and r["setting"] == row["setting"] and r["seed"] == row["seed"]
        ]
        teacher = (own or [first])[0]
        about = result.get(row["setting"], result)
        yield Record(
            row["subject"], row["task"], row["bytes"] / teacher["bytes"], row["metrics"], _named(row["method"], row["setting"]),
            _named("Banking77", f"{row['samples']} test samples (distill", f"{row['setting'] or 'finished teacher'})"),
            teacher["metrics"], row["seed"], {"command": about["command"], "recipe": about["recipe"]},
        )  # fmt: skip


def factor(result: Result) -> Iterator[Record | Left]:
    whole = {row["subject"]: row for row in result["rows"] if row["method"] == "uncompressed"}
    for row in result["rows"]:
        proofs = {"proven": row["proven"]} if "proven" in row else {}
        yield Record(
            row["subject"], row["task"], row["ratio"], row["metrics"], _named(row["method"], f"share {row['setting']:g}"),
            f"{row['subject']} (factor)", whole[row["subject"]]["metrics"], row["seed"], {"stderr": row["stderr"], **proofs},
        )  # fmt: skip


def _named(*words: str) -> str:
    return ", ".join(word for word in words if word)


PARTS: Mapping[str, Callable[[Result], Iterator[Record | Left]]] = {
    f.__name__: f for f in (structure, pruning, planner, lowbit, torchao, onnx_int8, distill, factor)
}
