"""A request rewritten for another model; every other byte stays."""

from __future__ import annotations

import re
from typing import Any, Final
from urllib.parse import quote

import msgspec

_DEPLOYMENT: Final = re.compile(r"(?<=/deployments/)[^/?#]+(?=/)")  # Azure names the model in the path
_STORED_STATE: Final = ("previous_response_id", "conversation")  # of OpenAI's Responses

_decoder: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])


def with_model(body: bytes, model: str) -> bytes | None:
    """Return the body with another model, if it names one; None if it is not a JSON object."""
    fields = _fields(body)
    if fields is None:
        return None
    if "model" not in fields:
        return body
    return msgspec.json.encode({**fields, "model": model})


def path_with_model(path: str, model: str) -> str:
    """Return the path with another model, if it names one, as Azure's does."""
    return _DEPLOYMENT.sub(lambda _: quote(model, safe=""), path, count=1)


def depends_on_stored_state(body: bytes) -> bool:
    """Return whether the request continues a response or conversation stored by its provider, which no other has."""
    fields = _fields(body)
    return fields is not None and any(bytes(fields.get(name, b"null")) != b"null" for name in _STORED_STATE)


def _fields(body: bytes) -> dict[str, Any] | None:
    try:
        return dict(_decoder.decode(body))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
