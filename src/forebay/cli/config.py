"""The configuration of a gateway: a TOML file, and options of the command line, which override it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from forebay.cli.settings_reader import SettingsReader, SettingsSource
from forebay.cli.toml_document import InvalidConfiguration, read_document
from forebay.gateway import GatewaySettings, ModelSettings, TargetSettings, TenantSettings
from forebay.gateway.settings import STDERR, STDOUT

LIMIT_OPTIONS: Final[Mapping[str, Callable[[str], float]]] = MappingProxyType(
    {
        "rpm": int,
        "input_tpm": int,
        "output_tpm": int,
        "tpm": int,
        "max_concurrent": int,
        "budget_usd": float,
    }
)
"""The limits that options set, for all targets or for one, with the type of their values."""

_TABLES: Final = ("gateway", "targets", "models", "tenants")
_PATHS: Final = ("token_file", "access_log_to")


def load_gateway_settings(  # noqa: PLR0913 - what a configuration is made of
    file: Path | None,
    *,
    targets: Sequence[str] = (),
    limits: Mapping[str, Sequence[str]] | None = None,
    share_keys: bool | None = None,
    gateway: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] = os.environ,
) -> GatewaySettings:
    """Return the settings of a gateway from a file and from options; an option overrides the file.

    Args:
        file: a TOML file, or None.
        targets: ``NAME=URL`` each.
        limits: by the names in `LIMIT_OPTIONS`: ``NUMBER`` for all targets, ``NAME=NUMBER`` for one.
        share_keys: of all targets; None to leave it as it is.
        gateway: fields of `GatewaySettings`; None for an option that was not given.
        environment: variables to which the file may refer as ``${NAME}``.

    Raises:
        InvalidConfiguration: with every mistake that was found, each with its file and line, or its option.
    """
    source = SettingsSource(None if file is None else read_document(file), "forebay gateway", environment)
    _resolve_paths(source, file)
    for name, url in _parse_targets(targets):
        source.override(("targets", name, "url"), url, "--target")
    names = source.values.get("targets", {})
    names = names if isinstance(names, dict) else {}
    for field, texts in (limits or {}).items():
        for name, value in _parse_limits(field, texts, names):
            source.override(("targets", name, field), value, _option(field))
    for name in names if share_keys is not None else ():
        source.override(("targets", name, "share_keys"), share_keys, "--share-keys")
    for field, value in (gateway or {}).items():
        if value is not None:
            source.override(("gateway", field), value, _option(field))
    return _read(source)


def _read(source: SettingsSource) -> GatewaySettings:
    reader = SettingsReader(source)
    reader.known_keys((), source.values, _TABLES)
    targets = reader.read_named(TargetSettings, ("targets",), source.values.get("targets", {}))
    tenants = reader.read_named(TenantSettings, ("tenants",), source.values.get("tenants", {}))
    if not targets and not reader.problems:
        reader.add_problem(
            ("targets",), "there is no target: give --target NAME=URL, or a table [targets.NAME] with its url"
        )
    models = reader.read_named(ModelSettings, ("models",), _tables_of_models(source.values.get("models", {})))
    table, build = source.values.get("gateway", {}), not reader.problems
    settings = reader.read_struct(
        GatewaySettings, ("gateway",), table, build=build, targets=targets, models=models, tenants=tenants
    )
    reader.raise_problems()
    assert settings is not None  # noqa: S101 - else a problem was raised
    return settings


def _tables_of_models(models: Any) -> Any:
    """Return the table of models with a table for each that is written as a name: ``fast = "gpt-4o-mini"``."""
    if not isinstance(models, dict):
        return models
    return {alias: {"model": value} if isinstance(value, str) else value for alias, value in models.items()}


def _resolve_paths(source: SettingsSource, file: Path | None) -> None:
    """Make the paths of files, if they stand in a configuration file, relative to that file."""
    if file is None:
        return
    targets = source.values.get("targets")
    tables = [(source.values.get("gateway"), key) for key in _PATHS]
    tables += [(target, "api_key_file") for target in (targets.values() if isinstance(targets, dict) else ())]
    for table, key in tables:
        path = table.get(key) if isinstance(table, dict) else None
        if isinstance(table, dict) and isinstance(path, str) and path not in ("", STDOUT, STDERR):
            table[key] = str(file.parent / path)


def _option(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _parse_targets(texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    names = set()
    for text in texts:
        name, equals, url = text.partition("=")
        if not equals or not name or "/" in name:
            problems = "--target: it must be NAME=URL, such as openai=https://api.openai.com"
            raise InvalidConfiguration(problems=problems)
        if name in names:
            raise InvalidConfiguration(problems=f"--target: {name!r} is given twice; give each target another name")
        names.add(name)
        yield name, url


def _parse_limits(field: str, texts: Sequence[str], targets: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield each target's value of a limit; a value for one target comes after, and so overrides, one for all."""
    option = _option(field)
    for text in sorted(texts, key=lambda text: "=" in text):
        name, equals, number = text.rpartition("=")
        if equals and name not in targets:
            problems = f"{option}: there is no target {name!r}; there are {', '.join(targets) or 'none'}"
            raise InvalidConfiguration(problems=problems)
        try:
            value = LIMIT_OPTIONS[field](number)
        except ValueError:
            kind = "a whole number" if LIMIT_OPTIONS[field] is int else "a number"
            problems = f"{option}: {text!r} is not {kind} for all targets, nor NAME={kind.upper()} for one"
            raise InvalidConfiguration(problems=problems) from None
        for target in [name] if equals else targets:
            yield target, value
