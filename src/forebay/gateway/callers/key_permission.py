"""The issued key of a request: where it stands, and what it permits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from forebay.gateway.callers.caller import TOKEN_HEADER
from forebay.gateway.callers.issued_keys import KEY_PREFIX, IssuedKey
from forebay.upstream.providers import (
    CREDENTIAL_HEADERS,
    Endpoint,
    ProviderRequest,
    find_unreadable,
    normalize_credential,
)

_HEADERS: Final = (*CREDENTIAL_HEADERS, TOKEN_HEADER)
_MAX_SHOWN: Final = 100  # characters of a model in a message
_MAX_LISTED: Final = 10  # patterns in a message
_UNSEEN_MODELS: Final = ("fallbacks", "prompt", "preset")  # fields that name models, or stand for one


def headers_with_key(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the keys that look like issued ones, by the lower-case name of the header that each stands in.

    Args:
        headers: of a request, by lower-case name.
    """
    found = {name: normalize_credential(headers[name]) for name in _HEADERS if name in headers}
    return {name: text for name, text in found.items() if text.startswith(KEY_PREFIX)}


def find_forbidden(key: IssuedKey, request: ProviderRequest, body: bytes) -> str:
    """Return why a key does not permit a request; empty if it does.

    A key for some models permits what reads, deletes or stores, and calls whose models are all known and among these.
    """
    if not key.models or request.read_or_delete or (request.endpoint is Endpoint.OTHER and request.free):
        return ""
    more = ", ..." if len(key.models) > _MAX_LISTED else ""
    allowed = f"this API key is for {', '.join(key.models[:_MAX_LISTED])}{more} only"
    if request.model is None or request.endpoint is Endpoint.OTHER:
        return f"{allowed}, and it cannot be seen which model this request uses"
    if problem := find_unreadable(request, body):
        return f"{allowed}, and {problem}"
    if request.billed_apart in _UNSEEN_MODELS:
        return f"{allowed}, and `{request.billed_apart}` may use other models: leave it out"
    for model in (request.model, *request.alternatives):
        if not key.allows_model(model):
            return f"{allowed}, not for {model[:_MAX_SHOWN]!r}"
    return ""
