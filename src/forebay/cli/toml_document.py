"""A TOML file with the line of every key, for error messages.

`tomllib` does not report the lines of keys, and no maintained library does. But a file is a sequence of statements
(headers, and keys with values), each of which is a TOML text itself, so `tomllib` reads them one by one.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import msgspec

from forebay._text import format_bytes
from forebay.errors import ForebayError

KeyPath = tuple[str | int, ...]
"""The keys that lead to a value; a number is an index in a list of tables."""

_BARE: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
MAX_FILE_BYTES: Final = 1024 * 1024  # bytes; a larger file is taken for a mistake
_AT: Final = re.compile(
    r"(?P<what>.*) \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)", re.DOTALL
)


class InvalidConfiguration(ForebayError, ValueError):
    """{problems}"""  # noqa: D415 - each problem ends as it likes

    # One a line, each with the file and line, or the option, that it is about.
    problems: str


class TomlDocument:
    """The values of a TOML file, and the line of each.

    Args:
        name: of the file, for messages.
        text: of the file.

    Attributes:
        name: of the file, for messages.
        values: all of them.
        lines: the first line of each key and header, from 1, by the keys that lead there. Tables in a list are included
            if they have headers, ``[[...]]``, but not if the list is written inline.

    Raises:
        InvalidConfiguration: the text is not valid TOML.
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
    """Return the document in a file.

    Raises:
        InvalidConfiguration: it cannot be read, or is not valid TOML.
    """
    name = str(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InvalidConfiguration(problems=f"{name}: it cannot be read: {error.strerror or error}") from None
    if len(data) > MAX_FILE_BYTES:
        raise InvalidConfiguration(
            problems=f"{name}: it is larger than {format_bytes(MAX_FILE_BYTES)}, too large for a configuration"
        )
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidConfiguration(
            problems=f"{name}:{line}: this is not UTF-8: save the file in that encoding"
        ) from None
    return TomlDocument(name, text)


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Yield each statement with its first line; an unfinished one at the end comes last."""
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
    """Yield the line and the keys of each key and header, after those that lead to it."""
    table: KeyPath = ()
    lengths: dict[KeyPath, int] = {}
    for line, statement in _statements(text):
        values = tomllib.loads(statement)
        if statement.lstrip().startswith("["):
            for keys in _key_paths(values):
                yield line, keys
                table = keys
            if statement.lstrip().startswith("[["):
                index = lengths[table] = lengths.get(table, -1) + 1
                table = (*table, index)
                yield line, table
        else:
            for keys in _key_paths(values):
                yield line, (*table, *keys)


def _is_complete(statement: str) -> bool:
    """Return whether a statement is complete; one whose value continues on the next line is not."""
    try:
        tomllib.loads(statement)
    except tomllib.TOMLDecodeError:
        return False
    return True


def _key_paths(values: Mapping[str, Any]) -> Iterator[KeyPath]:
    """Yield the keys that lead to each table and value, outer ones first."""
    for key, value in values.items():
        yield (key,)
        if isinstance(value, dict):
            yield from ((key, *rest) for rest in _key_paths(value))


def _syntax_problem(name: str, text: str, message: str) -> str:
    """Return the problem in a text that `tomllib` rejected with `message`, with its line."""
    parts = _AT.fullmatch(message)
    problem = parts["what"] if parts else message
    at = int(parts["line"]) if parts and parts["line"] else None
    first_line = max(line for line, _ in _statements(text) if at is None or line <= at)
    if duplicate := _duplicate_problem(text, first_line):
        return f"{name}:{first_line}: {duplicate}"
    if parts and parts["line"]:
        return f"{name}:{parts['line']}: {problem} (column {parts['column']})"
    *_, (line, statement) = _statements(text)
    unfinished = "" if _is_complete(statement) else ", from here to the end of the file"  # its first line says more
    return f"{name}:{line}: {problem}{unfinished}"


def _duplicate_problem(text: str, line: int) -> str | None:
    """Return the problem with the statement of that line if it repeats an earlier one, else None."""
    first: dict[KeyPath, int] = {}
    repeated: KeyPath = ()
    try:
        for at, keys in _key_lines(text):
            if at > line:
                break
            if at == line:
                repeated = keys
            else:
                first.setdefault(keys, at)
    except tomllib.TOMLDecodeError:
        return None
    if repeated not in first:
        return None
    return f"{dotted_key(repeated)} is already in line {first[repeated]}: keep one of the two, or rename this one"


def dotted_key(keys: KeyPath) -> str:
    """Return keys as a TOML file writes them, without the indexes of tables in lists."""
    names = [key for key in keys if isinstance(key, str)]
    return ".".join(name if name and _BARE.issuperset(name) else msgspec.json.encode(name).decode() for name in names)
