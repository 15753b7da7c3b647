"""The API key of a request: which header holds it, and what of its text is the key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

CREDENTIAL_HEADERS: Final = ("authorization", "x-api-key", "api-key", "x-goog-api-key")
"""The headers that hold an API key. Most providers read the first; Anthropic, Azure and Google read their own."""

_FIRST: Final = {"anthropic": ("x-api-key", *CREDENTIAL_HEADERS), "azure": ("api-key", *CREDENTIAL_HEADERS)}

_UNKNOWN: Final = ("openai-compatible", "generic")  # providers: any server


def read_credential(headers: Mapping[str, str], *, provider: str = "") -> str:
    """Return the header that a provider takes the API key of a request from; empty if there is none.

    Args:
        headers: of the request, by lower-case name.
        provider: whose API it calls; empty for one that reads ``Authorization``.
    """
    for name in _FIRST.get(provider, CREDENTIAL_HEADERS):
        if credential := headers.get(name):
            return credential
    return ""


def find_other_credential(headers: Mapping[str, str], *, provider: str) -> str:
    """Return the name of a header with another API key than `read_credential` returns; empty if there is none.

    Args:
        headers: of the request, by lower-case name.
        provider: whose API it calls. Of most it is known which header they read; then another one does not matter.
    """
    if provider not in _UNKNOWN:
        return ""
    key = normalize_credential(read_credential(headers))
    return next((name for name in CREDENTIAL_HEADERS if normalize_credential(headers.get(name, key)) != key), "")


def normalize_credential(credential: str) -> str:
    """Return the key in a header, so that every spelling of it is the same account: without ``Bearer`` and spaces."""
    scheme, _, key = " ".join(credential.split()).partition(" ")
    if scheme.lower() == "bearer":
        return key
    return f"{scheme.lower()} {key}" if key else scheme
