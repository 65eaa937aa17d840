"""From the table of settings to flags: `verb` gives a command the flags it names, and calls it with a `RunConfig`.

Decision: no flag is declared twice. A command says which settings it reads; names, types, help and defaults come from
`layerwise.config`, and `--config` fills in what is not on the command line.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from layerwise.cli.screen import Screen
from layerwise.cli.stopping import deadline, stoppable
from layerwise.config import RunConfig, build_config, describe, flag, types_of
from layerwise.errors import UsageError
from layerwise.runfolder import CONFIG, check_resumable, final_of, partial_of
from layerwise.yamlfile import read_entries

COMMON = ("device", "seed", "out")
METAVARS = {bool: "", int: "N", float: "X", tuple: "NAMES"}
Verb = Callable[..., int | None]


def verb(*keys: str, needs: tuple[str, ...] = ()) -> Callable[[Verb], Callable[..., int]]:
    """Decorator: the command reads the settings `keys`; those in `needs` must be given by flag or file.

    The function is called with the `RunConfig`, the `Screen`, and its own keyword-only flags; it gives the exit code
    (None: 0). A command that reads `model` takes it as its first argument as well.
    """

    def decorate(function: Verb) -> Callable[..., int]:
        own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.kind is p.KEYWORD_ONLY]

        def command(**given: Any) -> int:
            with Screen(as_json=given.pop("json"), debug=given.pop("debug")) as screen, stoppable():
                extra = {p.name: given.pop(p.name) for p in own}
                config = _config(given, needs, extra.get("resume"))
                with deadline(config.timeout) as screen.beat:
                    return function(config, screen, **extra) or 0

        parameters = [*_positional(keys), *own, *(_flag(key) for key in (*keys, *COMMON)), *_switches()]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def _config(given: dict[str, Any], needs: tuple[str, ...], resume: Path | None) -> RunConfig:
    """The settings from the flags over those of ``--config``, or of the run that is resumed."""
    file = given.pop("config")
    if resume is not None:
        final = final_of(resume)
        if file is not None or given["out"] is not None:
            raise UsageError(
                "--resume takes the settings and the place of the run.", place="--resume", remedy="Leave out --config and --out.",
                code="LW-C03",
            )  # fmt: skip
        check_resumable(final)
        file, given["out"] = partial_of(final) / CONFIG, str(final)
    spec = given.pop("model_spec", None)
    if spec is not None:
        if given.get("model") not in (None, spec):
            raise UsageError("The model is given twice.", place="--model", remedy="Keep one of them.", code="LW-C03")
        given["model"] = spec
    flags = {key: _value(key, value) for key, value in given.items()}
    config = build_config(read_entries(file) if file else {}, flags, str(file or ""))
    for key in needs:
        if not getattr(config, key):
            raise UsageError(f"{flag(key)} is missing: {_help(key)}.", remedy="See --help.", code="LW-C03")
    return config


def _positional(keys: tuple[str, ...]) -> list[inspect.Parameter]:
    if "model" not in keys:
        return []
    kind = Annotated[str | None, typer.Argument(metavar="MODEL", help="The same as --model.", show_default=False)]
    return [_parameter("model_spec", kind, None)]


def _flag(key: str) -> inspect.Parameter:
    """The flag of a setting. Its default is None, so that a file's value counts where no flag is given.

    Numbers come as text and are read by `_value`, so that a wrong one is told in the same words as in a file.
    """
    types = types_of(RunConfig.model_fields[key].annotation)
    metavar = next((name for kind, name in METAVARS.items() if kind in types), "TEXT")
    option = typer.Option(flag(key), help=_help(key), show_default=False, metavar=metavar or None)
    kind: Any = bool if bool in types else list[str] if tuple in types else str
    return _parameter(key, Annotated[kind | None, option], None)


def _value(key: str, value: Any) -> Any:
    """What the flag's text stands for; text that is no number stays text, and the table of settings says what it takes."""
    if isinstance(value, list):
        return ",".join(value) if value else None
    types = types_of(RunConfig.model_fields[key].annotation)
    number = next((kind for kind in (int, float) if kind in types), None)
    if number is None or not isinstance(value, str):
        return value
    try:
        return number(value)
    except ValueError:  # also a whole number of more digits than Python reads
        return value


def _switches() -> list[inspect.Parameter]:
    config = typer.Option("--config", help="A YAML file with any of these settings; flags win.", show_default=False)
    json = typer.Option("--json", help="One JSON document on stdout.")
    debug = typer.Option("--debug", help="Show the traceback of an error.")
    return [
        _parameter("config", Annotated[Path | None, config], None),
        _parameter("json", Annotated[bool, json], False),
        _parameter("debug", Annotated[bool, debug], False),
    ]


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _help(key: str) -> str:
    _, text, default = next(row for row in describe() if row[0] == key)
    return text + (f" (default: {default})" if default else "")
