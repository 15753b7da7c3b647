"""Where the token is that callers present: never in the configuration itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from forebay.errors import ForebayError

_FIT: Final = re.compile(r"[!-~]{16,4096}")  # what a header carries as it is; shorter ones are guessed


class InvalidSecret(ForebayError, ValueError):
    """The token that callers present is not in {where}: {problem}. A good one: openssl rand -hex 32."""


class MissingFallbackKey(ForebayError, LookupError):
    """The API key of a fallback is not in the environment variable {variable}: that is empty, or not set."""

    variable: str


def read_token(variable: str | None, file: str | None, environment: Mapping[str, str]) -> str:
    """The token that is in a variable of the environment or, if None is named, in a file; blanks around it apart.

    Raises:
        InvalidSecret: it is not there, or would be no secret.
    """
    if variable is not None:
        where, text = f"the environment variable {variable}", environment.get(variable, "")
    else:
        where, text = f"the file {file}", _read(str(file))
    token = text.strip()
    if not token:
        raise InvalidSecret(where=where, problem="that is empty, or not set")
    if not _FIT.fullmatch(token):
        raise InvalidSecret(where=where, problem="what is there is no 16 to 4,096 printable characters without blanks")
    return token


def read_api_key(variable: str, environment: Mapping[str, str]) -> str:
    """An API key that is in a variable of the environment.

    Raises:
        MissingKey: it is not.
    """
    key = environment.get(variable, "").strip()
    if not key:
        raise MissingFallbackKey(variable=variable)
    return key


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise InvalidSecret(where=f"the file {file}", problem=f"{why}") from None
