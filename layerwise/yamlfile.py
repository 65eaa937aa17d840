"""A YAML mapping read with care: every value knows its ``file:line:column`` and how it was written. No torch.

Decision: the node tree of `yaml.SafeLoader` is checked before any value is built. So no tag can construct an object, an
alias bomb is counted and not expanded, and a value that YAML 1.1 reads in a surprising way (``no``, ``1e3``) can be told
from what was meant.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from layerwise.errors import ConfigError, UsageError

LARGEST_FILE = 1 << 20  # bytes; a configuration is a page of text
MOST_FILES = 50  # read through include
MOST_NODES = 10_000  # values after aliases are followed
DEEPEST = 50
VARIABLE = re.compile(r"\$(?:(\$)|\{([^}]*)\})")
MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")
TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map", "timestamp")}


@dataclass(frozen=True)
class Entry:
    """One value: `data` as YAML reads it (lists and mappings hold entries), its `place`, and the text as `written`.

    `written` is empty for lists, mappings and quoted text: what stands in quotes surprises nobody.
    """

    data: Any
    place: str
    written: str = ""

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.data, dict):
            return {key: entry.plain() for key, entry in self.data.items()}
        if isinstance(self.data, list):
            return [entry.plain() for entry in self.data]
        return self.data


def read_entries(path: str | Path, environment: Mapping[str, str] | None = None) -> dict[str, Entry]:
    """The keys of a YAML file, ``include`` followed (the including file wins) and ``${NAME}`` filled from `environment`.

    Raises `ConfigError` LW-F15 … F20 and F25 … F28 with ``file:line:column``; `UsageError` for a file that cannot be read.
    """
    path = Path(path)
    return _Reader(path.absolute().parent, os.environ if environment is None else environment).read(path, ())


class _Reader:
    """One reading: the folder that includes must stay in, and the variables."""

    def __init__(self, root: Path, environment: Mapping[str, str]) -> None:
        self.root = root.resolve()
        self.environment = environment
        self.files = 0

    def read(self, path: Path, including: tuple[Path, ...]) -> dict[str, Entry]:
        """The entries of `path`, which the files `including` led to."""
        place = str(path)
        self.files += 1
        if self.files > MOST_FILES:  # files that include one another twice double with every level
            raise ConfigError(f"More than {MOST_FILES} files are included.", place=place, code="LW-F18")
        node = _compose(_text(path), place)
        loader = yaml.SafeLoader("")
        try:
            entries = self._mapping(node, place, loader)
        finally:
            loader.dispose()
        merged: dict[str, Entry] = {}
        for name in _names(entries.pop("include", None)):
            merged |= self.read(self._included(name, path, including), (*including, path.resolve()))
        return merged | entries

    def _included(self, name: Entry, path: Path, including: tuple[Path, ...]) -> Path:
        target = path.parent / str(name.data)
        resolved = target.resolve()
        if Path(str(name.data)).is_absolute() or ".." in Path(str(name.data)).parts or not resolved.is_relative_to(self.root):
            raise ConfigError(
                f"include {name.data!r} leads out of the folder of the configuration.",
                place=name.place,
                remedy="Include files beside or below it only.",
                code="LW-F26",
            )
        chain = (*including, path.resolve())
        if resolved in chain:
            way = " -> ".join(p.name for p in (*chain, resolved))
            raise ConfigError(f"include goes round in a circle: {way}.", place=name.place, remedy="Remove one.", code="LW-F26")
        if not resolved.is_file():
            raise ConfigError(f"include {name.data!r}: no such file {resolved}.", place=name.place, code="LW-F26")
        return target

    def _mapping(self, node: yaml.Node, file: str, loader: yaml.SafeLoader) -> dict[str, Entry]:
        place = _place(file, node.start_mark)
        if not isinstance(node, yaml.MappingNode):
            read = "a list" if isinstance(node, yaml.SequenceNode) else f"the text {_shown(node)}"
            raise ConfigError(f"This is {read}, not keys with values.", place=place, remedy="Write key: value.", code="LW-F21")
        entries: dict[str, Entry] = {}
        lines: dict[str, int] = {}
        for key, value in node.value:
            name, where = str(key.value), _place(file, key.start_mark)
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError("A key is a list or a mapping.", place=where, remedy="Write a name.", code="LW-F21")
            if name in entries:
                raise ConfigError(
                    f"The key {name!r} stands twice: here and in line {lines[name]}.",
                    place=where,
                    remedy="Keep one of them.",
                    code="LW-F19",
                )
            lines[name] = key.start_mark.line + 1
            entries[name] = self._entry(value, name, file, loader)
        return entries

    def _entry(self, node: yaml.Node, key: str, file: str, loader: yaml.SafeLoader) -> Entry:
        place = f"{_place(file, node.start_mark)}: {key}"
        if isinstance(node, yaml.MappingNode):
            return Entry(self._mapping(node, file, loader), place)
        if isinstance(node, yaml.SequenceNode):
            return Entry([self._entry(item, key, file, loader) for item in node.value], place)
        text, plain, tag = str(node.value), getattr(node, "style", None) is None, node.tag
        filled = VARIABLE.sub(lambda match: self._variable(match, place), text)
        if filled != text and plain and tag.endswith(":str"):  # what a variable holds is typed like what is written
            tag = loader.resolve(yaml.ScalarNode, filled, (True, False))
        return Entry(_built(loader, tag, filled, place), place, text if plain else "")

    def _variable(self, match: re.Match[str], place: str) -> str:
        if match[1]:  # $$ is a dollar sign
            return "$"
        try:
            return self.environment[match[2]]
        except KeyError:
            raise ConfigError(
                f"The environment variable {match[2]!r} is not set.",
                place=place,
                remedy=f"Set it with export {match[2]}=..., or write $${{...}} for the text itself.",
                code="LW-F25",
            ) from None


def _text(path: Path) -> str:
    place = str(path.absolute())
    try:
        raw = path.read_bytes() if path.stat().st_size <= LARGEST_FILE else None
    except FileNotFoundError:
        raise UsageError("There is no such file.", place=place, remedy="Check the path.", code="LW-C04") from None
    except IsADirectoryError:
        raise UsageError("This is a folder, not a file.", place=place, remedy="Name the YAML file.", code="LW-C05") from None
    except OSError as error:
        raise UsageError(f"Cannot be read: {error.strerror}.", place=place, code="LW-C06") from error
    if raw is None:
        raise ConfigError(f"Larger than {LARGEST_FILE:,} bytes.", place=place, remedy="Split it up.", code="LW-F18")
    if raw.startswith(MARKS) or b"\0" in raw:
        kind = "UTF-8 with a byte order mark" if raw.startswith(MARKS[0]) else "UTF-16, UTF-32 or binary"
        raise ConfigError(f"The file is {kind}.", place=place, remedy="Save it as plain UTF-8.", code="LW-F28")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"The byte 0x{raw[error.start]:02x} is not UTF-8.", place=f"{place}:{line}", remedy="Save it as UTF-8.", code="LW-F28"
        ) from error


def _compose(text: str, file: str) -> yaml.Node:
    """The node tree, checked for tags and size before anything is built from it."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError:
        raise ConfigError("Nested too deeply.", place=file, remedy="Write a flat file.", code="LW-F18") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = _place(file, mark) if mark else file
        what = f"This is not YAML: {error.problem or error.context}."
        raise ConfigError(what, place=place, remedy="Check the indent, quotes and colons.", code="LW-F16") from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        line = text.count("\n", 0, getattr(error, "position", 0)) + 1
        raise ConfigError(
            f"This is not YAML: {getattr(error, 'reason', error)}.", place=f"{file}:{line}", code="LW-F16"
        ) from error
    if node is None:
        raise ConfigError("The file is empty.", place=file, remedy="Write at least model: and data:.", code="LW-F15")
    _check(node, file)
    return node


def _check(root: yaml.Node, file: str) -> None:
    """Refuses strange tags (LW-F17), and trees that aliases make endless or huge (LW-F18)."""
    seen = 0
    stack: list[tuple[yaml.Node, int]] = [(root, 0)]
    while stack:
        node, depth = stack.pop()
        seen += 1
        if seen > MOST_NODES or depth > DEEPEST:
            raise ConfigError(
                f"More than {MOST_NODES:,} values or {DEEPEST} levels once the aliases (*name) are followed.",
                place=_place(file, node.start_mark),
                remedy="Write the values out.",
                code="LW-F18",
            )
        if node.tag not in TAGS:
            raise ConfigError(
                f"The tag {node.tag.replace('tag:yaml.org,2002:', '!!')!r} is refused: a configuration holds plain values only.",
                place=_place(file, node.start_mark),
                remedy="Write text, numbers, true, false or lists.",
                code="LW-F17",
            )
        if isinstance(node, yaml.MappingNode):
            stack += [(part, depth + 1) for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            stack += [(item, depth + 1) for item in node.value]


def _built(loader: yaml.SafeLoader, tag: str, text: str, place: str) -> Any:
    """The Python value of a scalar. Raises `ConfigError` LW-F24 for a whole number beyond 64 bits."""
    if tag.endswith(":int") and len(text) > 66:  # int() itself would refuse or take long
        raise too_large(f"a whole number of {len(text)} characters", place)
    try:
        value = loader.construct_object(yaml.ScalarNode(tag, text), deep=True)
    except (ValueError, yaml.YAMLError) as error:  # 2024-02-30, or !!int of a word
        raise ConfigError(f"{text!r} cannot be read: {error}.", place=place, code="LW-F21") from error
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise too_large(f"{text}", place)
    return value


def too_large(what: str, place: str) -> ConfigError:
    """The error for a whole number beyond 64 bits."""
    return ConfigError(f"{what[:60]} does not fit into 64 bits.", place=place, remedy="Write a smaller number.", code="LW-F24")


def _names(entry: Entry | None) -> list[Entry]:
    if entry is None:
        return []
    names = entry.data if isinstance(entry.data, list) else [entry]
    for name in names:
        if not isinstance(name.data, str):
            raise ConfigError("include takes the names of files.", place=name.place, code="LW-F21")
    return names


def _shown(node: yaml.Node) -> str:
    text = str(node.value)
    return repr(text if len(text) <= 40 else text[:40] + "…")


def _place(file: str, mark: Any) -> str:
    return f"{file}:{mark.line + 1}:{mark.column + 1}"
