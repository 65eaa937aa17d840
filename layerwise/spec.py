"""Methods with settings as text: ``fisher_information(kind=true, per_parameter=yes)``, for flags, files and table labels."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any, TypeVar

from layerwise.errors import UsageError, nearest
from layerwise.registry import Registry

T = TypeVar("T")
SPEC = re.compile(r"\s*([\w.-]+)\s*(?:\((.*)\))?\s*", re.DOTALL)
COMMA = re.compile(r",(?![^()]*\))")  # outside parentheses
WORDS: dict[str, Any] = {"true": True, "yes": True, "false": False, "no": False, "none": None}


def split_specs(text: str) -> list[str]:
    """The parts between commas that stand outside parentheses, none empty."""
    return [part.strip() for part in COMMA.split(text) if part.strip()]


def built(registry: Registry[T], spec: str) -> T:
    """The registered class that `spec` names, with its settings.

    Raises `UsageError` for text that cannot be read, and with the nearest name for an unknown class or setting.
    """
    name, settings = parted(spec, registry.kind)
    cls = registry[name]
    defaults = {f.name: f.default for f in fields(cls)}  # type: ignore[arg-type]  # every registered method is a dataclass
    given: dict[str, Any] = {}
    for key, text in settings.items():
        if key not in defaults:
            raise UsageError(f"{name} has no setting {key!r}.", place=spec, remedy=nearest(key, defaults))
        given[key] = _value(text, defaults[key])
    return cls(**given)


def parted(spec: str, kind: str) -> tuple[str, dict[str, str]]:
    """The name in `spec`, and its settings as text. Raises `UsageError` for what cannot be read as a `kind`."""
    found = SPEC.fullmatch(spec)
    if found is None:
        raise UsageError(f"{spec!r} is no {kind}.", remedy="Write NAME or NAME(setting=value, ...).")
    return found[1], dict(_setting(part, spec) for part in split_specs(found[2] or ""))


def written(name: str, settings: dict[str, Any]) -> str:
    """The inverse: ``NAME(setting=value, …)``, or ``NAME`` without settings."""
    return f"{name}({', '.join(f'{k}={v}' for k, v in settings.items())})" if settings else name


def _setting(part: str, spec: str) -> tuple[str, str]:
    key, equals, value = (x.strip() for x in part.partition("="))
    if not equals or not key:
        raise UsageError(f"{part!r} is no setting.", place=spec, remedy="Write setting=value.")
    return key, value


def _value(text: str, default: Any) -> Any:
    """What `text` stands for; where the default is a word, every word is one (`kind=true` of the true Fisher, say)."""
    if isinstance(default, str):
        return text.strip("'\"")
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip("'\"")
