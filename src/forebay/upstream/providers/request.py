"""A reader of provider requests: endpoint, model, estimated tokens. No input makes it raise."""

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

_MAX_TOKENS: Final = 10**9  # a larger bound is ignored
_MAX_CHOICES: Final = 128  # as at OpenAI
_MAX_MODEL: Final = 256  # characters
_NUMBER: Final = (int, float)  # `int | float` would be built at each check


class Endpoint(Enum):
    """An endpoint of a provider's API."""

    __hash__ = object.__hash__  # Enum hashes its name in Python, and each call looks endpoints up

    CHAT = "chat"  # OpenAI's chat completions
    COMPLETIONS = "completions"
    RESPONSES = "responses"
    EMBEDDINGS = "embeddings"
    MESSAGES = "messages"  # Anthropic's
    COUNT_TOKENS = "count_tokens"
    MODELS = "models"
    OTHER = "other"  # counted as one request; nothing more is known


_ENDINGS: Final = {
    "/chat/completions": Endpoint.CHAT,
    "/completions": Endpoint.COMPLETIONS,
    "/responses": Endpoint.RESPONSES,
    "/embeddings": Endpoint.EMBEDDINGS,
    "/messages": Endpoint.MESSAGES,
    "/messages/count_tokens": Endpoint.COUNT_TOKENS,
}
_MODELS: Final = re.compile(r"/models(?:/[^/]+)?$")
_READ_OR_DELETE: Final = frozenset({"GET", "HEAD", "OPTIONS", "DELETE"})
_NOT_GENERATION: Final = re.compile(r"/(?:threads|conversations|batches|fine_tuning|evals)/")  # with the same endings
_DEPLOYMENT: Final = re.compile(r"/deployments/([^/]+)/")  # Azure names the model in the path

_SIGNATURES: Final = ("AWS4-", "Signature ")  # prefixes of an Authorization header that is a signature
_UNUSUAL: Final = SIGNATURE_HEADERS | {"upgrade", "sec-websocket-key", "content-encoding"}


class ProviderRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of a request to a provider that Forebay reads.

    Attributes:
        endpoint: of the provider's API.
        model: or None if the request names none.
        stream: whether it asks for a stream of events.
        input_tokens: estimated.
        max_output_tokens: its bound for each choice, hidden reasoning included, or None.
        choices: how many completions it asks for.
        include_usage: whether it asks for the usage at the end of an OpenAI stream.
        websocket: whether it opens a WebSocket, whose content cannot be metered.
        signed: whether it is signed or compressed, so that it must not be changed.
        read_or_delete: whether its method is GET, HEAD, OPTIONS or DELETE.
        api_version: Azure's date (``2024-10-21``), or None.
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
        """Return whether it costs no money: it lists models, fetches, deletes, or counts tokens."""
        return (self.read_or_delete and not self.websocket) or self.endpoint is Endpoint.COUNT_TOKENS

    @property
    def generates_tokens(self) -> bool:
        """Return whether a model generates tokens for it."""
        return self.endpoint in _GENERATING


_GENERATING: Final = frozenset({Endpoint.CHAT, Endpoint.COMPLETIONS, Endpoint.RESPONSES, Endpoint.MESSAGES})
_NOTHING: Final = msgspec.Raw()


class _RequestBody(msgspec.Struct):
    """The fields read from a body. Those that become input tokens stay raw JSON, without making objects."""

    model: Any = None
    stream: Any = None
    stream_options: Any = None
    max_completion_tokens: Any = None
    max_tokens: Any = None
    max_output_tokens: Any = None
    n: Any = None
    best_of: Any = None
    messages: msgspec.Raw = _NOTHING  # the input starts here
    system: msgspec.Raw = _NOTHING
    prompt: msgspec.Raw = _NOTHING
    suffix: msgspec.Raw = _NOTHING
    input: msgspec.Raw = _NOTHING
    instructions: msgspec.Raw = _NOTHING
    tools: msgspec.Raw = _NOTHING
    functions: msgspec.Raw = _NOTHING
    response_format: msgspec.Raw = _NOTHING
    text: msgspec.Raw = _NOTHING


_FIRST_INPUT: Final = _RequestBody.__struct_fields__.index("messages")
_decoder: Final = msgspec.json.Decoder(_RequestBody)


def read_request(  # noqa: PLR0913 - the parts of a request, and two numbers of its provider
    method: str,
    path: str,
    headers: Mapping[str, str],
    body: bytes,
    *,
    bytes_per_token: float,
    image_tokens: int,
) -> ProviderRequest:
    """Read a request; one that is unknown or unreadable counts as a request and nothing more.

    Args:
        method: such as ``"POST"``.
        path: of the URL, with its query if it has one; a whole URL does too.
        headers: of the request.
        body: as it is sent.
        bytes_per_token: of text.
        image_tokens: of an image.
    """
    values = normalize_headers(headers)
    line = _read_request_line(method, path)
    websocket, signed = line.websocket, line.signed
    if not _UNUSUAL.isdisjoint(values):  # one check for headers that nearly no request has
        websocket, signed = websocket or _opens_websocket(values), signed or _is_signed(values)
    elif values.get("authorization", "").startswith(_SIGNATURES):
        signed = True
    route = line.endpoint
    read = _read_body(values, body) if route not in (Endpoint.MODELS, Endpoint.OTHER) else None
    if read is None:
        return ProviderRequest(
            endpoint=route, model=line.model, websocket=websocket, signed=signed, read_or_delete=line.read_or_delete
        )
    pieces = map(bytes, filter(None, msgspec.structs.astuple(read)[_FIRST_INPUT:]))
    choices = 1
    if read.n is not None or read.best_of is not None:
        choices = min(_MAX_CHOICES, max(1, _bound(read.n) or 1, _bound(read.best_of) or 1))
    options = read.stream_options
    return ProviderRequest(
        endpoint=route,
        model=_name(read.model) or line.model,
        stream=read.stream is True,
        input_tokens=estimate_tokens(pieces, bytes_per_token=bytes_per_token, image_tokens=image_tokens),
        max_output_tokens=_first_bound(read.max_completion_tokens, read.max_tokens, read.max_output_tokens),
        choices=choices,
        include_usage=isinstance(options, dict) and options.get("include_usage") is True,
        websocket=websocket,
        signed=signed,
        api_version=line.api_version,
    )


class _RequestLine(NamedTuple):
    """The first line of a request: its method and path.

    Attributes:
        endpoint: of the provider's API.
        model: from the path, where Azure has it, or None.
        websocket: whether the URL is that of a WebSocket.
        signed: whether the signature is in the query.
        read_or_delete: see `ProviderRequest`.
        api_version: Azure's date, or None.
    """

    endpoint: Endpoint
    model: str | None
    websocket: bool
    signed: bool
    read_or_delete: bool
    api_version: str | None


@lru_cache(maxsize=256)  # calls go to a few paths, and parsing one takes several microseconds
def _read_request_line(method: str, path: str) -> _RequestLine:
    resource, query = _split(path)
    deployment = _DEPLOYMENT.search(resource)
    versions = query.get("api-version")
    return _RequestLine(
        endpoint=_find_endpoint(method, resource),
        model=unquote(deployment[1]) if deployment else None,
        websocket=path.startswith(("ws://", "wss://")) or resource.endswith("/realtime"),
        signed="X-Amz-Signature" in query,
        read_or_delete=method.upper() in _READ_OR_DELETE,
        api_version=versions[0] if versions else None,
    )


def _split(path: str) -> tuple[str, dict[str, list[str]]]:
    try:
        parts = urlsplit(path)
        return parts.path.rstrip("/"), parse_qs(parts.query, max_num_fields=100) if parts.query else {}
    except ValueError:
        return "", {}


def _find_endpoint(method: str, path: str) -> Endpoint:
    if _NOT_GENERATION.search(path):
        return Endpoint.OTHER
    if method.upper() == "POST":
        return next((endpoint for ending, endpoint in _ENDINGS.items() if path.endswith(ending)), Endpoint.OTHER)
    return Endpoint.MODELS if method.upper() == "GET" and _MODELS.search(path) else Endpoint.OTHER


def _opens_websocket(headers: Mapping[str, str]) -> bool:
    return "websocket" in headers.get("upgrade", "").lower() or "sec-websocket-key" in headers


def _is_signed(headers: Mapping[str, str]) -> bool:
    if headers.get("authorization", "").startswith(_SIGNATURES):
        return True
    return "content-encoding" in headers or not SIGNATURE_HEADERS.isdisjoint(headers)


def _read_body(headers: Mapping[str, str], body: bytes) -> _RequestBody | None:
    """Return the body if it is a JSON object; None for a form with files, or anything else."""
    if "content-encoding" in headers or headers.get("content-type", "").startswith("multipart/"):
        return None
    try:
        return _decoder.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def _name(model: object) -> str | None:
    return model[:_MAX_MODEL] if isinstance(model, str) and model else None


def _first_bound(*values: object) -> int | None:
    for value in values:
        if value is not None and (bound := _bound(value)) is not None:
            return bound
    return None


def _bound(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, _NUMBER) or not 0 <= value <= _MAX_TOKENS:
        return None
    return int(value)
