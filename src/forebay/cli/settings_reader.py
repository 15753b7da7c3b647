"""Plain tables made into typed settings; each mistake is told with the place where it was made."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

from forebay.cli.toml_document import InvalidConfiguration, KeyPath, TomlDocument, dotted_key
from forebay.errors import ForebayError, InvalidPrice, InvalidSetting

S = TypeVar("S", bound=msgspec.Struct)

_LONGEST: Final = 100  # characters of a value that are shown
_KINDS: Final = (
    (bool, "true or false"),
    (int, "a whole number"),
    (float, "a number"),
    (str, "a string"),
    (tuple, "a list of strings"),
)


class SourceLocation(NamedTuple):
    """Where something was written; places are told in this order."""

    line: int  # 0 for none
    name: str

    def __str__(self) -> str:
        return f"{self.name}:{self.line}" if self.line else self.name


class SettingsSource:
    """Settings as they were written, in a file and on the command line, and where.

    Args:
        document: the file; None if there is none.
        name: what stands for a place that nobody wrote.
    """

    def __init__(self, document: TomlDocument | None, name: str) -> None:
        self.values: dict[str, Any] = {} if document is None else _copy(document.values)
        self._nowhere = SourceLocation(0, name if document is None else document.name)
        self._places: dict[KeyPath, SourceLocation] = {}
        if document is not None:
            self._places = {keys: SourceLocation(line, document.name) for keys, line in document.lines.items()}

    def override(self, keys: tuple[str, ...], value: Any, option: str) -> None:
        """Write over what was there, as an option says.

        Raises:
            InvalidConfiguration: what should be a table on the way there is none.
        """
        table = self.values
        for depth, key in enumerate(keys[:-1], 1):
            if key not in table:
                table[key] = {}
                self._places[keys[:depth]] = SourceLocation(0, option)
            table = table[key]
            if not isinstance(table, dict):
                problems = f"{self.location(keys[:depth])}: {_must_be_table(keys[:depth], table)}"
                raise InvalidConfiguration(problems=problems)
        table[keys[-1]] = value
        self._places[keys] = SourceLocation(0, option)

    def location(self, keys: KeyPath) -> SourceLocation:
        """Where it was written or, if it was not, where the table is that it would belong to."""
        for depth in range(len(keys), 0, -1):
            if keys[:depth] in self._places:
                return self._places[keys[:depth]]
        return self._nowhere


class SettingsReader:
    """Reads a source, and gathers what is wrong with it."""

    def __init__(self, source: SettingsSource) -> None:
        self._source = source
        self.problems: list[tuple[SourceLocation, str]] = []

    def read_struct(self, kind: type[S], keys: KeyPath, table: Any, *, build: bool = True, **given: Any) -> S | None:
        """A struct from a table; None if it cannot be made.

        Args:
            kind: what it is to be.
            keys: where the table is.
            table: what is there.
            whole: whether it is to be made; else it is only looked at, for something is wrong with what is given.
            given: fields that are not taken from there.
        """
        if not self._is_table(keys, table):
            return None
        fields = {field.name: field for field in msgspec.structs.fields(kind) if field.name not in given}
        made: dict[str, Any] = {}
        count = len(self.problems)
        for key in self.known_keys(keys, table, fields):
            made[key] = self._value(fields[key].type, (*keys, key), table[key])
        for name, field in fields.items():
            if field.required and name not in table:
                self.add_problem(keys, f"{dotted_key(keys)} needs {name}")
        if len(self.problems) > count or not build:
            return None
        try:
            return kind(**made, **given)
        except ForebayError as error:
            self._add_rejected(keys, error)
            return None

    def read_named(self, kind: type[S], keys: KeyPath, table: Any) -> tuple[S, ...]:
        """Structs with a name, from a table that has a table by that name for each."""
        if not self._is_table(keys, table):
            return ()
        made = [self.read_struct(kind, (*keys, name), part, name=name) for name, part in table.items()]
        return tuple(one for one in made if one is not None)

    def known_keys(self, keys: KeyPath, table: Mapping[str, Any], names: Iterable[str]) -> list[str]:
        """The keys of a table that are among the names; of the others it is told."""
        names = list(names)
        for key in table:
            if key not in names:
                near = difflib.get_close_matches(key, names, 1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
                self.add_problem((*keys, key), f"{dotted_key((*keys, key))} is no setting; {hint}")
        return [key for key in table if key in names]

    def add_problem(self, keys: KeyPath, problem: str) -> None:
        """Something is wrong there."""
        self.problems.append((self._source.location(keys), problem))

    def raise_problems(self) -> None:
        """Nothing more is to be read.

        Raises:
            InvalidConfiguration: something was wrong.
        """
        if self.problems:
            lines = [f"{place}: {problem}" for place, problem in sorted(self.problems)]
            raise InvalidConfiguration(problems="\n".join(lines))

    def _value(self, kind: Any, keys: KeyPath, value: Any) -> Any:
        arguments = typing.get_args(kind)
        if typing.get_origin(kind) is dict:
            if not self._is_table(keys, value):
                return None
            return {key: self._value(arguments[1], (*keys, key), part) for key, part in value.items()}
        if _is_struct(kind):
            return self.read_struct(kind, keys, value)
        if typing.get_origin(kind) is tuple and _is_struct(arguments[0]):
            return self._structs(arguments[0], keys, value)
        try:
            return msgspec.convert(value, kind, strict=True)
        except msgspec.ValidationError:
            found = f"{value!r}"[:_LONGEST] if _is_choice(kind) and isinstance(value, str) else _describe_value(value)
            self.add_problem(keys, f"{dotted_key(keys)} is {found}; it must be {_describe_type(kind)}")
            return None

    def _structs(self, kind: type[S], keys: KeyPath, value: Any) -> tuple[S | None, ...] | None:
        """One for each table of a list."""
        if not isinstance(value, list):
            self.add_problem(
                keys,
                f"{dotted_key(keys)} is {_describe_value(value)}; it must be a list of tables: [[{dotted_key(keys)}]]",
            )
            return None
        return tuple(self.read_struct(kind, (*keys, place), part) for place, part in enumerate(value))

    def _is_table(self, keys: KeyPath, value: Any) -> bool:
        if not isinstance(value, dict):
            self.add_problem(keys, _must_be_table(keys, value))
        return isinstance(value, dict)

    def _add_rejected(self, keys: KeyPath, error: ForebayError) -> None:
        """The settings themselves refuse something that was read."""
        facts = vars(error)
        if isinstance(error, InvalidPrice):
            keys = (*keys, "prices", facts["model"], facts["name"])
        elif isinstance(error, InvalidSetting):
            table, _, rest = facts["name"].partition(".")
            within = (table, *rest.rsplit(".", 1)) if rest and table in self._source.values else None
            keys = within or (*keys, *facts["name"].split(".", 1))  # of a table at the top, or of the one that was read
        else:
            self.add_problem(keys, f"{error}")
            return
        value = facts["value"]
        shown = f"{value!r}"[:_LONGEST] if isinstance(value, str) else _describe_value(value)
        self.add_problem(keys, f"{dotted_key(keys)} is {shown}; it must be {facts['expected']}")


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    """Tables of one's own, all the way down."""
    return {key: _copy(value) if isinstance(value, dict) else value for key, value in values.items()}


def _must_be_table(keys: KeyPath, value: Any) -> str:
    return f"{dotted_key(keys)} is {_describe_value(value)}; it must be a table"


def _is_choice(kind: Any) -> bool:
    return any(typing.get_origin(part) is typing.Literal for part in _parts(kind))


def _parts(kind: Any) -> list[Any]:
    """Of a union what it may be, None apart."""
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return [part for part in (typing.get_args(kind) if union else (kind,)) if part is not type(None)]


def _describe_type(kind: Any) -> str:
    """A type in words."""
    (part,) = _parts(kind)
    if typing.get_origin(part) is typing.Literal:
        *others, last = (repr(word) for word in typing.get_args(part))
        return f"{', '.join(others)} or {last}"
    plain = typing.get_origin(part) or part
    return next(words for python, words in _KINDS if python is plain)


def _describe_value(value: Any) -> str:
    """A value as a message may show it: a string may be a secret in the wrong place."""
    match value:
        case None:
            return "not given"
        case bool():
            return f"{value}".lower()
        case int() | float():
            return f"{value}"[:_LONGEST]
        case str():
            return "a string"
        case dict():
            return "a table"
        case _:
            return f"a {type(value).__name__}"
