"""A TOML file, read so that every key is known by its line.

No library that is kept tells the lines of keys, and `tomllib` does not. But a file is a row of statements, headers and
keys with their values, and each of them is a small TOML text: so they are read one after another, by `tomllib` itself.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import msgspec

from forebay.errors import ForebayError

KeyPath = tuple[str | int, ...]
"""What leads to a value; a number is a place in a list of tables."""

_BARE: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
MAX_FILE_BYTES: Final = 1024 * 1024  # bytes; a larger file is no configuration
_AT: Final = re.compile(
    r"(?P<what>.*) \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)", re.DOTALL
)


class InvalidConfiguration(ForebayError, ValueError):
    """{problems}"""  # noqa: D415 - they end as they like

    # One in a line, each with the file and line, or the option, that it is about.
    problems: str


class TomlDocument:
    """What is in a file, and where.

    Attributes:
        name: of the file, as messages show it.
        values: all of it.
        lines: by the keys that lead there, where each key and each header first stands; 1 is the first line. Of lists
            those of tables with headers of their own are looked into, ``[[...]]``, and no others.
    """

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        try:
            self.values: Mapping[str, Any] = MappingProxyType(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise InvalidConfiguration(problems=_syntax_problem(name, text, str(error))) from None
        self.lines: dict[KeyPath, int] = {}
        for line, keys in _key_lines(text):
            self.lines.setdefault(keys, line)


def read_document(path: Path) -> TomlDocument:
    """Read a file.

    Raises:
        InvalidConfiguration: it cannot be read, or is no TOML.
    """
    name = str(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InvalidConfiguration(problems=f"{name}: it cannot be read: {error.strerror or error}") from None
    if len(data) > MAX_FILE_BYTES:
        raise InvalidConfiguration(
            problems=f"{name}: it has more than {MAX_FILE_BYTES} bytes, so it is no configuration"
        )
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidConfiguration(
            problems=f"{name}:{line}: this is no UTF-8: save the file in that encoding"
        ) from None
    return TomlDocument(name, text)


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Each statement with the line where it begins. What is left unfinished at the end comes last, as it is."""
    start, statement = 1, ""
    for number, line in enumerate(text.split("\n"), 1):
        statement += line + "\n"
        if not _is_complete(statement):
            continue
        yield start, statement
        start, statement = number + 1, ""
    if statement:
        yield start, statement


def _key_lines(text: str) -> Iterator[tuple[int, KeyPath]]:
    """Each key and each header with the line where it stands, those that lead to it before it."""
    table: KeyPath = ()
    lengths: dict[KeyPath, int] = {}
    for line, statement in _statements(text):
        said = tomllib.loads(statement)
        if statement.lstrip().startswith("["):
            for keys in _key_paths(said):
                yield line, keys
                table = keys
            if statement.lstrip().startswith("[["):
                place = lengths[table] = lengths.get(table, -1) + 1
                table = (*table, place)
                yield line, table
        else:
            for keys in _key_paths(said):
                yield line, (*table, *keys)


def _is_complete(statement: str) -> bool:
    """Whether it is one: a value that goes on in the next line is none yet."""
    try:
        tomllib.loads(statement)
    except tomllib.TOMLDecodeError:
        return False
    return True


def _key_paths(said: Mapping[str, Any]) -> Iterator[KeyPath]:
    """The keys that lead to each value and each table, outer ones first."""
    for key, value in said.items():
        yield (key,)
        if isinstance(value, dict):
            yield from ((key, *rest) for rest in _key_paths(value))


def _syntax_problem(name: str, text: str, message: str) -> str:
    told = _AT.fullmatch(message)
    what = told["what"] if told else message
    at = int(told["line"]) if told and told["line"] else None
    begins = max(line for line, _ in _statements(text) if at is None or line <= at)
    if twice := _duplicate_problem(text, begins):
        return f"{name}:{begins}: {twice}"
    if told and told["line"]:
        return f"{name}:{told['line']}: {what} (column {told['column']})"
    *_, (line, statement) = _statements(text)
    unended = "" if _is_complete(statement) else ", from here to the end of the file"  # where it begins says more
    return f"{name}:{line}: {what}{unended}"


def _duplicate_problem(text: str, line: int) -> str | None:
    """What is wrong with the statement of that line, if it is that something stands there for the second time."""
    first: dict[KeyPath, int] = {}
    here: KeyPath = ()
    try:
        for at, keys in _key_lines(text):
            if at > line:
                break
            if at == line:
                here = keys
            else:
                first.setdefault(keys, at)
    except tomllib.TOMLDecodeError:
        return None
    if here not in first:
        return None
    return (
        f"{dotted_key(here)} stands in line {first[here]} already: keep one of the two, or give this one another name"
    )


def dotted_key(keys: KeyPath) -> str:
    """Keys as a TOML file has them: there is no number in them, for a place in a list."""
    names = [key for key in keys if isinstance(key, str)]
    return ".".join(name if name and _BARE.issuperset(name) else msgspec.json.encode(name).decode() for name in names)
