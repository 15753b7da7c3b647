"""Values of a configuration from environment variables: ``${NAME}``, ``${NAME:-default}``, ``$$`` for a dollar sign.

They are replaced in the strings of a file that was read, not in its text: a value can neither end a string nor add a
setting.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from forebay.cli.toml_document import KeyPath

_REFERENCE: Final = re.compile(r"\$(?:(?P<dollar>\$)|\{(?P<inner>[^}]*)(?P<end>\}?))")
_INNER: Final = re.compile(r"(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>.*))?", re.DOTALL)

_NAMES_VARIABLE: Final = "_env"  # the end of the names of settings that name a variable


class BadReference(NamedTuple):
    """A reference to a variable that cannot be replaced.

    Attributes:
        keys: of the setting.
        problem: what is wrong and what to do, after the name of the setting.
    """

    keys: KeyPath
    problem: str


class EnvironmentValues:
    """The replacement of references in one configuration.

    Args:
        environment: the variables.

    Attributes:
        variables: the names of the variables in each setting that has any, by its keys.
        problems: the references that cannot be replaced.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self.variables: dict[KeyPath, tuple[str, ...]] = {}
        self.problems: list[BadReference] = []

    def replace(self, value: Any, keys: KeyPath = ()) -> Any:
        """Return a value of a document with its references replaced; tables and lists are copied."""
        if isinstance(value, dict):
            return {key: self.replace(part, (*keys, key)) for key, part in value.items()}
        if isinstance(value, list):
            return [self.replace(part, (*keys, index)) for index, part in enumerate(value)]
        if not isinstance(value, str) or "$" not in value:
            return value
        return "".join(self._parts(value, keys))

    def of(self, keys: KeyPath) -> tuple[str, ...]:
        """Return the variables in a setting, or in a table or a list at these keys."""
        return tuple(
            name
            for path, names in self.variables.items()
            if path[: len(keys)] == keys or keys[: len(path)] == path
            for name in names
        )

    def _parts(self, text: str, keys: KeyPath) -> Iterator[str]:
        end = 0
        for reference in _REFERENCE.finditer(text):
            yield text[end : reference.start()]
            end = reference.end()
            yield "$" if reference["dollar"] else self._value(reference, keys)
        yield text[end:]

    def _value(self, reference: re.Match[str], keys: KeyPath) -> str:
        if keys and f"{keys[-1]}".endswith(_NAMES_VARIABLE):  # whose value would be shown where its name is
            problem = "takes the name of an environment variable, not its value: write the name alone, without ${}"
            self.problems.append(BadReference(keys, problem))
            return ""
        inner = _INNER.fullmatch(reference["inner"])
        if inner is None or not reference["end"] or "${" in (inner["default"] or ""):
            problem = "has a '${' that begins neither ${NAME} nor ${NAME:-default}; write $$ for a dollar sign"
            self.problems.append(BadReference(keys, problem))
            return ""
        name, default = inner["name"], inner["default"]
        self.variables[keys] = (*self.variables.get(keys, ()), name)
        value = self._environment.get(name)
        if value is None and default is None:
            problem = f"needs the environment variable {name}, which is not set; set it, or write ${{{name}:-default}}"
            self.problems.append(BadReference(keys, problem))
            return ""
        return value or "" if default is None else value or default
