"""The API key of a request: which header holds it, and what of its text is the key."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Final

CREDENTIAL_HEADERS: Final = ("authorization", "x-api-key", "api-key", "x-goog-api-key", "ocp-apim-subscription-key")
"""The headers that hold an API key. Most providers read the first; Anthropic, Azure and Google read their own."""

_FIRST: Final = {
    "anthropic": ("x-api-key", *CREDENTIAL_HEADERS),
    "azure": ("api-key", "ocp-apim-subscription-key", *CREDENTIAL_HEADERS),
}
_KNOWN: Final = ("openai", "anthropic", "azure")  # the others can be any server, or stand behind one
_QUERY_KEY: Final = re.compile(r"[?&](key|api-key|subscription-key)=", re.IGNORECASE)


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


def find_other_credential(headers: Mapping[str, str], path: str, *, provider: str) -> str:
    """Return where another API key stands than `read_credential` returns; empty if there is none that may count.

    Args:
        headers: of the request, by lower-case name.
        path: of its URL, with the query.
        provider: whose API it calls. Of some it is known which header they read; then another one does not matter.
    """
    key = normalize_credential(read_credential(headers, provider=provider))
    if key and (found := _QUERY_KEY.search(path)) and provider not in ("openai", "anthropic"):
        return f"the query's {found[1]}"
    if provider in _KNOWN:
        return ""
    return next((name for name in CREDENTIAL_HEADERS if normalize_credential(headers.get(name, key)) != key), "")


def digest_credential(credential: str) -> str:
    """Return what identifies the key in a header, without showing it; empty if there is none."""
    normal = normalize_credential(credential)
    return hashlib.sha256(normal.encode()).hexdigest() if normal else ""  # all of it: short ones can be made equal


def normalize_credential(credential: str) -> str:
    """Return the key in a header, so that every spelling of it is the same account: without ``Bearer`` and spaces."""
    scheme, _, key = " ".join(credential.split()).partition(" ")
    if scheme.lower() == "bearer":
        return key
    return f"{scheme.lower()} {key}" if key else scheme
