"""A request for one model, made one for another: every other byte of it stays."""

from __future__ import annotations

import re
from typing import Any, Final
from urllib.parse import quote

import msgspec

_DEPLOYMENT: Final = re.compile(r"(?<=/deployments/)[^/?#]+(?=/)")  # Azure names the model in the path
_HELD: Final = ("previous_response_id", "conversation")  # of OpenAI's Responses: what the provider keeps

_decoder: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])


def with_model(body: bytes, model: str) -> bytes | None:
    """The body with that model where it names one; every other value keeps its bytes. None if it is no object."""
    fields = _fields(body)
    if fields is None:
        return None
    if "model" not in fields:
        return body
    return msgspec.json.encode({**fields, "model": model})


def path_with_model(path: str, model: str) -> str:
    """The path with that model where it names one, as Azure's does."""
    return _DEPLOYMENT.sub(lambda _: quote(model, safe=""), path, count=1)


def depends_on_stored_state(body: bytes) -> bool:
    """Whether it goes on from what its provider keeps for it, so that no other could answer it."""
    fields = _fields(body)
    return fields is not None and any(bytes(fields.get(name, b"null")) != b"null" for name in _HELD)


def _fields(body: bytes) -> dict[str, Any] | None:
    try:
        return dict(_decoder.decode(body))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
