"""A request as the deployment that it goes to takes it: with the model's name there, and the key of the gateway."""

from __future__ import annotations

from typing import Final

import msgspec

from forebay.errors import ForebayError
from forebay.gateway.caller import check_one_credential
from forebay.gateway.deployments import ChosenDeployment, Deployment
from forebay.gateway.forwarded_call import IncomingRequest
from forebay.gateway.targets import Destination, ProviderKey, Target
from forebay.upstream.call_flow import CallRunner
from forebay.upstream.fallbacks.reroute import without_secrets
from forebay.upstream.providers import CREDENTIAL_HEADERS, Endpoint, Headers, path_with_model, with_model

# What belongs to the key of the caller: with the gateway's key, the provider would refuse another organization.
_OF_OWN_KEY: Final = frozenset({*CREDENTIAL_HEADERS, "openai-organization", "openai-project", "cookie"})


class NotRewritable(ForebayError, ValueError):
    """The model {model!r} is an alias, which can only be replaced in a plain JSON object: send one as the body."""


def without_compression(request: IncomingRequest) -> IncomingRequest:
    """Return a request whose response is not compressed."""
    raw = tuple(pair for pair in request.raw_headers if pair[0].lower() != b"accept-encoding")
    headers = Headers({name: value for name, value in request.headers.items() if name != "accept-encoding"})
    return msgspec.structs.replace(request, raw_headers=raw, headers=headers)


def rewrite_request(
    request: IncomingRequest, destination: Destination, chosen: ChosenDeployment
) -> tuple[IncomingRequest, Destination, CallRunner]:
    """Return a request as a deployment takes it, where it goes, and what runs its call.

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
            check_one_credential(request.headers, path, target.upstream.core.profile.provider)
        request = msgspec.structs.replace(request, caller=msgspec.structs.replace(request.caller, api_key=api_key))
    else:
        request, path = _with_held_key(request, chosen.deployment), without_secrets(path, Endpoint.OTHER)
    return request, Destination(target, path), chosen.runner


def _with_held_key(request: IncomingRequest, deployment: Deployment) -> IncomingRequest:
    """Return a request with the key of the gateway, or with none, instead of that of its caller."""
    added = {} if deployment.key is None else _auth_headers(deployment.key, deployment.target)
    raw = [pair for pair in request.raw_headers if pair[0].decode("latin-1").lower() not in _OF_OWN_KEY]
    kept = {name: value for name, value in request.headers.items() if name not in _OF_OWN_KEY}
    return msgspec.structs.replace(
        request,
        raw_headers=(*raw, *((name.encode(), value.encode()) for name, value in added.items())),
        headers=Headers({**kept, **added}),
        caller=msgspec.structs.replace(request.caller, api_key=None, key_is_held=True),
    )


def _auth_headers(key: ProviderKey, target: Target) -> dict[str, str]:
    """Return the headers with a key of the gateway, as the provider of a target takes it."""
    if target.upstream.core.provider == "azure":
        return {"api-key": key.secret}
    if target.protocol == "anthropic":
        return {"x-api-key": key.secret}
    return {"authorization": f"Bearer {key.secret}"}
