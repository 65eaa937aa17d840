"""The command line: ``layerwise inspect | analyze | plan | compress | export | run | leaderboard | …``, see `COMMANDS`.

Decision: this module imports typer and nothing of ours but the errors. Each command is a module of its own, imported when it
is called, so that ``layerwise --help`` answers at once. Every error leaves through `main` as one line with a stable exit code.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from layerwise.errors import LayerwiseError, RunError, UsageError, nearest, printable

COMMANDS = {
    "inspect": "Show a model's layers: what they are, what they cost, which can be skipped.",
    "analyze": "Rank a model's layers by how much they matter.",
    "plan": "Choose what to cut so that a budget is met.",
    "compress": "Carry out a plan, prove the cut, and save the smaller model.",
    "export": "Write a model as an artifact for another runtime, and check that it computes the same.",
    "run": "The whole walk in one folder: analyze, plan, compress, export, report, track.",
    "leaderboard": "Show the results recorded so far, best first.",
    "methods": "List every analyzer, compression method, exporter and adapter.",
    "domains": "List the fields of application: what suits each, and which of their data sets are here.",
    "demo": "Train a small vision transformer on handwritten digits and do the whole walk with it.",
    "benchmark": "Measure how faithful the methods are: their rankings against the damage of hurting each layer.",
}
# typer brings its own copy of click since 0.26; this base class is the same place in both
ClickError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


class Commands(TyperGroup):
    """The commands by name; a command's module is imported when it is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            if cmd_name.startswith("-"):
                return None
            raise UsageError(f"Unknown command {cmd_name!r}.", remedy=nearest(cmd_name, COMMANDS), code="LW-C02")
        module = importlib.import_module(f"layerwise.cli.{cmd_name}")
        single = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        single.command(cmd_name, help=module.__doc__, context_settings={"help_option_names": ["--help", "-h"]})(module.command)
        return typer.main.get_command(single)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    rich_markup_mode=None,  # rich alone takes 0.2 s to import
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"layerwise {version('layerwise')}")
        raise typer.Exit


@app.callback()
def _group(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version and exit."),
) -> None:
    """Which layers of a PyTorch model matter, what can go, and what it really costs.

    Exit codes: 0 ok, 1 target missed or proof failed, 2 usage or configuration, 3 data or model, 4 runtime, 130 interrupted.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and gives its exit code. Errors are one line on stderr; with ``--json``, JSON on stdout."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _check_text(arguments)
        if not arguments:
            app(["--help"], prog_name="layerwise", standalone_mode=False)
            return 2
        return int(app(arguments, prog_name="layerwise", standalone_mode=False) or 0)  # Ctrl-C before a command runs: 130
    except LayerwiseError as error:
        return _report(error, arguments)
    except ClickError as error:
        return _report(_usage(error), arguments)
    except Exception as error:
        return _report(_unexpected(error), arguments)
    except SystemExit as stop:
        return _exited(stop, arguments)
    except BaseException as stop:
        return _interrupted(stop, arguments)


def _check_text(arguments: Sequence[str]) -> None:
    for position, argument in enumerate(arguments, start=1):
        if any("\ud800" <= c <= "\udfff" for c in argument):
            raise UsageError(
                f"'{printable(argument)}' is not UTF-8.",
                place=f"argument {position}",
                remedy="Rename the file, or set a UTF-8 locale.",
                code="LW-C14",
            )


def _report(error: LayerwiseError, arguments: Sequence[str]) -> int:
    if "--debug" in arguments:
        traceback.print_exception(error)
    if "--json" in arguments:
        print(json.dumps({"error": error.to_dict(), "exit": error.exit_code}, ensure_ascii=False))
    else:
        print(error, file=sys.stderr)
    return error.exit_code


def _exited(stop: SystemExit, arguments: Sequence[str]) -> int:
    """rich and typer exit when the reader of our output has gone, as with ``| head``: no error. All else has no right to."""
    if isinstance(stop.__context__, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else the interpreter complains when it flushes at the end
        return 0
    return _report(_unexpected(stop), arguments)


def _interrupted(stop: BaseException, arguments: Sequence[str]) -> int:
    from layerwise.cli.stopping import Stopped, exit_code, resume_line

    if not isinstance(stop, Stopped | KeyboardInterrupt):
        raise stop
    if "--debug" in arguments:
        traceback.print_exception(stop)
    code, resume = exit_code(stop), resume_line(stop)
    if "--json" in arguments:
        print(json.dumps({"error": {"code": "LW-R07", "what": "Interrupted.", "resume": resume}, "exit": code}))
    else:
        print("LW-R07 Interrupted." + (f" Go on with: {resume}" if resume else ""), file=sys.stderr)
    return code


def _unexpected(error: BaseException) -> RunError:
    said = str(error).splitlines()[0][:300] if str(error) else ""
    wrapped = RunError(
        f"Unexpected {type(error).__name__}: {said}",
        remedy="This is a fault in layerwise or in a library below it; --debug shows where.",
        code="LW-R00",
    )
    wrapped.__cause__ = error
    return wrapped


def _usage(error: Any) -> UsageError:
    """typer's complaint in our words: an unknown flag, a value of the wrong type, something too much or too little."""
    command = error.ctx.command if getattr(error, "ctx", None) else None
    option = getattr(error, "option_name", None)
    if option and "o such option" in error.message:
        known = [name for p in getattr(command, "params", ()) for name in p.opts if name.startswith("--")]
        return UsageError(f"Unknown flag {option!r}.", remedy=nearest(option, known), code="LW-C03")
    parameter = getattr(error, "param", None)
    if parameter is not None:
        return UsageError(error.message, place=parameter.opts[0], remedy="See --help.", code="LW-C09")
    return UsageError(error.format_message(), remedy="See --help.", code="LW-C03")
