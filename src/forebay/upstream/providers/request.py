"""What a request asks for, read off the wire. Nothing here fails, whatever comes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from functools import lru_cache
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec

from forebay.upstream.providers.estimate import estimate_tokens
from forebay.upstream.providers.http_headers import SIGNATURE_HEADERS, normalize_headers

_MOST: Final = 10**9  # tokens; more than that is no bound
_MOST_CHOICES: Final = 128  # as OpenAI has it
_LONGEST_MODEL: Final = 256  # characters
_NUMBER: Final = (int, float)  # `int | float` would be built anew each time that it is asked for


class Endpoint(Enum):
    """What is asked of a provider."""

    __hash__ = object.__hash__  # an enum hashes its name, in Python; each call looks some up

    CHAT = "chat"  # OpenAI's chat completions
    COMPLETIONS = "completions"
    RESPONSES = "responses"
    EMBEDDINGS = "embeddings"
    MESSAGES = "messages"  # Anthropic's
    COUNT_TOKENS = "count_tokens"
    MODELS = "models"
    OTHER = "other"  # counted as a request, and nothing more is known of it


_ENDINGS: Final = {
    "/chat/completions": Endpoint.CHAT,
    "/completions": Endpoint.COMPLETIONS,
    "/responses": Endpoint.RESPONSES,
    "/embeddings": Endpoint.EMBEDDINGS,
    "/messages": Endpoint.MESSAGES,
    "/messages/count_tokens": Endpoint.COUNT_TOKENS,
}
_MODELS: Final = re.compile(r"/models(?:/[^/]+)?$")
_READING: Final = frozenset({"GET", "HEAD", "OPTIONS", "DELETE"})
_ELSEWHERE: Final = re.compile(r"/(?:threads|conversations|batches|fine_tuning|evals)/")  # end alike, and are not
_DEPLOYMENT: Final = re.compile(r"/deployments/([^/]+)/")  # Azure names the model in the path

_SIGNATURES: Final = ("AWS4-", "Signature ")  # what an Authorization begins with that is one
_UNUSUAL: Final = SIGNATURE_HEADERS | {"upgrade", "sec-websocket-key", "content-encoding"}


class ProviderRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a request asks for.

    Attributes:
        route: what of.
        model: which model, or None if it does not say.
        stream: whether the answer is to come as events.
        input_tokens: an estimate.
        max_output_tokens: the bound that it sets on each answer, thinking included, or None.
        choices: how many answers it asks for.
        include_usage: whether a stream of OpenAI's is to end with its usage.
        websocket: it opens a WebSocket, of which nothing can be metered.
        signed: its bytes are signed or compressed, so nothing in them may be changed.
        reads: it only looks at what is there, or takes it away.
        api_version: as Azure dates it (``2024-10-21``), or None.
    """

    endpoint: Endpoint
    model: str | None = None
    stream: bool = False
    input_tokens: int = 0
    max_output_tokens: int | None = None
    choices: int = 1
    include_usage: bool = False
    websocket: bool = False
    signed: bool = False
    read_or_delete: bool = False
    api_version: str | None = None

    @property
    def free(self) -> bool:
        """Whether providers take no money for it: what lists models, fetches or deletes; or counts tokens."""
        return (self.read_or_delete and not self.websocket) or self.endpoint is Endpoint.COUNT_TOKENS

    @property
    def generates_tokens(self) -> bool:
        """Whether a model answers it with tokens."""
        return self.endpoint in _MAKING


_MAKING: Final = frozenset({Endpoint.CHAT, Endpoint.COMPLETIONS, Endpoint.RESPONSES, Endpoint.MESSAGES})
_NOTHING: Final = msgspec.Raw()


class _RequestBody(msgspec.Struct):
    """What is read of a body. What becomes input, of any route, stays as it is sent, and no object is made of it."""

    model: Any = None
    stream: Any = None
    stream_options: Any = None
    max_completion_tokens: Any = None
    max_tokens: Any = None
    max_output_tokens: Any = None
    n: Any = None
    best_of: Any = None
    messages: msgspec.Raw = _NOTHING  # from here on it is input
    system: msgspec.Raw = _NOTHING
    prompt: msgspec.Raw = _NOTHING
    suffix: msgspec.Raw = _NOTHING
    input: msgspec.Raw = _NOTHING
    instructions: msgspec.Raw = _NOTHING
    tools: msgspec.Raw = _NOTHING
    functions: msgspec.Raw = _NOTHING
    response_format: msgspec.Raw = _NOTHING
    text: msgspec.Raw = _NOTHING


_INPUT: Final = _RequestBody.__struct_fields__.index("messages")
_decoder: Final = msgspec.json.Decoder(_RequestBody)


def read_request(  # noqa: PLR0913 - the request's parts, and the two numbers of its provider
    method: str,
    path: str,
    headers: Mapping[str, str],
    body: bytes,
    *,
    bytes_per_token: float,
    image_tokens: int,
) -> ProviderRequest:
    """Read a request: what is unknown or garbage asks for a request and nothing else.

    Args:
        method: such as ``"POST"``.
        path: of the URL, with its query if it has one; a whole URL does too.
        headers: of the request.
        body: as it is sent.
        bytes_per_token: of text.
        image_tokens: of an image.
    """
    told = normalize_headers(headers)
    line = _read_request_line(method, path)
    websocket, signed = line.websocket, line.signed
    if not _UNUSUAL.isdisjoint(told):  # one look for what nearly no request has
        websocket, signed = websocket or _upgrades(told), signed or _is_signed(told)
    elif told.get("authorization", "").startswith(_SIGNATURES):
        signed = True
    route = line.endpoint
    read = _body(told, body) if route not in (Endpoint.MODELS, Endpoint.OTHER) else None
    if read is None:
        return ProviderRequest(
            endpoint=route, model=line.model, websocket=websocket, signed=signed, read_or_delete=line.read_or_delete
        )
    sent = map(bytes, filter(None, msgspec.structs.astuple(read)[_INPUT:]))
    choices = 1
    if read.n is not None or read.best_of is not None:
        choices = min(_MOST_CHOICES, max(1, _bound(read.n) or 1, _bound(read.best_of) or 1))
    options = read.stream_options
    return ProviderRequest(
        endpoint=route,
        model=_name(read.model) or line.model,
        stream=read.stream is True,
        input_tokens=estimate_tokens(sent, bytes_per_token=bytes_per_token, image_tokens=image_tokens),
        max_output_tokens=_first(read.max_completion_tokens, read.max_tokens, read.max_output_tokens),
        choices=choices,
        include_usage=isinstance(options, dict) and options.get("include_usage") is True,
        websocket=websocket,
        signed=signed,
        api_version=line.api_version,
    )


class _RequestLine(NamedTuple):
    """What the first line of a request says.

    Attributes:
        route: what is asked for.
        model: as Azure names it in the path, or None.
        websocket: it can be nothing else.
        signed: the signature stands in the query.
        reads: see `Request`.
        api_version: as Azure dates it, or None.
    """

    endpoint: Endpoint
    model: str | None
    websocket: bool
    signed: bool
    read_or_delete: bool
    api_version: str | None


@lru_cache(maxsize=256)  # an agent's calls go to a few paths, and taking one apart costs several microseconds
def _read_request_line(method: str, path: str) -> _RequestLine:
    where, query = _split(path)
    deployment = _DEPLOYMENT.search(where)
    versions = query.get("api-version")
    return _RequestLine(
        endpoint=_route(method, where),
        model=unquote(deployment[1]) if deployment else None,
        websocket=path.startswith(("ws://", "wss://")) or where.endswith("/realtime"),
        signed="X-Amz-Signature" in query,
        read_or_delete=method.upper() in _READING,
        api_version=versions[0] if versions else None,
    )


def _split(path: str) -> tuple[str, dict[str, list[str]]]:
    try:
        parts = urlsplit(path)
        return parts.path.rstrip("/"), parse_qs(parts.query, max_num_fields=100) if parts.query else {}
    except ValueError:
        return "", {}


def _route(method: str, path: str) -> Endpoint:
    if _ELSEWHERE.search(path):
        return Endpoint.OTHER
    if method.upper() == "POST":
        return next((route for ending, route in _ENDINGS.items() if path.endswith(ending)), Endpoint.OTHER)
    return Endpoint.MODELS if method.upper() == "GET" and _MODELS.search(path) else Endpoint.OTHER


def _upgrades(told: Mapping[str, str]) -> bool:
    return "websocket" in told.get("upgrade", "").lower() or "sec-websocket-key" in told


def _is_signed(told: Mapping[str, str]) -> bool:
    if told.get("authorization", "").startswith(_SIGNATURES):
        return True
    return "content-encoding" in told or not SIGNATURE_HEADERS.isdisjoint(told)


def _body(told: Mapping[str, str], body: bytes) -> _RequestBody | None:
    """The body, if it is a JSON object; a form (files) or anything else is None."""
    if "content-encoding" in told or told.get("content-type", "").startswith("multipart/"):
        return None
    try:
        return _decoder.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def _name(model: object) -> str | None:
    return model[:_LONGEST_MODEL] if isinstance(model, str) and model else None


def _first(*bounds: object) -> int | None:
    for told in bounds:
        if told is not None and (bound := _bound(told)) is not None:
            return bound
    return None


def _bound(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, _NUMBER) or not 0 <= value <= _MOST:
        return None
    return int(value)
