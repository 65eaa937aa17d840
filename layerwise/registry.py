"""Names → classes, filled on first look-up by importing every module of a package: a new method is one new file.

Decision: a module registers itself with a decorator; there is no list to edit. Nothing is imported until a name is asked for,
so ``import layerwise`` and ``layerwise --help`` stay light. Other distributions add theirs by an entry point whose group is the
package's name (``layerwise.adapters``): one that fails is a warning and is left out, since someone else's fault must not stop
this program.
"""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from layerwise.errors import UsageError, nearest, printable

T = TypeVar("T")


class EntryPointWarning(UserWarning):
    """LW-P: an entry point of another distribution could not be used."""


class Registry(Mapping[str, type[T]], Generic[T]):
    """A read-only mapping from public name to class for one `kind` of thing, found in `package`."""

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._classes: dict[str, type[T]] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: known from now on as `name`. Raises `UsageError` when another class has the name."""

        def add(cls: type[T]) -> type[T]:
            other = self._classes.get(name)
            if other is not None and other.__qualname__ != cls.__qualname__:
                raise UsageError(
                    f"Two classes want to be the {self.kind} {name!r}: "
                    f"{other.__module__}.{other.__qualname__} and {cls.__module__}.{cls.__qualname__}."
                )
            self._classes[name] = cls
            return cls

        return add

    def __getitem__(self, name: str) -> type[T]:
        self._load()
        try:
            return self._classes[name]
        except KeyError:
            raise UsageError(f"Unknown {self.kind} {name!r}.", remedy=nearest(name, self._classes)) from None

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._classes

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._classes))

    def __len__(self) -> int:
        self._load()
        return len(self._classes)

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"{self.package}.{module.name}")
        for point in entry_points(group=self.package):
            self._enter(point)

    def _enter(self, point: EntryPoint) -> None:
        """Loads a module that registers its classes, or a class that is registered under the entry point's name."""
        before = dict(self._classes)
        try:
            found = point.load()
            if isinstance(found, type) and found not in self._classes.values():
                self.register(point.name)(found)
            elif self._classes == before:
                raise UsageError("it registers no class")
        except (Exception, SystemExit) as error:  # whatever someone else's module does on import
            self._classes = before  # what it had registered before it failed is gone as well
            owner = point.dist.name if point.dist is not None else "an unknown distribution"
            what = (
                f"LW-P The entry point {point.name!r} of {owner} ({self.package}) was left out: {type(error).__name__}: {error}"
            )
            warnings.warn(printable(what), EntryPointWarning, stacklevel=2)
