"""Reasons why a request cannot be metered. They are looked for only where a budget or a quota is set."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

import msgspec

from forebay.upstream.providers.endpoints import Billing, Endpoint
from forebay.upstream.providers.json_text import replace_lone_surrogates
from forebay.upstream.providers.request import READ_FIELDS, ProviderRequest

_MAX_SHOWN: Final = 50  # characters of a tool's type in a message
_MAX_UNREAD: Final = 1 << 20  # bytes of a body besides its input whose keys are not counted
_MAX_KEYS: Final = 100_000  # of a body with more such bytes
_MAX_VALUES: Final = 1_000_000  # of an input that is searched for tools
_MAX_OBJECTS: Final = 500_000  # of a value that is searched for repeated keys object by object

# Tools that run at the caller, or whose cost is in the usage of the answer. Any other runs at the provider, which bills
# containers, images and other models apart. Sources: the tool guides of OpenAI and Anthropic.
_METERED_TOOLS: Final = re.compile(
    r"function|custom|namespace|mcp|mcp_toolset|local_shell|apply_patch|tool_search\w*|file_search|web_search\w*"
    r"|web_fetch_\w+|computer|computer_use_preview|computer_\w+|bash_\d+|text_editor_\d+|memory_\d+|browser_\w+"
)
_WEB_SEARCH: Final = b"web_search"
_TOOL: Final = b"tool"
_UNNAMED: Final = "without a type and a name"  # as some providers write tools that they run
_MORE_TOOLS: Final = re.compile(rb'"(?:additional_tools|tool_search_output|tool_definition)"')  # tools within the input
_BILLED_APART: Final = {
    "plugins": "its provider bills its plugins apart from the tokens",
    "search_parameters": "its provider bills the searches of `search_parameters` apart from the tokens",
    "fallbacks": "the attempts of its `fallbacks` are billed by the prices of other models: name one model",
    "prompt": "it names a stored prompt, whose tools and input are not seen here: send them in the request",
    "preset": "it names a preset, whose models and plugins are not seen here: send them in the request",
}
_AUDIO_PART: Final = b'"input_audio"'
_STORED: Final = re.compile(rb'"file_(?:(?:id|url)"\s*:\s*"|data"\s*:\s*"https?:)')
_VIDEO: Final = re.compile(rb'"type"\s*:\s*"(?:input_)?video(?:_url)?"')
_BY_URL: Final = re.compile(rb'"type"\s*:\s*"url"')  # of a document, or of an image, which costs less
_DOCUMENT: Final = re.compile(rb'"type"\s*:\s*"document"')
_ESCAPE: Final = b"\\u00"
_ESCAPED_LETTER: Final = re.compile(rb"\\u00[4-7]")  # no encoder writes it
_TYPE: Final = re.compile(rb'"type"\s*:\s*"([a-z0-9_]+)"')
_SCHEMA_TYPES: Final = frozenset(
    {b"function", b"custom", b"object", b"string", b"number", b"integer", b"boolean", b"array", b"null"}
)
_EXPECTED_SEARCHES: Final = 5  # of a call with a web search tool

_KEY: Final = re.compile(rb'\s*("(?:[^"\\]|\\.)*+")\s*:\s*')
_COMMA_OR_END: Final = re.compile(rb"\s*([,}])")
_fields: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])


class _Tool(msgspec.Struct):
    type: Any = None
    name: Any = None
    function: Any = None

    @property
    def kind(self) -> Any:
        """Its type; None for a function of the caller, which may have none."""
        is_named = isinstance(self.name, str) or isinstance(self.function, dict)
        return _UNNAMED if self.type is None and not is_named else self.type


_tools: Final = msgspec.json.Decoder(list[_Tool] | None)


def find_unreadable(request: ProviderRequest, body: bytes) -> str:
    """Return why a request cannot be read for certain, with what to do; empty if it can be."""
    if request.free:
        return ""
    if request.unreadable or request.endpoint is Endpoint.OTHER:
        return request.unreadable
    unread = len(body) - sum(memoryview(piece).nbytes for piece in request.content)
    if unread > _MAX_UNREAD and body.count(b'":') - body.count(b'\\":') > _MAX_KEYS:
        return f"its body has more than {_MAX_KEYS:,} keys, and many besides its messages, prompts and tools: send less"
    if _has_duplicate_keys(body):
        return (
            "its body has a key twice, in another case, in escapes or not in UTF-8: servers do not agree what it says"
        )
    return ""


def find_unpriced(request: ProviderRequest) -> str:
    """Return why the price of a request cannot be known, whatever its model; empty if it can be."""
    if request.billing is Billing.UNPRICED:
        return request.billing_reason
    if request.background and request.max_output_tokens is None:
        return "a response in the background is paid before its usage is known: give it max_output_tokens"
    if request.billed_apart:
        return _BILLED_APART[request.billed_apart]
    if request.endpoint is Endpoint.IMAGES and request.stream and request.choices > 1:
        return "a stream of several images does not report their usage together"
    return _find_unpriced_tool(request)


def expected_searches(request: ProviderRequest) -> int:
    """Return how many searches of the web a request is expected to make at its provider."""
    if not any(_WEB_SEARCH in bytes(raw) for raw in request.content):
        return request.searches
    by_tool = any(isinstance(kind, str) and kind.startswith("web_search") for kind in _tool_kinds(request) or ())
    return _EXPECTED_SEARCHES if by_tool else request.searches


class UnseenInput(NamedTuple):
    """The parts of a request whose tokens its text does not tell.

    Attributes:
        audio: whether it sends or asks for sound, whose tokens are many times as dear as those of text.
        stored: how many files, videos and conversations it refers to.
    """

    audio: bool
    stored: int


def find_unseen_input(request: ProviderRequest) -> UnseenInput:
    """Return what a request sends besides its text."""
    audio, stored = request.asks_for_audio, int(request.conversation)
    for raw in request.content:
        piece = _without_escapes(bytes(raw))
        audio = audio or _AUDIO_PART in piece
        if b'"file_' in piece:
            stored += len(_STORED.findall(piece))
        if b"video" in piece:
            stored += len(_VIDEO.findall(piece))
        if b'"document"' in piece:
            stored += min(len(_DOCUMENT.findall(piece)), len(_BY_URL.findall(piece)))
    return UnseenInput(audio, stored)


def _tool_kinds(request: ProviderRequest) -> list[Any] | None:
    """Return the types of all tools of a request, those within its input too; None if they cannot be read for sure."""
    kinds: list[Any] = []
    if tools := bytes(request.tools):
        try:
            kinds += [tool.kind for tool in _tools.decode(tools) or ()]
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return None
        unusual = _ESCAPED_LETTER.search(tools) or not _SCHEMA_TYPES.issuperset(_TYPE.findall(tools))
        if unusual and _repeats_a_key(tools):
            return None
    for raw in request.content:
        piece = bytes(raw)
        if (_TOOL in piece and _MORE_TOOLS.search(piece)) or (_ESCAPE in piece and _ESCAPED_LETTER.search(piece)):
            if piece.count(b",") + piece.count(b"[") > _MAX_VALUES or _repeats_a_key(piece):
                return None
            try:
                kinds += [tool.kind for tool in msgspec.convert(_tools_within(msgspec.json.decode(piece)), list[_Tool])]
            except (msgspec.MsgspecError, ValueError, RecursionError):
                return None
    return kinds


def _tools_within(content: object) -> list[Any]:
    """Return the tools that parts of a content define: OpenAI's ``additional_tools``, Anthropic's ``tool_addition``."""
    tools: list[Any] = []
    rest = [content]
    while rest:
        part = rest.pop()
        if isinstance(part, list):
            rest += [each for each in part if isinstance(each, list | dict)]
        elif isinstance(part, dict):
            if part.get("type") in ("additional_tools", "tool_search_output"):
                added = part.get("tools") or []
                tools += added if isinstance(added, list) else [added]
            elif part.get("type") == "tool_definition":
                tools.append(part.get("definition"))
            rest += part.values()
    return tools


def _without_escapes(text: bytes) -> bytes:
    """Return JSON without letters that are written as escapes, in which a word could hide."""
    if _ESCAPE not in text or _ESCAPED_LETTER.search(text) is None:
        return text
    try:
        return msgspec.json.encode(msgspec.json.decode(text))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return text


def _find_unpriced_tool(request: ProviderRequest) -> str:
    kinds = _tool_kinds(request)
    if kinds is None:
        return "its tools cannot be read: they are not a list, have a key twice, or have one written in escapes"
    for kind in kinds:
        if kind is not None and not (isinstance(kind, str) and _METERED_TOOLS.fullmatch(kind)):
            shown = str(kind)[:_MAX_SHOWN] if isinstance(kind, str | int | float) else type(kind).__name__
            return f"its provider bills the tool {shown!r} apart from the tokens"
    return ""


def _has_duplicate_keys(body: bytes) -> bool:
    """Return whether an object has a key twice, so that two servers may take it for two different requests."""
    body = replace_lone_surrogates(body)
    try:
        fields = _fields.decode(body)
    except ValueError:  # a key that is not UTF-8
        return True
    if not all(map(str.islower, fields)) and _mixes_cases(fields):
        return True
    return _drops_a_field(body, fields)


def _drops_a_field(body: bytes, fields: Mapping[str, bytes]) -> bool:
    """Return whether an object has more than the fields that were decoded: then one of its keys stands there twice."""
    at = body.index(b"{") + 1
    end = _COMMA_OR_END.match(body, at)
    for name, value in fields.items():
        key = _KEY.match(body, at)
        if key is None or _decode_key(key[1]) != name or not body.startswith(value, key.end()):
            return True
        end = _COMMA_OR_END.match(body, key.end() + len(value))
        if end is None:
            return True
        at = end.end()
    return end is None or end[1] != b"}"


def _decode_key(key: bytes) -> str:
    decoded: str = msgspec.json.decode(key)
    return decoded


def _mixes_cases(names: Iterable[str]) -> bool:
    """Return whether a server that ignores the case of keys, as those in Go do, takes one for another key."""
    folded = [(name, name.casefold()) for name in names]
    unusual = any(name != usual and usual in READ_FIELDS for name, usual in folded)
    return unusual or len({usual for _, usual in folded}) < len(folded)


def _repeats_a_key(text: bytes) -> bool:
    """Return whether any object has a key twice; also if that cannot be told."""
    if text.count(b"{") > _MAX_OBJECTS:
        return True
    repeated = False

    def look(pairs: list[tuple[str, Any]]) -> None:
        nonlocal repeated
        repeated = repeated or len({name for name, _ in pairs}) < len(pairs)

    try:
        json.loads(text, object_pairs_hook=look)
    except (ValueError, RecursionError):
        return True
    return repeated
