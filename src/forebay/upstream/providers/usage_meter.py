"""The usage of a response of any provider, whole or streamed."""

from __future__ import annotations

import json
import re
from typing import Any, Final, NamedTuple

import msgspec

from forebay.upstream.providers.classify import ErrorKind, classify_stream_error
from forebay.upstream.providers.content_encoding import BodyEnd
from forebay.upstream.providers.event_stream import EventStreamParser
from forebay.upstream.providers.json_text import replace_lone_surrogates
from forebay.upstream.providers.usage import Usage, read_usage

_QUARTERS_PER_TOKEN: Final = 4  # where a provider does not count: an ASCII character is a quarter of a token
_LONG_TOKEN: Final = 8  # characters: no text has longer tokens on average
_MAX_BODY: Final = 1 << 25  # bytes of a body that are decoded
_TAIL: Final = 1 << 14  # bytes that are searched in a longer body: its usage stands at the end
_USAGE: Final = re.compile(rb'"usage"\s*:\s*(?=\{)')
_MAX_CHOICES: Final = 128
_MAX_NAME: Final = 256  # characters of an id, or of a service tier
_REASONING: Final = ("reasoning_content", "reasoning")  # in a chat delta, of any provider
_ENDS: Final = frozenset(
    {
        *("response.completed", "response.incomplete", "response.failed", "message_stop"),
        *("image_generation.completed", "image_edit.completed"),
    }
)
_WEB_SEARCH: Final = "web_search_call"  # an item in the output of OpenAI's responses
_FILE_SEARCH: Final = "file_search_call"
_UNFINISHED: Final = ("queued", "in_progress")  # statuses of a response whose usage is not final
_ITEM: Final = re.compile(rb'"type"\s*:\s*"(web|file)_search_call"')
_NO_OUTPUT: Final = msgspec.Raw()


class _ResponseBody(msgspec.Struct):
    """The fields read from a whole response; the rest of its JSON is skipped without making objects."""

    usage: Any = None
    error: Any = None
    id: Any = None
    model: Any = None
    service_tier: Any = None
    status: Any = None
    output: msgspec.Raw = _NO_OUTPUT


_decoder: Final = msgspec.json.Decoder(_ResponseBody)


class WholeResponse(NamedTuple):
    """The usage in a whole response.

    Attributes:
        usage: None if the response does not report it.
        error_kind: of an error reported within the response, or None.
        response_id: by which it can be fetched later, or None.
        model: that has answered, or None.
        whole: whether all of it was read; else it may have made searches, or be of another model or tier.
    """

    usage: Usage | None
    error_kind: ErrorKind | None = None
    response_id: str | None = None
    model: str | None = None
    whole: bool = True


_NOTHING: Final = WholeResponse(None)


def read_response(body: bytes) -> WholeResponse:
    """Return the usage in the body of a successful response; `body`: without its Content-Encoding."""
    if len(body) > _MAX_BODY:
        return _read_tail(body[-_TAIL:])
    try:
        response = _decoder.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return _read_tail(body)
    error = classify_stream_error(response.error) if isinstance(response.error, dict) else None
    usage = None if response.status in _UNFINISHED else read_usage(response.usage)
    if usage is not None:
        found = _ITEM.findall(bytes(response.output)) if response.output else []
        tier = _read_name(response.service_tier)
        usage = _complete(usage, tier, web_searches=found.count(b"web"), file_searches=found.count(b"file"))
    return WholeResponse(usage, error, _read_name(response.id), _read_name(response.model))


def _read_name(value: object) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) <= _MAX_NAME else None


def _complete(usage: Usage, tier: str | None, *, web_searches: int, file_searches: int) -> Usage:
    """Return a usage with what the response reports elsewhere."""
    if tier is None and not web_searches and not file_searches:
        return usage
    return msgspec.structs.replace(
        usage,
        tier=usage.tier if tier is None else tier,
        web_searches=max(usage.web_searches, web_searches),
        file_searches=file_searches,
    )


def _read_tail(body: bytes) -> WholeResponse:
    """Return the usage at the end of a body that is too long, or cannot be decoded."""
    found = list(_USAGE.finditer(body))
    if not found:
        return _NOTHING
    try:
        usage, _ = json.JSONDecoder().raw_decode(body[found[-1].end() :][:_TAIL].decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return _NOTHING
    return WholeResponse(read_usage(usage), whole=False)


class BodyMeter:
    """A meter of one JSON response that is passed on as it arrives, since it is too large to be held in memory.

    Attributes:
        complete: whether the response has ended.
        error_kind: of an error reported within the response, or None.
        usage: None if the response does not report it at its end, or has not ended.
        response_id: by which it can be fetched later, or None.
        model: that has answered, or None.
        whole: whether all of it was read, see `WholeResponse`.
        answer_pieces: 0; the first bytes of JSON say nothing.
        readable: True; HTTP tells whether JSON was cut off.
    """

    __slots__ = ("_end", "complete", "error_kind", "model", "response_id", "usage", "whole")
    answer_pieces = 0
    readable = True

    def __init__(self) -> None:
        self._end = BodyEnd(4 * _TAIL)
        self.complete = False
        self.error_kind: ErrorKind | None = None
        self.usage: Usage | None = None
        self.response_id: str | None = None
        self.model: str | None = None
        self.whole = False

    def feed(self, chunk: bytes) -> None:
        """Read the next bytes of the response, a piece of any size, without its Content-Encoding."""
        self._end.feed(chunk)

    def end(self) -> None:
        """Note that the response has ended. Feeding more is not allowed."""
        self.usage, self.error_kind, self.response_id, self.model, self.whole = read_response(self._end.read())
        self.complete = True


class UsageMeter:
    """A meter of one stream of events (``text/event-stream``): it is fed the bytes, and knows the usage.

    Streams of OpenAI's chat completions, completions and responses and of Anthropic's messages are recognized by their
    events. Where the provider does not report output, or the stream breaks off, it is estimated: a token for each piece
    of text or, if that is more, for each four ASCII characters and each other one (three for a rare one, as emoji can
    be), so that no text costs more than it counts. Hidden reasoning cannot be estimated.

    Memory is bounded for any input: about a megabyte.

    Args:
        input_tokens: estimated, for a provider that does not report them.

    Attributes:
        complete: whether the response ended properly; a stream that was cut off did not.
        error_kind: of an error reported within the response, or None.
        response_id: by which it can be fetched later, or None.
        model: that answers, or None.
        whole: True: all of it is read.
        answer_pieces: pieces of output that have arrived, reasoning left out.
    """

    __slots__ = (
        "_characters", "_events", "_input_tokens", "_open_choices", "_pieces", "_quarters", "_recognized", "_reported",
        "_searches", "_tier", "_unknown", "answer_pieces", "complete", "error_kind", "model", "response_id",
    )  # fmt: skip
    whole = True

    def __init__(self, *, input_tokens: int = 0) -> None:
        self.complete = False
        self.error_kind: ErrorKind | None = None
        self._events = EventStreamParser()
        self._input_tokens = input_tokens
        self._reported: Usage | None = None
        self._open_choices: set[int] = set()  # started and not finished
        self._pieces = 0
        self.answer_pieces = 0
        self._characters = 0
        self._quarters = 0  # of tokens, by the characters
        self._recognized = False  # an event of a known form
        self._unknown = False  # an event of another form
        self._tier: str | None = None
        self._searches = {_WEB_SEARCH: 0, _FILE_SEARCH: 0}
        self.response_id: str | None = None
        self.model: str | None = None

    def feed(self, chunk: bytes) -> None:
        """Read the next bytes of the response, a piece of any size, without its Content-Encoding."""
        for event in self._events.feed(chunk):
            self._event(event)

    def end(self) -> None:
        """Note that the response has ended, properly or not. Feeding more is not allowed."""
        for event in self._events.end():
            self._event(event)

    @property
    def readable(self) -> bool:
        """True if its events are of a known form, or it has none: of others no end can be recognized."""
        return self._recognized or not self._unknown

    @property
    def output_tokens(self) -> int:
        """The output tokens so far: as the provider reported them, else estimated."""
        reported = self._reported.output_tokens if self._reported is not None else 0
        if reported and self.complete:
            return reported
        return max(reported, self._pieces, self._quarters // _QUARTERS_PER_TOKEN)

    @property
    def pieces(self) -> int:
        """The number of pieces of output that have arrived."""
        return self._pieces

    @property
    def usage(self) -> Usage | None:
        """The usage, reported or else estimated; None if nothing is known."""
        if self._reported is not None and self.complete:
            return self._with_extras(self._reported)
        if self._reported is None and not self._pieces:
            return None
        return self.unfinished_usage(0)

    def unfinished_usage(self, hidden_tokens: int, bound: int | None = None) -> Usage:
        """Return the usage of a response that broke off, or that its reader has left.

        Args:
            hidden_tokens: output that may have been made before any arrived.
            bound: the output that it can have at most, if that is known.
        """
        known = self._reported or Usage(input_tokens=self._input_tokens, output_tokens=0)
        output = self.output_tokens + hidden_tokens
        if bound is not None and self._characters <= bound * _LONG_TOKEN:  # else the provider does not keep to it
            output = max(known.output_tokens, min(output, bound))
        return self._with_extras(msgspec.structs.replace(known, output_tokens=output, estimated=True))

    def _with_extras(self, usage: Usage) -> Usage:
        web, file = self._searches.values()
        return _complete(usage, self._tier, web_searches=web, file_searches=file)

    def _event(self, data: bytes) -> None:
        if data == b"[DONE]":
            self.complete = self._recognized = True
            return
        event = _decode(data)
        if not isinstance(event, dict):
            self._unknown = True
            return
        self._recognized = True
        kind = event.get("type")
        if isinstance(kind, str):
            self._typed(kind, event)
        else:
            self._chunk(event)

    def _typed(self, kind: str, event: dict[str, Any]) -> None:
        """Read an event of Anthropic's messages or of OpenAI's responses."""
        if kind == "error":
            self.error_kind = classify_stream_error(event.get("error", event))
            return
        delta = event.get("delta")
        if kind == "content_block_delta" and isinstance(delta, dict):
            self._output(delta.get("text"), delta.get("partial_json"))
            self._output(delta.get("thinking"), shown=False)
        elif kind.endswith(".delta") and not kind.endswith("audio.delta"):  # tokens of audio cannot be estimated
            self._output(delta, shown="reasoning" not in kind)
        elif kind == "response.output_item.done" and isinstance(item := event.get("item"), dict):
            self._count_search(item.get("type"))
        body = event.get("message", event.get("response", event))
        if isinstance(body, dict):
            self._reported = read_usage(body.get("usage"), self._reported) or self._reported
            self._tier = _read_name(body.get("service_tier")) or self._tier
            self.model = self.model or _read_name(body.get("model"))
            if self.response_id is None and kind.startswith("response."):
                self.response_id = _read_name(body.get("id"))
            if kind == "response.failed":
                self.error_kind = classify_stream_error(body.get("error"))
        self.complete = self.complete or kind in _ENDS

    def _count_search(self, kind: object) -> None:
        if kind in self._searches:
            self._searches[str(kind)] += 1

    def _chunk(self, event: dict[str, Any]) -> None:
        """Read a chunk of OpenAI's chat completions or completions, where errors come without a type."""
        if event.get("error"):
            self.error_kind = classify_stream_error(event["error"])
            return
        self._reported = read_usage(event.get("usage"), self._reported) or self._reported
        self._tier = _read_name(event.get("service_tier")) or self._tier
        self.model = self.model or _read_name(event.get("model"))
        choices = event.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if not isinstance(choice, dict):
                continue
            delta = choice.get("delta")
            if isinstance(delta, dict):
                self._output(delta.get("content"), delta.get("refusal"), *_arguments(delta))
                self._output(*(delta.get(field) for field in _REASONING), shown=False)
            self._output(choice.get("text"))
            self._finish(choice.get("index"), finished=bool(choice.get("finish_reason")))

    def _finish(self, index: object, *, finished: bool) -> None:
        """Note that a choice continues or has finished; the response is complete when none is open."""
        number = index if isinstance(index, int) else 0
        if finished:
            self._open_choices.discard(number)
        elif len(self._open_choices) < _MAX_CHOICES:
            self._open_choices.add(number)
        self.complete = finished and not self._open_choices

    def _output(self, *texts: object, shown: bool = True) -> None:
        """Count pieces of text; those that are not `shown` are reasoning, or a summary of more than that."""
        for text in texts:
            if isinstance(text, str) and text:
                self._pieces += 1
                self.answer_pieces += shown
                self._characters += len(text)
                self._quarters += len(text) if text.isascii() else _count_quarters(text)


def _decode(data: bytes) -> Any:
    """Return the JSON of an event, in which a server may have cut an emoji in two; None if it is not JSON."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        pass
    try:
        return msgspec.json.decode(replace_lone_surrogates(data))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def _count_quarters(text: str) -> int:
    """Return the quarters of tokens in a text: 1 for an ASCII character, 4 for another, 12 beyond the basic plane."""
    others = len(text) - len(text.encode("ascii", "ignore"))
    rare = len(text.encode("utf-16-le")) // 2 - len(text)
    return len(text) + 3 * others + 8 * rare


def _arguments(delta: dict[str, Any]) -> list[object]:
    """Return the names and arguments of tool calls in a delta."""
    calls = delta.get("tool_calls")
    parts: list[object] = []
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            parts += [function.get("name"), function.get("arguments")]
    return parts
