"""Secrets: the gateway's token and API keys, read from the environment or a file, never from the configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from forebay.errors import ForebayError

_KEY: Final = re.compile(r"[!-~]{1,4096}")
_TOKEN: Final = re.compile(r"[!-~]{16,4096}")  # a header carries it unchanged; a shorter one could be guessed


class InvalidSecret(ForebayError, ValueError):
    """The token that callers present cannot be read from {where}: {problem}. To make one: openssl rand -hex 32."""


class MissingFallbackKey(ForebayError, LookupError):
    """The API key of a fallback is missing: set the environment variable {variable}, which is empty or not set."""

    variable: str


class InvalidProviderKey(ForebayError, ValueError):
    """The API key of target {target!r} cannot be read from {where}: {problem}."""


def read_token(variable: str | None, file: str | None, environment: Mapping[str, str]) -> str:
    """Return the token in an environment variable or, if that is None, in a file; surrounding spaces are ignored.

    Raises:
        InvalidSecret: it is missing, or not fit to be a token.
    """
    where, token, problem = _read(variable, file, environment)
    if problem:
        raise InvalidSecret(where=where, problem=problem)
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


def read_provider_key(target: str, variable: str | None, file: str | None, environment: Mapping[str, str]) -> str:
    """Return the API key of a target, in an environment variable or, if that is None, in a file.

    Raises:
        InvalidProviderKey: it is missing, or a header cannot carry it.
    """
    where, key, problem = _read(variable, file, environment)
    if not problem and not _KEY.fullmatch(key):
        problem = "it must be the key alone: printable characters of ASCII without spaces"
    if problem:
        raise InvalidProviderKey(target=target, where=where, problem=problem)
    return key


def _read(variable: str | None, file: str | None, environment: Mapping[str, str]) -> tuple[str, str, str]:
    """Return where a secret is, the secret without surrounding spaces, and why it cannot be read, or nothing."""
    if variable is not None:
        where, text, problem = f"the environment variable {variable}", environment.get(variable, ""), ""
        empty = "it is empty or not set; set it where the gateway is started"
    else:
        where, (text, problem) = f"the file {file}", _read_file(str(file))
        empty = "it is empty; write the secret into it, and nothing else"
    secret = text.strip()
    return where, secret, problem or ("" if secret else empty)


def _read_file(file: str) -> tuple[str, str]:
    """Return the text of a file, and why it cannot be read, or nothing."""
    try:
        return Path(file).read_text(encoding="utf-8"), ""
    except OSError as error:
        return "", f"{error.strerror}"
    except ValueError:
        return "", "it is not UTF-8 text"
