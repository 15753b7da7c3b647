"""What an answer used, read as its bytes pass: whole or as a stream of events, of any provider."""

from __future__ import annotations

import json
import re
from typing import Any, Final, NamedTuple

import msgspec

from forebay.upstream.providers.classify import ErrorKind, classify_stream_error
from forebay.upstream.providers.content_encoding import Decompressor
from forebay.upstream.providers.event_stream import EventStreamParser
from forebay.upstream.providers.usage import Usage, read_usage

_CHARACTERS: Final = 4  # of text to a token, where a provider does not count
_WHOLE: Final = 1 << 20  # bytes of a body that are kept
_TAIL: Final = 1 << 14  # of a longer one: its usage stands at the end
_USAGE: Final = re.compile(rb'"usage"\s*:\s*(?=\{)')
_MOST_CHOICES: Final = 128
_CONTENT: Final = ("content", "reasoning_content", "reasoning", "refusal")  # of a delta of OpenAI's chat, and its kin
_ENDS: Final = frozenset({"response.completed", "response.incomplete", "response.failed", "message_stop"})


class _UsageAndError(msgspec.Struct):
    """What is read of a whole answer; the rest of its JSON is passed over and no object made of it."""

    usage: Any = None
    error: Any = None


_answer: Final = msgspec.json.Decoder(_UsageAndError)


class WholeResponse(NamedTuple):
    """What a whole answer told.

    Attributes:
        usage: what was used; None if it does not say.
        complete: whether it ended as it should.
        error: what an error meant that was told within it, or None.
    """

    usage: Usage | None
    complete: bool
    error_kind: ErrorKind | None


_NOTHING: Final = WholeResponse(None, complete=False, error_kind=None)


def read_response(body: bytes) -> WholeResponse:
    """Read a successful answer that came in one piece, without a Content-Encoding."""
    if len(body) > _WHOLE + _TAIL:
        return _tail(body[-_TAIL:])
    try:
        answer = _answer.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return _tail(body)
    error = classify_stream_error(answer.error) if isinstance(answer.error, dict) else None
    return WholeResponse(read_usage(answer.usage), complete=True, error_kind=error)


def _tail(body: bytes) -> WholeResponse:
    """Usage in the end of a body of which the beginning was let go."""
    found = list(_USAGE.finditer(body))
    if not found:
        return _NOTHING
    try:
        told, _ = json.JSONDecoder().raw_decode(body[found[-1].end() :][:_TAIL].decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return _NOTHING
    return WholeResponse(read_usage(told), complete=body.rstrip().endswith(b"}"), error_kind=None)


class UsageMeter:
    """Fed the bytes of one successful answer, it knows what the call used. It passes nothing on and changes nothing.

    Streams of OpenAI's chat completions, completions and responses and of Anthropic's messages are told apart by their
    events. Where the provider does not count, or the stream breaks off, output is estimated: a token for each piece of
    text, or for four characters of it if those are more. Thinking that is not shown cannot be estimated.

    Memory stays bounded, whatever is fed: about a megabyte.

    Args:
        stream: whether the answer is a stream of events (``text/event-stream``), not a body in one piece.
        input_tokens: what the request was estimated to send, for where the provider does not count.
        encoding: its Content-Encoding; gzip and deflate are unpacked, of others nothing is known.

    Attributes:
        begun: whether the first token has come.
        complete: whether the answer ended as it should. A stream that was cut has not.
        error: what an error meant that was told within the answer, or None.
    """

    __slots__ = (
        *("_characters", "_events", "_input_tokens", "_open", "_pieces", "_told", "_unpacked", "_whole"),
        *("started", "complete", "error_kind"),
    )

    def __init__(self, *, stream: bool, input_tokens: int = 0, encoding: str = "") -> None:
        self.started = False
        self.complete = False
        self.error_kind: ErrorKind | None = None
        self._events = EventStreamParser() if stream else None
        self._whole = bytearray()
        self._unpacked = Decompressor(encoding)
        self._input_tokens = input_tokens
        self._told: Usage | None = None
        self._open: set[int] = set()  # choices that have begun and not finished
        self._pieces = 0
        self._characters = 0

    def feed(self, chunk: bytes) -> None:
        """The next bytes of the answer, in pieces of any size."""
        for content in self._unpacked.feed(chunk):
            if self._events is not None:
                for event in self._events.feed(content):
                    self._event(event)
            elif content:
                self.started = True
                self._whole += content
                if len(self._whole) > _WHOLE + _TAIL:
                    del self._whole[:-_TAIL]  # no longer JSON, but the usage is still found in it

    def end(self) -> None:
        """The answer has ended, as it should or not. Feeding more is not allowed."""
        if self._events is not None:
            for event in self._events.end():
                self._event(event)
        else:
            self._told, self.complete, self.error_kind = read_response(bytes(self._whole))
            self._whole.clear()

    @property
    def output_tokens(self) -> int:
        """Tokens that have come so far, as the provider counted them or else by estimate."""
        told = self._told.output_tokens if self._told is not None else 0
        return told if told and self.complete else max(told, self._pieces, self._characters // _CHARACTERS)

    @property
    def usage(self) -> Usage | None:
        """What was used: told, or else estimated; None if nothing is known."""
        if self._told is not None and (self.complete or self._events is None):
            return self._told
        if self._told is None and not self._pieces:
            return None
        known = self._told or Usage(input_tokens=self._input_tokens, output_tokens=0)
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
        """An event of Anthropic's messages or of OpenAI's responses."""
        if kind == "error":
            self.error_kind = classify_stream_error(event.get("error", event))
            return
        delta = event.get("delta")
        if kind == "content_block_delta" and isinstance(delta, dict):
            self._output(*(delta.get(field) for field in ("text", "thinking", "partial_json")))
        elif kind.endswith("audio.delta"):
            self.started = True  # sound in base64, of which nothing can be estimated
        elif kind.endswith(".delta"):
            self._output(delta)
        body = event.get("message", event.get("response", event))
        if isinstance(body, dict):
            self._told = read_usage(body.get("usage"), self._told) or self._told
            if kind == "response.failed":
                self.error_kind = classify_stream_error(body.get("error"))
        self.complete = self.complete or kind in _ENDS

    def _chunk(self, event: dict[str, Any]) -> None:
        """A chunk of OpenAI's chat completions or completions; errors come without a type there."""
        if event.get("error"):
            self.error_kind = classify_stream_error(event["error"])
            return
        self._told = read_usage(event.get("usage"), self._told) or self._told
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
        """A choice has gone on, or ended; the answer is complete when none is open."""
        number = index if isinstance(index, int) else 0
        if finished:
            self._open.discard(number)
        elif len(self._open) < _MOST_CHOICES:
            self._open.add(number)
        self.complete = finished and not self._open

    def _output(self, *texts: object) -> None:
        for text in texts:
            if isinstance(text, str) and text:
                self.started = True
                self._pieces += 1
                self._characters += len(text)


def _arguments(delta: dict[str, Any]) -> list[object]:
    """What a delta adds to the arguments of tools."""
    calls = delta.get("tool_calls")
    parts: list[object] = []
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            parts += [function.get("name"), function.get("arguments")]
    return parts
