"""Reasons why a request cannot be metered. They are looked for only where a budget or a quota is set."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

import msgspec

from forebay.upstream.providers.endpoints import Billing, Endpoint
from forebay.upstream.providers.json_text import replace_lone_surrogates
from forebay.upstream.providers.request import READ_FIELDS, ProviderRequest

_MAX_SHOWN: Final = 50  # characters of a tool's type in a message
_MAX_UNREAD: Final = 1 << 20  # bytes of a body besides its input that are searched for repeated keys
_MAX_OBJECTS: Final = 100_000  # of a body that is searched for repeated keys object by object

# Tools that run at the caller, or whose cost is in the usage of the answer. Any other runs at the provider, which bills
# containers, images and other models apart. Sources: the tool guides of OpenAI and Anthropic.
_METERED_TOOLS: Final = re.compile(
    r"function|custom|namespace|mcp|mcp_toolset|local_shell|apply_patch|tool_search\w*|file_search|web_search\w*"
    r"|web_fetch_\w+|computer|computer_use_preview|computer_\w+|bash_\d+|text_editor_\d+|memory_\d+|browser_\w+"
)
_SEARCH_TOOL: Final = re.compile(rb'"type"\s*:\s*"web_search')
_AUDIO_PART: Final = b'"input_audio"'
_STORED: Final = re.compile(rb'"file_(?:id|url)"\s*:\s*"')
_BY_URL: Final = re.compile(rb'"type"\s*:\s*"url"')  # of a document, or of an image, which costs less
_DOCUMENT: Final = re.compile(rb'"type"\s*:\s*"document"')
_ESCAPE: Final = b"\\u00"
_ESCAPED_LETTER: Final = re.compile(rb"\\u00[4-7]")  # no encoder writes it
_TYPE: Final = re.compile(rb'"type"\s*:\s*"([a-z0-9_]+)"')
_SCHEMA_TYPES: Final = frozenset(
    {b"function", b"custom", b"object", b"string", b"number", b"integer", b"boolean", b"array", b"null"}
)
_EXPECTED_SEARCHES: Final = 5  # of a call with a web search tool

_fields: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])


class _Tool(msgspec.Struct):
    type: Any = None


_tools: Final = msgspec.json.Decoder(list[_Tool])


def find_unreadable(request: ProviderRequest, body: bytes) -> str:
    """Return why a request cannot be read for certain, with what to do; empty if it can be."""
    if request.free:
        return ""
    if request.unreadable or request.endpoint is Endpoint.OTHER:
        return request.unreadable
    if len(body) - request.input_size > _MAX_UNREAD:
        return f"its body has more than {_MAX_UNREAD:,} bytes besides its messages, prompts and tools: send less"
    if _has_duplicate_keys(body):
        return (
            "its body has a key twice, in another case, or written in escapes: servers do not agree on what that means"
        )
    return ""


def find_unpriced(request: ProviderRequest) -> str:
    """Return why the price of a request cannot be known, whatever its model; empty if it can be."""
    if request.billing is Billing.UNPRICED:
        return request.billing_reason
    if request.background and request.max_output_tokens is None:
        return "a response in the background is paid before its usage is known: give it max_output_tokens"
    if request.plugins:
        return "its provider bills its plugins apart from the tokens"
    if request.stored_prompt:
        return "it names a stored prompt, whose tools and input are not told: send them in the request"
    if request.endpoint is Endpoint.IMAGES and request.stream and request.choices > 1:
        return "a stream of several images does not report their usage together"
    return _find_unpriced_tool(bytes(request.tools)) if request.tools else ""


def expected_searches(request: ProviderRequest) -> int:
    """Return how many searches of the web a request is expected to make at its provider."""
    by_tool = bool(request.tools) and _SEARCH_TOOL.search(bytes(request.tools)) is not None
    return _EXPECTED_SEARCHES if by_tool else request.searches


class UnseenInput(NamedTuple):
    """The parts of a request whose tokens its text does not tell.

    Attributes:
        audio: whether it sends or asks for sound, whose tokens are many times as dear as those of text.
        stored: how many files and conversations it refers to.
    """

    audio: bool
    stored: int


def find_unseen_input(request: ProviderRequest) -> UnseenInput:
    """Return what a request sends besides its text."""
    content = _without_escapes(bytes(request.content)) if request.content else b""
    stored = len(_STORED.findall(content)) if b'"file_' in content else 0
    if b'"document"' in content:
        stored += min(len(_DOCUMENT.findall(content)), len(_BY_URL.findall(content)))
    return UnseenInput(request.asks_for_audio or _AUDIO_PART in content, stored + request.conversation)


def _without_escapes(text: bytes) -> bytes:
    """Return JSON without letters that are written as escapes, in which a word could hide."""
    if _ESCAPE not in text or _ESCAPED_LETTER.search(text) is None:
        return text
    try:
        return msgspec.json.encode(msgspec.json.decode(text))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return text


def _find_unpriced_tool(tools: bytes) -> str:
    if tools == b"null":
        return ""
    try:
        kinds = [tool.type for tool in _tools.decode(tools)]
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return "its tools cannot be read"
    for kind in kinds:
        if kind is not None and not (isinstance(kind, str) and _METERED_TOOLS.fullmatch(kind)):
            return f"its provider bills the tool {str(kind)[:_MAX_SHOWN]!r} apart from the tokens"
    unusual = _ESCAPED_LETTER.search(tools) or not _SCHEMA_TYPES.issuperset(_TYPE.findall(tools))
    if unusual and _repeats_a_key(tools, everywhere=True):
        return "its tools have a key twice, or written in escapes"
    return ""


def _has_duplicate_keys(body: bytes) -> bool:
    """Return whether an object has a key twice, so that two servers may take it for two different requests."""
    body = replace_lone_surrogates(body)
    fields = _fields.decode(body)
    if not all(map(str.islower, fields)) and _mixes_cases(fields):
        return True
    pairs = [(b'"%b"' % name.encode("utf-8", "replace"), bytes(value)) for name, value in fields.items()]
    if body in (
        b"{" + b",".join([b"%b:%b" % pair for pair in pairs]) + b"}",
        b"{" + b", ".join([b"%b: %b" % pair for pair in pairs]) + b"}",
    ):
        return False  # nothing was dropped: as nearly all encoders write it
    return _repeats_a_key(body, everywhere=False)


def _mixes_cases(names: Iterable[str]) -> bool:
    """Return whether a server that ignores the case of keys, as those in Go do, takes one for another key."""
    folded = [(name, name.casefold()) for name in names]
    unusual = any(name != usual and usual in READ_FIELDS for name, usual in folded)
    return unusual or len({usual for _, usual in folded}) < len(folded)


def _repeats_a_key(text: bytes, *, everywhere: bool) -> bool:
    """Return whether the outermost object has a key twice, or any object `everywhere`; also if that cannot be told."""
    if text.count(b"{") > _MAX_OBJECTS:
        return True
    repeated = outermost = False

    def look(pairs: list[tuple[str, Any]]) -> None:
        nonlocal repeated, outermost
        outermost = len({name for name, _ in pairs}) < len(pairs)
        repeated = repeated or outermost

    try:
        json.loads(text, object_pairs_hook=look)
    except (ValueError, RecursionError):
        return True
    return repeated if everywhere else outermost
