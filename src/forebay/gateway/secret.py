"""Secrets: the gateway's token and API keys, read from the environment or a file, never from the configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from forebay.errors import ForebayError

_TOKEN: Final = re.compile(r"[!-~]{16,4096}")  # a header carries it unchanged; a shorter one could be guessed
_KEY: Final = re.compile(r"[!-~]+")


class InvalidSecret(ForebayError, ValueError):
    """The token that callers present cannot be read from {where}: {problem}. To make one: openssl rand -hex 32."""


class MissingFallbackKey(ForebayError, LookupError):
    """The API key of a fallback is missing: set the environment variable {variable}, which is empty or not set."""

    variable: str


class MissingProviderKey(ForebayError, LookupError):
    """An API key of the target {target} is missing: set the environment variable {variable}, empty or not set now."""

    target: str
    variable: str


class InvalidProviderKey(ForebayError, ValueError):
    """The API key in the environment variable {variable} is invalid: it must be printable ASCII without spaces."""

    variable: str


def read_token(variable: str | None, file: str | None, environment: Mapping[str, str]) -> str:
    """Return the token in an environment variable or, if that is None, in a file; surrounding spaces are ignored.

    Raises:
        InvalidSecret: it is missing, or not fit to be a token.
    """
    if variable is not None:
        where, text = f"the environment variable {variable}", environment.get(variable, "")
    else:
        where, text = f"the file {file}", _read_file(str(file))
    token = text.strip()
    if not token:
        raise InvalidSecret(where=where, problem="it is empty or not set")
    if not _TOKEN.fullmatch(token):
        raise InvalidSecret(where=where, problem="it must be 16 to 4,096 printable characters without spaces")
    return token


def read_api_key(variable: str, environment: Mapping[str, str]) -> str:
    """Return the API key in an environment variable.

    Raises:
        MissingFallbackKey: it is empty or not set.
    """
    key = environment.get(variable, "").strip()
    if not key:
        raise MissingFallbackKey(variable=variable)
    return key


def read_provider_key(target: str, variable: str, environment: Mapping[str, str]) -> str:
    """Return an API key of a target, which is in an environment variable.

    Raises:
        MissingProviderKey: it is empty or not set.
        InvalidProviderKey: a header cannot carry it.
    """
    key = environment.get(variable, "").strip()
    if not key:
        raise MissingProviderKey(target=target, variable=variable)
    if not _KEY.fullmatch(key):
        raise InvalidProviderKey(variable=variable)
    return key


def _read_file(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        problem = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InvalidSecret(where=f"the file {file}", problem=f"{problem}") from None
