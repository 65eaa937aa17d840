"""Modules that share their name with a verb: ``layerwise.compress`` is the package of methods and ``lw.compress(...)`` the verb.

Python binds a submodule as an attribute of its package when it is imported, over whatever was there. So that ``lw.plan``,
``lw.compress`` and ``lw.export`` mean the verb whether or not the module has been imported, these modules are callable.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


class VerbModule(ModuleType):
    """A module that calls the function of its own name in `layerwise.engine`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(*args, **kwargs)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        verb: Callable[..., Any] = getattr(importlib.import_module("layerwise.engine"), self.__name__.rpartition(".")[2])
        return verb

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.__wrapped__)


def make_callable(module: str) -> None:
    """Turns the module of this name into its verb. Called at its end."""
    sys.modules[module].__class__ = VerbModule
