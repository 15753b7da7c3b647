"""The problems for which a gateway with valid settings would not start: secrets and files that are missing or wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Final

from forebay.errors import ForebayError
from forebay.gateway import GatewaySettings
from forebay.gateway.callers.key_file import parse_keys_url, read_snapshot
from forebay.gateway.secret import read_provider_key
from forebay.gateway.targets.targets import make_targets

_BUSY_TIMEOUT: Final = 0.5  # seconds that the look into the file of keys waits for a command that changes it


def find_start_problems(settings: GatewaySettings, environment: Mapping[str, str]) -> list[str]:
    """Return why a gateway would not start, with what to do; empty if it would, as far as its secrets and keys go."""
    found = [problem for check in _checks(settings, environment) if (problem := _problem_of(check)) is not None]
    if not found and (problem := _problem_of(partial(make_targets, settings, environment))) is not None:
        found = [problem]  # two keys of a target are the same, for example
    return list(dict.fromkeys(found))


def _checks(settings: GatewaySettings, environment: Mapping[str, str]) -> Iterator[Callable[[], object]]:
    """Yield functions that read, each, one of the secrets and files that a gateway reads at its start."""
    yield partial(settings.token, environment)
    if settings.keys is not None:
        yield partial(read_snapshot, parse_keys_url(settings.keys), timeout=_BUSY_TIMEOUT)
    for target in settings.targets:
        yield partial(target.api_key, environment)
        for key in target.keys:
            yield partial(read_provider_key, target.name, key.api_key_env, None, environment)
        for fallback in target.fallback:
            yield partial(fallback.api_key, environment)


def _problem_of(check: Callable[[], object]) -> str | None:
    try:
        check()
    except ForebayError as error:
        return f"{error}"
    return None
