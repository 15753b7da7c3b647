"""A request as the deployment that it goes to takes it: with the model's name there, and the key of the gateway."""

from __future__ import annotations

import msgspec

from forebay.errors import ForebayError
from forebay.gateway.callers.caller import check_one_credential
from forebay.gateway.connections.request_headers import RequestHeaders
from forebay.gateway.forwarded_call import IncomingRequest
from forebay.gateway.targets.deployments import ChosenDeployment
from forebay.gateway.targets.provider_key import ProviderKey, without_account, without_query_keys
from forebay.gateway.targets.targets import Destination
from forebay.upstream.providers import path_with_model, with_model


class NotRewritable(ForebayError, ValueError):
    """The model {model!r} is an alias, which can only be replaced in a plain JSON object: send one as the body."""


def without_compression(request: IncomingRequest) -> IncomingRequest:
    """Return a request whose response is not compressed."""
    raw = tuple(pair for pair in request.headers.raw if pair[0].lower() != b"accept-encoding")
    return msgspec.structs.replace(request, headers=RequestHeaders(raw))


def rewrite_request(
    request: IncomingRequest, destination: Destination, chosen: ChosenDeployment
) -> tuple[IncomingRequest, Destination]:
    """Return a request as a deployment takes it, and where it goes.

    Args:
        request: as it was received.
        destination: by its path.
        chosen: the deployment.

    Raises:
        NotRewritable: its body cannot be changed.
        InvalidHeader: it has two API keys, and it is not known which one its provider reads.
    """
    target, path = chosen.deployment.target, destination.path
    if chosen.model != chosen.called:
        assert chosen.model is not None  # noqa: S101 - a call without a model has no other
        body = with_model(request.body, chosen.model)
        if body is None:
            raise NotRewritable(model=chosen.called)
        path = path_with_model(path, chosen.model)
        request = msgspec.structs.replace(request, body=body)
    if chosen.takes_own_key:
        api_key = "" if target.settings.share_keys else None
        if api_key is None:
            check_one_credential(request.headers.by_name, path, target.upstream.core.profile.provider)
        request = msgspec.structs.replace(request, caller=msgspec.structs.replace(request.caller, api_key=api_key))
    else:
        path = without_query_keys(path)
        request = _with_held_key(request, chosen.deployment.key, path)
    return request, destination._replace(target=target, path=path)


def _with_held_key(request: IncomingRequest, key: ProviderKey | None, path: str) -> IncomingRequest:
    """Return a request with a key of the gateway, or with none, instead of what its caller sent."""
    received = request.headers.raw
    raw = without_account(received) if key is None else key.replace_credentials(received, path)
    return msgspec.structs.replace(
        request,
        headers=RequestHeaders(raw),
        caller=msgspec.structs.replace(request.caller, api_key=None, key_is_held=True),
    )
