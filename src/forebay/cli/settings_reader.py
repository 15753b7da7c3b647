"""A reader of typed settings from TOML tables and options, which reports each mistake with its location."""

from __future__ import annotations

import copy
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

from forebay.cli.environment_values import EnvironmentValues
from forebay.cli.toml_document import InvalidConfiguration, KeyPath, TomlDocument, dotted_key
from forebay.errors import ForebayError, InvalidPrice, InvalidSetting

S = TypeVar("S", bound=msgspec.Struct)

_MAX_SHOWN: Final = 100  # characters of a value in a message
_TYPE_NAMES: Final = (
    (bool, "true or false"),
    (int, "a whole number"),
    (float, "a number"),
    (str, "a string"),
    (tuple, "a list of strings"),
)


class SourceLocation(NamedTuple):
    """The file and line, or the option, of a setting; problems are reported in the order of their locations."""

    line: int  # 0 if there is none
    name: str

    def __str__(self) -> str:
        return f"{self.name}:{self.line}" if self.line else self.name


class SettingsSource:
    """The settings in a file and on the command line, with their locations.

    Args:
        document: the file, or None.
        name: the location of a setting that was not given, without a file.
        environment: variables to which the strings of the file may refer, see `EnvironmentValues`; None: they are taken
            as they are.

    Attributes:
        values: of all settings.
        from_environment: the settings with values of the environment.

    Raises:
        InvalidConfiguration: the file refers to a variable that is not set.
    """

    def __init__(self, document: TomlDocument | None, name: str, environment: Mapping[str, str] | None = None) -> None:
        self.from_environment = EnvironmentValues({} if environment is None else environment)
        self.values: dict[str, Any] = {} if document is None else copy.deepcopy(dict(document.values))
        if environment is not None:
            self.values = self.from_environment.replace(self.values)
        self._default = SourceLocation(0, name if document is None else document.name)
        self._locations: dict[KeyPath, SourceLocation] = {}
        if document is not None:
            self._locations = {keys: SourceLocation(line, document.name) for keys, line in document.lines.items()}
        self._raise_bad_references()

    def _raise_bad_references(self) -> None:
        bad = self.from_environment.problems
        found = sorted((self.location(each.keys), f"{dotted_key(each.keys)} {each.problem}") for each in bad)
        if found:
            raise InvalidConfiguration(problems="\n".join(f"{location}: {problem}" for location, problem in found))

    def override(self, keys: tuple[str, ...], value: Any, option: str) -> None:
        """Set a value by an option, over that of the file.

        Raises:
            InvalidConfiguration: a key on the way there is not a table.
        """
        table = self.values
        for depth, key in enumerate(keys[:-1], 1):
            if key not in table:
                table[key] = {}
                self._locations[keys[:depth]] = SourceLocation(0, option)
            table = table[key]
            if not isinstance(table, dict):
                problems = f"{self.location(keys[:depth])}: {_not_a_table(keys[:depth], table)}"
                raise InvalidConfiguration(problems=problems)
        table[keys[-1]] = value
        self.from_environment.variables.pop(keys, None)
        self._locations[keys] = SourceLocation(0, option)

    def location(self, keys: KeyPath) -> SourceLocation:
        """Return the location of a setting or, if it was not given, that of the table it belongs to."""
        for depth in range(len(keys), 0, -1):
            if keys[:depth] in self._locations:
                return self._locations[keys[:depth]]
        return self._default


class SettingsReader:
    """A reader of structs from a source, which collects all problems.

    Args:
        source: of the settings.
    """

    def __init__(self, source: SettingsSource) -> None:
        self._source = source
        self.problems: list[tuple[SourceLocation, str]] = []

    def read_struct(self, kind: type[S], keys: KeyPath, table: Any, *, build: bool = True, **given: Any) -> S | None:
        """Return a struct made from a table; None if there is a problem.

        Args:
            kind: the type of the struct.
            keys: that lead to the table.
            table: its value, which may be anything.
            build: whether to make the struct; else the table is only checked, because `given` has a problem.
            given: fields that do not come from the table.
        """
        if not self._is_table(keys, table):
            return None
        fields = {field.name: field for field in msgspec.structs.fields(kind) if field.name not in given}
        values: dict[str, Any] = {}
        problems = len(self.problems)
        for key in self.known_keys(keys, table, fields):
            values[key] = self._value(fields[key].type, (*keys, key), table[key])
        for name, field in fields.items():
            if field.required and name not in table:
                self.add_problem(keys, f"{dotted_key(keys)} needs {name}")
        if len(self.problems) > problems or not build:
            return None
        try:
            return kind(**values, **given)
        except ForebayError as error:
            self._add_rejected(keys, error)
            return None

    def read_named(self, kind: type[S], keys: KeyPath, table: Any) -> tuple[S, ...]:
        """Return the structs of a table of tables; the key of each is its name."""
        if not self._is_table(keys, table):
            return ()
        structs = [self.read_struct(kind, (*keys, name), part, name=name) for name, part in table.items()]
        return tuple(struct for struct in structs if struct is not None)

    def known_keys(self, keys: KeyPath, table: Mapping[str, Any], names: Iterable[str]) -> list[str]:
        """Return the keys of a table that are among the names, and add a problem for each other."""
        names = list(names)
        for key in table:
            if key not in names:
                near = difflib.get_close_matches(key, names, 1)
                hint = f"did you mean {near[0]}?" if near else f"known settings are {', '.join(names)}"
                self.add_problem((*keys, key), f"{dotted_key((*keys, key))} is not a setting; {hint}")
        return [key for key in table if key in names]

    def add_problem(self, keys: KeyPath, problem: str) -> None:
        """Add a problem with the setting at these keys."""
        self.problems.append((self._source.location(keys), problem))

    def raise_problems(self) -> None:
        """Raise all problems, if there are any.

        Raises:
            InvalidConfiguration: with one line for each problem.
        """
        if self.problems:
            lines = [f"{location}: {problem}" for location, problem in sorted(self.problems)]
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
            # What comes from the environment is text, also where a number is needed.
            return msgspec.convert(value, kind, strict=not self._source.from_environment.of(keys))
        except msgspec.ValidationError:
            found = self._shown(keys, value) if _is_choice(kind) else self._described(keys, value)
            self.add_problem(keys, f"{dotted_key(keys)} is {found}; it must be {_describe_type(kind)}")
            return None

    def _structs(self, kind: type[S], keys: KeyPath, value: Any) -> tuple[S | None, ...] | None:
        """Return a struct for each table of a list."""
        if not isinstance(value, list):
            self.add_problem(
                keys,
                f"{dotted_key(keys)} is {_describe_value(value)}; it must be a list of tables: [[{dotted_key(keys)}]]",
            )
            return None
        return tuple(self.read_struct(kind, (*keys, index), part) for index, part in enumerate(value))

    def _is_table(self, keys: KeyPath, value: Any) -> bool:
        if not isinstance(value, dict):
            self.add_problem(keys, _not_a_table(keys, value))
        return isinstance(value, dict)

    def _add_rejected(self, keys: KeyPath, error: ForebayError) -> None:
        """Add the problem of a value that the settings rejected."""
        facts = vars(error)
        if isinstance(error, InvalidPrice):
            keys = (*keys, "prices", facts["model"], facts["name"])
        elif isinstance(error, InvalidSetting):
            table, _, rest = facts["name"].partition(".")
            within = (table, *rest.rsplit(".", 1)) if rest and table in self._source.values else None
            keys = within or (*keys, *facts["name"].split(".", 1))  # from the top, or from the table that was read
        else:
            self.add_problem(keys, f"{error}")
            return
        self.add_problem(
            keys, f"{dotted_key(keys)} is {self._shown(keys, facts['value'])}; it must be {facts['expected']}"
        )

    def _shown(self, keys: KeyPath, value: Any) -> str:
        """Return a value as a message may show it, also if it is a string, but nothing of the environment."""
        if isinstance(value, str) and not self._source.from_environment.of(keys):
            return f"{value!r}"[:_MAX_SHOWN]
        return self._described(keys, value)

    def _described(self, keys: KeyPath, value: Any) -> str:
        names = self._source.from_environment.of(keys)
        return f"the value of {', '.join(f'${name}' for name in names)}" if names else _describe_value(value)


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _not_a_table(keys: KeyPath, value: Any) -> str:
    return f"{dotted_key(keys)} is {_describe_value(value)}; it must be a table"


def _is_choice(kind: Any) -> bool:
    return any(typing.get_origin(part) is typing.Literal for part in _parts(kind))


def _parts(kind: Any) -> list[Any]:
    """Return the members of a union type, without None."""
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return [part for part in (typing.get_args(kind) if union else (kind,)) if part is not type(None)]


def _describe_type(kind: Any) -> str:
    """Return what a value of this type must be, in words."""
    (part,) = _parts(kind)
    if typing.get_origin(part) is typing.Literal:
        *others, last = (repr(word) for word in typing.get_args(part))
        return f"{', '.join(others)} or {last}"
    plain = typing.get_origin(part) or part
    return next(words for python, words in _TYPE_NAMES if python is plain)


def _describe_value(value: Any) -> str:
    """Return a value as a message may show it: not a string, which may be a misplaced secret."""
    match value:
        case None:
            return "not given"
        case bool():
            return f"{value}".lower()
        case int() | float():
            return f"{value}"[:_MAX_SHOWN]
        case str():
            return "a string"
        case dict():
            return "a table"
        case _:
            return f"a {type(value).__name__}"
