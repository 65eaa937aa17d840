"""`RunConfig`: everything a run depends on, as one flat table. Every key is a flag of the same name. No torch.

Decision: the fields below are the only list of settings. The command line makes its flags from them, the docs their table,
and a run folder's ``config.yaml`` is written from them, so that what was run can be run again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from layerwise.errors import ConfigError, LayerwiseError, UsageError, nearest
from layerwise.spec import split_specs
from layerwise.yamlfile import Entry, read_entries

VERSION = 1
LARGEST = (1 << 63) - 1
NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?")
DECIMAL = re.compile(r"[-+]?(0|[1-9][\d_]*)(\.\d*)?([eE][-+]?\d+)?|[-+]?\.\d+([eE][-+]?\d+)?")
FILE_ONLY = {"version", "include"}
PASSWORD = re.compile(r"(?<=://)([^:/@]*):.*@|\?.*")  # in front of the last @, or anywhere in the query


def _names(value: Any) -> Any:
    """A list of names may be written as one text with commas."""
    if isinstance(value, str):
        value = split_specs(value)
    return tuple(value) if isinstance(value, list) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
Count = Annotated[int, Field(gt=0, le=LARGEST)]


class RunConfig(BaseModel):
    """The settings of one run; frozen. `describe` names every key with its meaning and default."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    model: str | None = Field(
        None,
        description="what to load: timm:NAME, hf:ID_OR_DIR, FILE.py:FACTORY (runs code), a saved folder; weights:PATH to analyze",
    )
    weights: str | None = Field(default=None, description="a safetensors file with the model's weights")
    head: str | None = Field(default=None, description="labelled data to fit a linear classifier on (for embeddings)")
    task: str | None = Field(default=None, description="what the model does; by default it follows from the data")
    data: str | None = Field(default=None, description="what to measure on: a file, a folder, hf:DATASET or sklearn:digits")
    split: str | None = Field(default=None, description="which part of the data, such as train or test")
    limit: Count | None = Field(default=None, description="use at most this many samples")
    batch_size: Count = Field(default=32, description="samples per batch")
    eval_data: str | None = Field(default=None, description="measure the compressed model on this data (default: on --data)")
    eval_split: str | None = Field(default=None, description="which part of the evaluation data")
    eval_limit: Count | None = Field(default=None, description="use at most this many evaluation samples")
    train_data: str | None = Field(
        default=None, description="what steps that train learn from, such as fine_tune (default: none)"
    )
    train_split: str | None = Field(default=None, description="which part of the training data")
    train_limit: Count | None = Field(default=None, description="use at most this many training samples")
    text_column: str | None = Field(default=None, description="the column that holds the text")
    text_pair_column: str | None = Field(default=None, description="the column that holds the second text of a pair")
    image_column: str | None = Field(default=None, description="the column that holds the image or its path")
    audio_column: str | None = Field(default=None, description="the column that holds the sound or its path")
    x_columns: Names = Field(default=(), description="the columns that hold numbers, with commas")
    smiles_column: str | None = Field(default=None, description="the column that holds molecules as SMILES")
    label_column: str | None = Field(default=None, description="the column that holds the label")
    label_columns: Names = Field(default=(), description="the columns of several targets, with commas; values may be missing")
    target_column: str | None = Field(default=None, description="the column that holds the text to produce")
    answer_column: str | None = Field(default=None, description="the column that holds the span of the second text to find")
    max_bad_shards: int = Field(default=0, ge=0, le=LARGEST, description="go on without this many damaged files of a data set")
    methods: Names = Field(
        default=("auto",), description="ways to rank layers, with commas: auto, all, NAME or NAME(setting=value)"
    )
    granularity: Names = Field(
        default=("block",), description="what to rank, with commas: block, sublayer (attention, mlp, conv), head, channel"
    )
    targets: Names = Field(default=(), description="the budget, with commas: size<=0.5x, accuracy>=0.98x, latency<=20ms")
    ratio: float | None = Field(default=None, gt=0, lt=1, description="short for the target size<=RATIOx, between 0 and 1")
    compress_methods: Names = Field(
        default=("auto",), description="ways to compress that the planner may use, with commas: auto, NAME or NAME(setting=value)"
    )
    recover: Names = Field(
        default=(), description="steps that learn on --train-data after the cut, with commas: fine_tune(epochs=2), distill"
    )
    export: Names = Field(default=(), description="artifacts to write, with commas: model.onnx, int8.onnx(quantize=auto)")
    device: str | None = Field(default=None, description="cpu, cuda, cuda:0, mps (default: cpu)")
    executor: str = Field(default="local", description="who runs the batches: local, ray, or ray:N with N worker processes")
    seed: int = Field(default=0, ge=0, le=LARGEST, description="the seed of everything random")
    out: str | None = Field(default=None, description="the file or folder to write")
    lang: Literal["en", "zh"] = Field(default="en", description="the language of the report: en or zh")
    database: str | None = Field(default=None, description="the leaderboard as a URL (default: $LAYERWISE_DB, then your own)")
    timeout: float | None = Field(default=None, gt=0, le=1e9, description="give up after this many seconds without progress")
    force: bool = Field(default=False, description="replace what is there already")

    @property
    def all_targets(self) -> list[str]:
        """`targets` and the one that `ratio` stands for."""
        return [*self.targets, *([f"size<={self.ratio:g}x"] if self.ratio is not None else [])]

    @property
    def columns(self) -> dict[str, str | list[str]] | None:
        """Role (text, text_pair, image, audio, x, smiles, label, target, answer) → column or columns; None if none is named."""
        roles = {name.removesuffix("_column"): value for name, value in self if name.endswith("_column") and value}
        several = {"x": list(self.x_columns), "label": list(self.label_columns)}
        return roles | {role: columns for role, columns in several.items() if columns} or None


def load_config(path: str | Path, **flags: Any) -> RunConfig:
    """Reads a YAML file; `flags` that are not None win over its keys.

    Raises `ConfigError` LW-F15 … LW-F28 with ``file:line:column`` and the key, `UsageError` LW-C09 for a flag.
    """
    return build_config(read_entries(path), flags, str(path))


def build_config(entries: Mapping[str, Entry], flags: Mapping[str, Any], file: str = "") -> RunConfig:
    """The settings from a file's `entries`, overridden by the `flags` that are not None."""
    entries = dict(entries)
    _check_version(entries.pop("version", None), file)
    for key, entry in entries.items():
        _check_scalars(key, entry)
    given = {key: value for key, value in flags.items() if value is not None}
    try:
        return RunConfig.model_validate({key: entry.plain() for key, entry in entries.items()} | given)
    except ValidationError as error:
        raise _translated(error, entries, given) from None


def config_to_yaml(config: RunConfig) -> str:
    """The keys that differ from their defaults, as YAML that `load_config` reads back to an equal configuration.

    The password (and the query) of a database URL is left out: it belongs into the environment.
    """
    values = config.model_dump(mode="json", exclude_defaults=True)
    if config.database:
        values["database"] = PASSWORD.sub(lambda found: f"{found[1]}@" if found[1] is not None else "", config.database)
    escaped = {key: _escaped(value) for key, value in values.items()}
    return yaml.safe_dump({"version": VERSION} | escaped, sort_keys=False, allow_unicode=True)


def describe() -> list[tuple[str, str, str]]:
    """Every key with its meaning and its default, in the order of the table."""
    rows = []
    for name, field in RunConfig.model_fields.items():
        default = "" if field.default in (None, (), False) else _joined(field.default)
        rows.append((name, field.description or "", default))
    return rows


def _joined(value: Any) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def _escaped(value: Any) -> Any:
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return re.sub(r"\$(?=[${])", "$$", value) if isinstance(value, str) else value


def _check_version(entry: Entry | None, file: str) -> None:
    if entry is None:
        return
    if type(entry.data) is not int:
        raise ConfigError(f"version takes a whole number, not {entry.data!r}.", place=entry.place, code="LW-F21")
    if entry.data != VERSION:
        raise ConfigError(
            f"The file has version {entry.data}, this layerwise reads version {VERSION}.",
            place=entry.place or file,
            remedy="Update layerwise, or write the file for this version.",
            code="LW-F27",
        )


def _check_scalars(key: str, entry: Entry) -> None:
    """Refuses what YAML 1.1 reads otherwise than people do; the field's type says what was meant."""
    if isinstance(entry.data, list):
        for item in entry.data:
            _check_scalars(key, item)
        return
    field = RunConfig.model_fields.get(key)
    if field is None or entry.data is None:
        return
    wanted = types_of(field.annotation)
    surprise = _surprise(entry, wanted)
    if surprise:
        raise ConfigError(surprise[0], place=entry.place, remedy=surprise[1], code=surprise[2])


def _surprise(entry: Entry, kinds: set[type]) -> tuple[str, str, str] | None:
    """What is odd about the value for a field of these `kinds`: what was read, the way out, the code."""
    data, written = entry.data, entry.written
    numeric = bool(kinds & {int, float})
    if numeric and ((isinstance(data, float) and not math.isfinite(data)) or str(data).strip().lower() in {"nan", "inf", "-inf"}):
        return f"{written or data} is not a finite number.", "Write a number.", "LW-F23"
    if isinstance(data, bool) and bool not in kinds and written:
        said = f"YAML reads {written} as {str(data).lower()}."
        return said, f'Write "{written}" in quotes for the text.' if str in kinds else "Write a number.", "LW-F22"
    if numeric and isinstance(data, str) and written and NUMBER.fullmatch(data):
        return f"YAML reads {written} as text.", f"Write it out: {float(data.replace('_', '')):g}.", "LW-F22"
    if isinstance(data, int | float) and not isinstance(data, bool) and written and not DECIMAL.fullmatch(written):
        if "${" in written:
            return None
        return f"YAML reads {written} as the number {data}.", f'Write {data}, or "{written}" in quotes.', "LW-F22"
    if isinstance(data, int | float) and not isinstance(data, bool) and str in kinds and not numeric:
        return f"YAML reads {written} as a number.", f'Write "{written}" in quotes for the text.', "LW-F22"
    return None


def types_of(annotation: Any) -> set[type]:
    """The plain types inside an annotation: ``Annotated[int, …] | None`` → {int, NoneType}."""
    if isinstance(annotation, type):
        return {annotation}
    kinds: set[type] = set()
    for part in getattr(annotation, "__args__", ()):
        kinds |= types_of(part) if not isinstance(part, str) else {str}  # Literal["en"]
    return kinds


def _translated(error: ValidationError, entries: Mapping[str, Entry], flags: Mapping[str, Any]) -> LayerwiseError:
    """The first problem as an error of ours, placed at the flag or at the file's line."""
    problem = error.errors()[0]
    key = str(problem["loc"][0]) if problem["loc"] else ""
    if key in flags:
        what = f"{_short(problem['input'])} is not possible: {_wanted(key, problem)}."
        return UsageError(what, place=flag(key), code="LW-C09")
    place = entries[key].place if key in entries else ""
    if problem["type"] == "extra_forbidden":
        return ConfigError(
            f"Unknown key {key!r}.", place=place, remedy=nearest(key, [*RunConfig.model_fields, *FILE_ONLY]), code="LW-F20"
        )
    written = entries[key].written if key in entries else ""
    shown = written if "${" in written else _short(problem["input"])  # what a variable holds may be a secret
    return ConfigError(f"{shown} is not possible: {_wanted(key, problem)}.", place=place, code="LW-F21")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _wanted(key: str, problem: Any) -> str:
    """What the key takes, in words."""
    kind, context = problem["type"], problem.get("ctx", {})
    limits = {"greater_than": "gt", "less_than": "lt", "greater_than_equal": "ge", "less_than_equal": "le"}
    words = {
        "greater_than": "more than", "less_than": "less than", "greater_than_equal": "at least", "less_than_equal": "at most",
    }  # fmt: skip
    if kind in limits:
        return f"{key} must be {words[kind]} {context[limits[kind]]:g}"
    if kind == "literal_error":
        return f"{key} must be {context['expected']}"
    kinds = {
        "finite_number": "a finite number", "int_type": "a whole number", "float_type": "a number",
        "bool_type": "true or false", "string_type": "text", "tuple_type": "a list of names",
    }  # fmt: skip
    return f"{key} takes {kinds.get(kind, problem['msg'])}"


def flag(key: str) -> str:
    """The command line's name of a key: ``batch_size`` → ``--batch-size``."""
    return "--" + key.replace("_", "-")
