"""The list of models (``/v1/models``): the aliases of the gateway, and what its provider lists."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import unquote

import msgspec

from forebay.gateway.error_responses import JSON, ApiProtocol, GatewayResponse

_PATH: Final = re.compile(r"/v1/models(?:/(?P<model>.+))?")
_PAGES: Final = ("after_id=", "before_id=")  # of Anthropic's list: another page than the first
_OK: Final = 200
_NO_LIST: Final = (404, 405, 501)  # statuses of a provider that lists no models
_object: Final = msgspec.json.Decoder(dict[str, Any])


def is_model_list(method: str, path: str) -> bool:
    """Return whether a request asks for the first page of the list of models."""
    resource, _, query = path.partition("?")
    return method == "GET" and resource == "/v1/models" and not any(page in query for page in _PAGES)


def model_in_path(method: str, path: str) -> str | None:
    """Return the model that a request asks about (``GET /v1/models/NAME``); None if it does not."""
    found = _PATH.fullmatch(path.partition("?")[0]) if method == "GET" else None
    return None if found is None or found["model"] is None else unquote(found["model"])


def describe_model(name: str, protocol: ApiProtocol) -> dict[str, Any]:
    """Return the entry of an alias, in the shape of a protocol."""
    if protocol == "anthropic":
        return {"type": "model", "id": name, "display_name": name, "created_at": "1970-01-01T00:00:00Z"}
    return {"id": name, "object": "model", "created": 0, "owned_by": "forebay"}


def model_response(name: str, protocol: ApiProtocol) -> GatewayResponse:
    """Return the response to a request for one alias."""
    return GatewayResponse(_OK, (("content-type", JSON),), msgspec.json.encode(describe_model(name, protocol)))


def with_aliases(
    answer: GatewayResponse, aliases: Mapping[str, ApiProtocol | None], protocol: ApiProtocol
) -> GatewayResponse:
    """Return a provider's list of models with the aliases before its own; the aliases alone if it lists none.

    An error passes as it is, and so does what is no list.

    Args:
        answer: of the provider.
        aliases: the protocol of each; None for either.
        protocol: of the request.
    """
    own = [describe_model(name, protocol) for name, spoken in aliases.items() if spoken in (None, protocol)]
    if answer.status in _NO_LIST:
        listed: dict[str, Any] = {"data": own, "has_more": False}
        if protocol == "openai":
            listed = {"object": "list", "data": own}
        return GatewayResponse(_OK, (("content-type", JSON),), msgspec.json.encode(listed))
    if answer.status != _OK:
        return answer
    try:
        listed = _object.decode(answer.body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return answer
    models = listed.get("data")
    if not isinstance(models, list):
        return answer
    hidden = {entry["id"] for entry in own}
    rest = [model for model in models if not (isinstance(model, dict) and model.get("id") in hidden)]
    return msgspec.structs.replace(answer, body=msgspec.json.encode({**listed, "data": [*own, *rest]}))
