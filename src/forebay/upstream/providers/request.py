"""A reader of provider requests: endpoint, model, estimated tokens, how its price is found. No input makes it raise."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from operator import attrgetter
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec

from forebay.upstream.providers.endpoints import Billing, Endpoint, EndpointRule, find_rule
from forebay.upstream.providers.estimate import estimate_tokens
from forebay.upstream.providers.http_headers import SIGNATURE_HEADERS, normalize_headers
from forebay.upstream.providers.json_text import replace_lone_surrogates

_MAX_TOKENS: Final = 10**9  # a larger bound is ignored
_MAX_CHOICES: Final = 128  # as at OpenAI
_MAX_DIGITS: Final = 20  # of a number of choices
_MAX_MODEL: Final = 256  # characters
_MAX_SHOWN: Final = 50  # characters of a header in a message
_DEARER: Final = ("priority", "fast")  # service tiers; the others cost no more than the usual one
_MINI_IMAGE: Final = 25_501  # tokens of an image on gpt-4o-mini: 2,833 and 5,667 a tile (OpenAI, "Images and vision")
_SEARCH_MODEL: Final = re.compile(r"-search-")  # each call of such a model searches the web
_PRESET: Final = "@preset/"  # in a model's name: settings that OpenRouter keeps, see `_BILLED_APART`
_ONLINE: Final = ":online"  # in a model's name: OpenRouter's plugin that searches the web
_MAX_ALTERNATIVES: Final = 20  # models that a request names besides its own
_NUMBER: Final = (int, float)  # `int | float` would be built at each check

_MODELS: Final = re.compile(r"/models(?:/[^/]+)?$")
_READ_OR_DELETE: Final = frozenset({"GET", "HEAD", "OPTIONS", "DELETE"})
_DEPLOYMENT: Final = re.compile(r"/deployments/([^/]+)/", re.IGNORECASE)  # Azure names the model in the path
_RESPONSE: Final = re.compile(r"/responses/([^/]+)(?:/cancel)?$")
_OVERRIDES: Final = frozenset({"x-http-method-override", "x-http-method", "x-method-override"})  # of a lenient server
_UNCHANGED: Final = frozenset({"", "identity"})  # codings of a body that leave it as it is
_CHARSETS: Final = ("charset=utf-8", "charset=utf8", "charset=us-ascii", 'charset="utf-8"')

_SIGNATURES: Final = ("AWS4-", "Signature ")  # prefixes of an Authorization header that is a signature
_UNUSUAL: Final = SIGNATURE_HEADERS | _OVERRIDES | {"upgrade", "sec-websocket-key", "content-encoding"}

_TRUE: Final = frozenset({"true", "t", "yes", "y", "on", "1", "1.0"})  # to a server that reads JSON as Pydantic does
_NOTHING: Final = msgspec.Raw()
_ABSENT: Final = (_NOTHING, msgspec.Raw(b"null"))


class ProviderRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of a request to a provider that Forebay reads.

    Attributes:
        endpoint: of the provider's API.
        model: or None if the request names none.
        stream: whether it asks for a stream of events.
        input_tokens: estimated.
        max_output_tokens: its bound for each choice, hidden reasoning included, or None.
        choices: how many completions it asks for, of all its prompts together.
        include_usage: whether it asks for the usage at the end of an OpenAI stream.
        websocket: whether it opens a WebSocket, whose content cannot be metered.
        signed: whether it is signed or compressed, so that it must not be changed.
        read_or_delete: whether its method is GET, HEAD, OPTIONS or DELETE.
        api_version: Azure's date (``2024-10-21``), or None.
        billing: how its price is found.
        billing_reason: why that way.
        unreadable: why its body cannot be read, though its endpoint needs a JSON object; empty if it can be.
        tier: the service tier or speed that it asks for: ``"priority"``, ``"fast"``, ``"flex"``...; empty for the usual
            one.
        background: whether its answer comes later, by another request.
        response_id: of the response that it fetches or cancels, or None.
        characters: of the text that it asks to be spoken.
        searches: searches of the web that it makes without a tool.
        asks_for_audio: whether it asks for sound.
        previous_response_id: of the stored response that it continues, or None.
        conversation: whether it continues a conversation that the provider stores.
        alternatives: models that may answer instead of its own (OpenRouter's ``models``).
        billed_apart: a field of it whose cost no usage tells, such as ``"plugins"``; empty if it has none.
        regional: whether it asks to be computed in the US, which is dearer at Anthropic.
        content: all that becomes input, as JSON: messages, system prompt, tools...
        tools: as JSON, or empty.
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
    billing: Billing = Billing.UNPRICED
    billing_reason: str = ""
    unreadable: str = ""
    tier: str = ""
    background: bool = False
    response_id: str | None = None
    characters: int = 0
    searches: int = 0
    asks_for_audio: bool = False
    previous_response_id: str | None = None
    conversation: bool = False
    alternatives: tuple[str, ...] = ()
    billed_apart: str = ""
    regional: bool = False
    content: tuple[msgspec.Raw, ...] = ()
    tools: msgspec.Raw = _NOTHING

    @property
    def free(self) -> bool:
        """True if it costs no money: it lists models, fetches, deletes, or counts tokens."""
        return self.billing is Billing.FREE

    @property
    def generates_tokens(self) -> bool:
        """True if a model generates tokens for it."""
        return self.endpoint in _GENERATING


_GENERATING: Final = frozenset({Endpoint.CHAT, Endpoint.COMPLETIONS, Endpoint.RESPONSES, Endpoint.MESSAGES})
_GENERATED: Final = (Billing.USAGE, Billing.CHARACTERS)
_NEEDS_JSON: Final = _GENERATING | {Endpoint.EMBEDDINGS, Endpoint.IMAGES, Endpoint.SPEECH}


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
    service_tier: Any = None
    speed: Any = None
    background: Any = None
    modalities: Any = None
    previous_response_id: Any = None
    conversation: Any = None
    models: Any = None
    plugins: Any = None
    fallbacks: Any = None
    search_parameters: Any = None
    preset: Any = None
    inference_geo: Any = None
    web_search_options: msgspec.Raw = _NOTHING
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


READ_FIELDS: Final = frozenset(_RequestBody.__struct_fields__)
"""The names of the fields that are read."""
_BILLED_APART: Final = ("plugins", "fallbacks", "search_parameters", "preset")
_PROMPT_BEGINS: Final = (b'"', b"[")
_BOUNDS: Final = {  # one that the endpoint does not know bounds nothing
    Endpoint.CHAT: ("max_completion_tokens", "max_tokens"),
    Endpoint.COMPLETIONS: ("max_tokens",),
    Endpoint.RESPONSES: ("max_output_tokens",),
    Endpoint.MESSAGES: ("max_tokens",),
}
# By C, where a loop over the fields takes longer than it takes to decode a short body.
_input_of: Final = attrgetter(*_RequestBody.__struct_fields__[_RequestBody.__struct_fields__.index("messages") :])
_apart_of: Final = attrgetter(*_BILLED_APART)
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
    reads, endpoint, billing, reason = line.read_or_delete, line.endpoint, line.billing, line.billing_reason
    if reads and body and line.rule.billing in _GENERATED:  # a lenient server may take it for a POST
        reads, endpoint, billing, reason = False, line.rule.endpoint, line.rule.billing, line.rule.reason
    if not _UNUSUAL.isdisjoint(values):  # one check for headers that nearly no request has
        websocket, signed = websocket or _opens_websocket(values), signed or _is_signed(values)
        if not _OVERRIDES.isdisjoint(values):
            billing, reason = Billing.UNPRICED, "a header says that its method is another one"
    elif values.get("authorization", "").startswith(_SIGNATURES):
        signed = True
    read, unreadable = (None, "") if reads else _read_body(values, body)
    if websocket:
        billing, reason = Billing.UNPRICED, "the content of a WebSocket cannot be metered"
    if read is None or (endpoint is Endpoint.OTHER and billing is Billing.FREE):
        return ProviderRequest(
            endpoint=endpoint,
            model=line.model,
            websocket=websocket,
            signed=signed,
            read_or_delete=reads,
            billing=billing,
            billing_reason=reason,
            unreadable=unreadable if endpoint in _NEEDS_JSON or "Content-Encoding" in unreadable else "",
            response_id=line.response_id,
        )
    if endpoint is Endpoint.OTHER:
        return ProviderRequest(
            endpoint=endpoint,
            model=line.model or _name(read.model),
            websocket=websocket,
            signed=signed,
            billing=billing,
            billing_reason=reason,
        )
    content: tuple[msgspec.Raw, ...] = tuple(filter(None, _input_of(read)))
    alternatives = () if read.models is None else _names(read.models)
    choices = 1
    if read.n is not None or read.best_of is not None:
        choices = min(_MAX_CHOICES, max(_count(read.n), _count(read.best_of)))
    if endpoint is Endpoint.COMPLETIONS:
        choices *= _count_prompts(bytes(read.prompt))
    # The deployment in Azure's path is what answers, whatever the body says.
    options, model = read.stream_options, line.model or _name(read.model) or next(iter(alternatives), None)
    previous = read.previous_response_id
    traits = _traits_of(model, alternatives)
    return ProviderRequest(
        endpoint=endpoint,
        model=model,
        stream=read.stream is not None and _is_true(read.stream),
        input_tokens=estimate_tokens(
            map(bytes, content),
            bytes_per_token=bytes_per_token,
            image_tokens=_MINI_IMAGE if model is not None and "gpt-4o-mini" in model else image_tokens,
        ),
        max_output_tokens=_output_bound(read, endpoint),
        choices=choices,
        include_usage=isinstance(options, dict) and options.get("include_usage") is True,
        websocket=websocket,
        signed=signed,
        api_version=line.api_version,
        billing=billing,
        billing_reason=reason,
        tier="fast" if read.speed == "fast" else read.service_tier if read.service_tier in _DEARER else "",
        background=read.background is not None and _is_true(read.background),
        characters=_spoken(read.input) if endpoint is Endpoint.SPEECH else 0,
        searches=int(traits.searches or read.web_search_options not in _ABSENT),
        asks_for_audio=isinstance(read.modalities, list) and "audio" in read.modalities,
        previous_response_id=previous if isinstance(previous, str) else None,
        conversation=read.conversation is not None,
        alternatives=alternatives,
        billed_apart=traits.billed_apart or _billed_apart(read, endpoint),
        regional=read.inference_geo == "us",
        content=content,
        tools=read.tools,
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
        billing: see `ProviderRequest`.
        billing_reason: see `ProviderRequest`.
        response_id: see `ProviderRequest`.
        rule: of its path, for any method.
    """

    endpoint: Endpoint
    model: str | None
    websocket: bool
    signed: bool
    read_or_delete: bool
    api_version: str | None
    billing: Billing
    billing_reason: str
    response_id: str | None
    rule: EndpointRule


@lru_cache(maxsize=256)  # calls go to a few paths, and parsing one takes several microseconds
def _read_request_line(method: str, path: str) -> _RequestLine:
    resource, query = _split(path)
    deployment = _DEPLOYMENT.search(resource)
    versions = query.get("api-version")
    reads = method.upper() in _READ_OR_DELETE
    rule = find_rule(resource)
    endpoint, billing, reason = rule.endpoint, rule.billing, rule.reason
    if reads:
        models = method.upper() == "GET" and _MODELS.search(resource)
        endpoint, billing, reason = Endpoint.MODELS if models else Endpoint.OTHER, Billing.FREE, "it reads or deletes"
    response = _RESPONSE.search(resource)
    return _RequestLine(
        endpoint=endpoint,
        model=unquote(deployment[1]) if deployment else None,
        websocket=path.startswith(("ws://", "wss://")) or resource.endswith("/realtime"),
        signed="X-Amz-Signature" in query,
        read_or_delete=reads,
        api_version=versions[0] if versions else None,
        billing=billing,
        billing_reason=reason,
        response_id=unquote(response[1]) if response and endpoint is Endpoint.OTHER else None,
        rule=rule,
    )


def _split(path: str) -> tuple[str, dict[str, list[str]]]:
    try:
        parts = urlsplit(path)
        return parts.path.rstrip("/"), parse_qs(parts.query, max_num_fields=100) if parts.query else {}
    except ValueError:
        return "", {}


def _opens_websocket(headers: Mapping[str, str]) -> bool:
    return "websocket" in headers.get("upgrade", "").lower() or "sec-websocket-key" in headers


def _is_signed(headers: Mapping[str, str]) -> bool:
    if headers.get("authorization", "").startswith(_SIGNATURES):
        return True
    return _coding(headers) not in _UNCHANGED or not SIGNATURE_HEADERS.isdisjoint(headers)


def _coding(headers: Mapping[str, str]) -> str:
    return headers.get("content-encoding", "").lower()


def _read_body(headers: Mapping[str, str], body: bytes) -> tuple[_RequestBody | None, str]:
    """Return the body if it is a JSON object, whatever its type says; else None, and why it cannot be read."""
    if "content-encoding" in headers and (coding := _coding(headers)) not in _UNCHANGED:
        return None, f"its body has the Content-Encoding {coding[:_MAX_SHOWN]!r}: send it as it is"
    content_type = headers.get("content-type", "").lower()
    if "charset" in content_type and not any(charset in content_type for charset in _CHARSETS):
        return None, "its body is not in UTF-8: encode it so"
    for text in (body, replace_lone_surrogates(body)):
        try:
            return _decoder.decode(text), ""
        except (msgspec.MsgspecError, ValueError, RecursionError):
            continue
    return None, "its body is not a JSON object in UTF-8: send it as one"


def _is_true(value: object) -> bool:
    """Return whether a lenient server may take a field for true: 1 and ``"true"`` too."""
    return value is True or str(value).lower() in _TRUE


def _spoken(text: msgspec.Raw) -> int:
    """Return the characters of a JSON string."""
    try:
        return len(msgspec.json.decode(text, type=str))
    except (msgspec.MsgspecError, ValueError):
        return 0


def _name(model: object) -> str | None:
    return model[:_MAX_MODEL] if isinstance(model, str) and model else None


class _ModelTraits(NamedTuple):
    """The parts of a model's name that change what its calls cost.

    Attributes:
        searches: each call of it searches the web.
        billed_apart: see `ProviderRequest`.
    """

    searches: bool
    billed_apart: str


@lru_cache(maxsize=1024)  # calls name a few models
def _model_traits(model: str) -> _ModelTraits:
    apart = "plugins" if _ONLINE in model else "preset" if _PRESET in model else ""
    return _ModelTraits(_SEARCH_MODEL.search(model) is not None, apart)


def _traits_of(model: str | None, alternatives: Iterable[str]) -> _ModelTraits:
    """Return the traits of a call that its model, or another one, may answer."""
    own = _model_traits(model or "")
    if not alternatives:
        return own
    searches, apart = zip(own, *map(_model_traits, alternatives), strict=True)
    return _ModelTraits(any(searches), next((name for name in ("plugins", "preset") if name in apart), ""))


def _billed_apart(body: _RequestBody, endpoint: Endpoint) -> str:
    """Return a field whose cost no usage tells; empty if there is none."""
    if endpoint is Endpoint.RESPONSES and bytes(body.prompt).startswith(b"{"):
        return "prompt"
    if not any(_apart_of(body)):
        return ""
    return next(name for name in _BILLED_APART if getattr(body, name))


def _names(models: object) -> tuple[str, ...]:
    """Return the models in a list. What is not a name, or too long a list, is an empty name, which has no price."""
    if not isinstance(models, list) or len(models) > _MAX_ALTERNATIVES:
        return ("",)
    return tuple([_name(model) or "" for model in models])


def _count_prompts(prompt: bytes) -> int:
    """Return how many prompts a legacy completion has: one for each text, or each list of token ids."""
    if not prompt.startswith(b"["):
        return 1
    try:
        parts = msgspec.json.decode(prompt, type=list[msgspec.Raw])
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return 1
    return max(1, sum(bytes(part)[:1] in _PROMPT_BEGINS for part in parts))


def _output_bound(body: _RequestBody, endpoint: Endpoint) -> int | None:
    """Return the largest bound of its output: servers do not agree on which one counts, and to some 0 means none."""
    largest: int | None = None
    for name in _BOUNDS.get(endpoint, ()):
        bound = _bound(getattr(body, name))
        if bound and (largest is None or bound > largest):
            largest = bound
    return largest


def _count(value: object) -> int:
    """Return a number of choices: at least 1. A lenient server reads it from a string, too."""
    if isinstance(value, str):
        try:
            value = float(value[:_MAX_DIGITS])
        except ValueError:
            return 1
    return _bound(value) or 1


def _bound(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, _NUMBER) or not 0 <= value <= _MAX_TOKENS:
        return None
    return int(value)
