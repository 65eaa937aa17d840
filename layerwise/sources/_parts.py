"""What the sources share: options in a spec, reproducible fresh weights, reading weights into a module, calling a factory."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qsl

import torch
from torch import nn

from layerwise.errors import LayerwiseError, UserModelError, nearest
from layerwise.weights import load_into, read_weights

FRESH = "no weights were given: they are random, drawn with seed 0"


def with_options(name: str) -> tuple[str, dict[str, Any]]:
    """``name?depth=8&bias=false`` → ``("name", {"depth": 8, "bias": False})``; values are JSON, or else text."""
    plain, _, query = name.partition("?")
    return plain, {key: _value(text) for key, text in parse_qsl(query, keep_blank_values=True)}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Inside, the CPU's random numbers start at `seed`; afterwards they go on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def filled_(module: nn.Module, weights: str | Path | None) -> tuple[str, ...]:
    """Puts the file's weights into `module`, and gives notes in words. Raises `ModelFormatError`, `UsageError`."""
    if weights is None:
        return (FRESH,)
    return tuple(load_into(module, read_weights(weights), source=str(Path(weights).absolute())))


def module_from(namespace: ModuleType, factory: str, settings: Mapping[str, Any]) -> nn.Module:
    """What the user's `factory` gives, in eval mode. Raises `UserModelError` LW-U80 with the user's file and line."""
    place = str(getattr(namespace, "__file__", None) or namespace.__name__)
    maker = vars(namespace).get(factory)
    if not callable(maker):
        callables = [n for n, v in vars(namespace).items() if callable(v) and not n.startswith("_")]
        state = "is not callable" if factory in vars(namespace) else "is not there"
        raise UserModelError(f"The factory {factory!r} {state}.", place=place, remedy=nearest(factory, callables), code="LW-U80")
    with seeded():
        module = guarded(lambda: maker(**settings), f"The factory {factory!r}", place)
    if not isinstance(module, nn.Module):
        what = f"The factory {factory!r} gave {type(module).__name__}, not a torch.nn.Module."
        raise UserModelError(what, place=place, remedy="Return the module itself.", code="LW-U80")
    return module.eval()


def guarded(action: Callable[[], Any], what: str, place: str) -> Any:
    """Runs the user's code; whatever it raises, ``sys.exit`` included, becomes `UserModelError` LW-U80 with file and line."""
    try:
        return action()
    except (KeyboardInterrupt, LayerwiseError):
        raise
    except SystemExit as error:
        raise _failed(f"{what} called sys.exit({error.code!r}).", place, "Move it under: if __name__ == '__main__'.") from error
    except BaseException as error:
        remedy = "Run the file by itself with python to see the full traceback, or use --debug."
        raise _failed(f"{what} raised {type(error).__name__}: {error}", place, remedy) from error


def _failed(what: str, place: str, remedy: str) -> UserModelError:
    """Names the innermost line of the user's own file, or of what it called where no line is theirs."""
    error = sys.exception()
    if isinstance(error, SyntaxError) and error.filename:  # the traceback ends in the compiler, not in their file
        return UserModelError(what, place=f"{error.filename}:{error.lineno}", remedy=remedy, code="LW-U80")
    frames = traceback.extract_tb(error.__traceback__ if error else None)
    own = [f for f in frames if f.filename == place]
    outside = [f for f in frames if Path(f.filename).parent != Path(__file__).parent and "importlib" not in f.filename]
    where = [f"{f.filename}:{f.lineno}" for f in own or outside] or [place]
    return UserModelError(what, place=where[-1], remedy=remedy, code="LW-U80")
