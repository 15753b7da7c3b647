"""A meter that reads the usage of a response from its bytes as they pass: whole or streamed, of any provider."""

from __future__ import annotations

import json
import re
from typing import Any, Final, NamedTuple

import msgspec

from forebay.upstream.providers.classify import ErrorKind, classify_stream_error
from forebay.upstream.providers.content_encoding import Decompressor
from forebay.upstream.providers.event_stream import EventStreamParser
from forebay.upstream.providers.usage import Usage, read_usage

_CHARACTERS_PER_TOKEN: Final = 4  # where a provider does not count
_MAX_BODY: Final = 1 << 20  # bytes that are kept
_TAIL: Final = 1 << 14  # bytes kept of a longer body: its usage stands at the end
_USAGE: Final = re.compile(rb'"usage"\s*:\s*(?=\{)')
_MAX_CHOICES: Final = 128
_CONTENT: Final = (
    "content",
    "reasoning_content",
    "reasoning",
    "refusal",
)  # text fields of a chat delta, OpenAI's and others'
_ENDS: Final = frozenset({"response.completed", "response.incomplete", "response.failed", "message_stop"})


class _UsageAndError(msgspec.Struct):
    """The fields read from a whole response; the rest of its JSON is skipped without making objects."""

    usage: Any = None
    error: Any = None


_decoder: Final = msgspec.json.Decoder(_UsageAndError)


class WholeResponse(NamedTuple):
    """The usage and the end of a whole response.

    Attributes:
        usage: None if the response does not report it.
        complete: whether the response is whole.
        error_kind: of an error reported within the response, or None.
    """

    usage: Usage | None
    complete: bool
    error_kind: ErrorKind | None


_NOTHING: Final = WholeResponse(None, complete=False, error_kind=None)


def read_response(body: bytes) -> WholeResponse:
    """Return the usage of a successful response, without a Content-Encoding, that came in one piece."""
    if len(body) > _MAX_BODY + _TAIL:
        return _read_tail(body[-_TAIL:])
    try:
        response = _decoder.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return _read_tail(body)
    error = classify_stream_error(response.error) if isinstance(response.error, dict) else None
    return WholeResponse(read_usage(response.usage), complete=True, error_kind=error)


def _read_tail(body: bytes) -> WholeResponse:
    """Return the usage at the end of a body whose beginning was dropped."""
    found = list(_USAGE.finditer(body))
    if not found:
        return _NOTHING
    try:
        usage, _ = json.JSONDecoder().raw_decode(body[found[-1].end() :][:_TAIL].decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return _NOTHING
    return WholeResponse(read_usage(usage), complete=body.rstrip().endswith(b"}"), error_kind=None)


class UsageMeter:
    """A meter for one successful response: it is fed the bytes, and knows the usage. It changes nothing.

    Streams of OpenAI's chat completions, completions and responses and of Anthropic's messages are recognized by their
    events. Where the provider does not report output, or the stream breaks off, it is estimated: a token for each piece
    of text, or for each four characters if that is more. Hidden reasoning cannot be estimated.

    Memory is bounded for any input: about a megabyte.

    Args:
        stream: whether the response is a stream of events (``text/event-stream``) rather than one body.
        input_tokens: estimated, for a provider that does not report them.
        encoding: its Content-Encoding; gzip and deflate are decompressed, and no other is read.

    Attributes:
        started: whether the first token has arrived.
        complete: whether the response ended properly; a stream that was cut off did not.
        error_kind: of an error reported within the response, or None.
    """

    __slots__ = (
        *("_body", "_characters", "_decompressor", "_events", "_input_tokens", "_open_choices", "_pieces", "_reported"),
        *("started", "complete", "error_kind"),
    )

    def __init__(self, *, stream: bool, input_tokens: int = 0, encoding: str = "") -> None:
        self.started = False
        self.complete = False
        self.error_kind: ErrorKind | None = None
        self._events = EventStreamParser() if stream else None
        self._body = bytearray()
        self._decompressor = Decompressor(encoding)
        self._input_tokens = input_tokens
        self._reported: Usage | None = None
        self._open_choices: set[int] = set()  # started and not finished
        self._pieces = 0
        self._characters = 0

    def feed(self, chunk: bytes) -> None:
        """Read the next bytes of the response, a piece of any size."""
        for content in self._decompressor.feed(chunk):
            if self._events is not None:
                for event in self._events.feed(content):
                    self._event(event)
            elif content:
                self.started = True
                self._body += content
                if len(self._body) > _MAX_BODY + _TAIL:
                    del self._body[:-_TAIL]  # no longer JSON, but the usage is still found in it

    def end(self) -> None:
        """Take note that the response has ended, properly or not. Feeding more is not allowed."""
        if self._events is not None:
            for event in self._events.end():
                self._event(event)
        else:
            self._reported, self.complete, self.error_kind = read_response(bytes(self._body))
            self._body.clear()

    @property
    def output_tokens(self) -> int:
        """Return the tokens received so far: as the provider reported them, else estimated."""
        reported = self._reported.output_tokens if self._reported is not None else 0
        if reported and self.complete:
            return reported
        return max(reported, self._pieces, self._characters // _CHARACTERS_PER_TOKEN)

    @property
    def usage(self) -> Usage | None:
        """Return the usage, reported or else estimated; None if nothing is known."""
        if self._reported is not None and (self.complete or self._events is None):
            return self._reported
        if self._reported is None and not self._pieces:
            return None
        known = self._reported or Usage(input_tokens=self._input_tokens, output_tokens=0)
        return msgspec.structs.replace(known, output_tokens=self.output_tokens, estimated=True)

    # --- streams ---

    def _event(self, data: bytes) -> None:
        if data == b"[DONE]":
            self.complete = True
            return
        try:
            event = msgspec.json.decode(data)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return
        if not isinstance(event, dict):
            return
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
            self._output(*(delta.get(field) for field in ("text", "thinking", "partial_json")))
        elif kind.endswith("audio.delta"):
            self.started = True  # base64 audio, whose tokens cannot be estimated
        elif kind.endswith(".delta"):
            self._output(delta)
        body = event.get("message", event.get("response", event))
        if isinstance(body, dict):
            self._reported = read_usage(body.get("usage"), self._reported) or self._reported
            if kind == "response.failed":
                self.error_kind = classify_stream_error(body.get("error"))
        self.complete = self.complete or kind in _ENDS

    def _chunk(self, event: dict[str, Any]) -> None:
        """Read a chunk of OpenAI's chat completions or completions, where errors come without a type."""
        if event.get("error"):
            self.error_kind = classify_stream_error(event["error"])
            return
        self._reported = read_usage(event.get("usage"), self._reported) or self._reported
        choices = event.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if not isinstance(choice, dict):
                continue
            delta = choice.get("delta")
            if isinstance(delta, dict):
                self._output(*(delta.get(field) for field in _CONTENT), *_arguments(delta))
            self._output(choice.get("text"))
            self._finish(choice.get("index"), finished=bool(choice.get("finish_reason")))

    def _finish(self, index: object, *, finished: bool) -> None:
        """Take note that a choice continues or has finished; the response is complete when none is open."""
        number = index if isinstance(index, int) else 0
        if finished:
            self._open_choices.discard(number)
        elif len(self._open_choices) < _MAX_CHOICES:
            self._open_choices.add(number)
        self.complete = finished and not self._open_choices

    def _output(self, *texts: object) -> None:
        for text in texts:
            if isinstance(text, str) and text:
                self.started = True
                self._pieces += 1
                self._characters += len(text)


def _arguments(delta: dict[str, Any]) -> list[object]:
    """Return what a delta adds to the names and arguments of tool calls."""
    calls = delta.get("tool_calls")
    parts: list[object] = []
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            parts += [function.get("name"), function.get("arguments")]
    return parts
