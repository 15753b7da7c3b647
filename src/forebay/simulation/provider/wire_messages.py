"""Requests and successful answers in the formats of OpenAI and of Anthropic, whole or streamed.

The formats are those of OpenAI's chat completions and of Anthropic's messages, as their SDKs read them. Pure, and
cheap: the simulated provider must not be the bottleneck of a benchmark.
"""

from __future__ import annotations

import itertools
from typing import Any, Final

import msgspec

Body = dict[str, Any]

_CHARACTERS_PER_TOKEN = 4  # the usual estimate
_TOKENS_PER_MESSAGE = 4  # for its role and delimiters
_WORDS: Final = [
    *("river", "water", "stone", "gate", "valley", "meadow", "spring", "channel", "bridge", "turbine", "lake"),
    *("shore", "cloud", "rain", "delta", "bank", "reed", "current", "pool", "weir", "source", "mill", "rapid"),
    *("heron", "silt", "estuary", "tide", "canal", "harbour", "lock", "basin", "brook"),
]
_TEXT_WORDS: Final = 4096  # after which the text repeats


def _filler() -> tuple[str, list[int]]:
    """Return a text and the offset of each of its words. Word i depends on i alone, so that tests can predict it."""
    words = [" " + _WORDS[(i * i + 7 * i // 3) % len(_WORDS)] for i in range(_TEXT_WORDS)]
    return "".join(words), [0, *itertools.accumulate(len(word) for word in words)]


_FILLER, _OFFSETS = _filler()


def answer_text(first: int, tokens: int) -> str:
    """Return `tokens` words of an answer, starting with word `first`; each word counts as a token."""
    parts, first_word = [], first == 0
    while tokens > 0:
        begin = first % _TEXT_WORDS
        end = min(_TEXT_WORDS, begin + tokens)
        parts.append(_FILLER[_OFFSETS[begin] : _OFFSETS[end]])
        first, tokens = first + end - begin, tokens - (end - begin)
    return "".join(parts).lstrip() if first_word else "".join(parts)


# --- requests -------------------------------------------------------------------------------------------------------


class ChatMessage(msgspec.Struct):
    """One message of a conversation; its content is text or a list of parts."""

    role: str
    content: Any = None


class StreamOptions(msgspec.Struct):
    """The stream options of OpenAI."""

    include_usage: bool = False


class ChatRequest(msgspec.Struct):
    """The fields of a chat completion or a message that the provider reads. It ignores all others."""

    model: str
    messages: list[ChatMessage]
    stream: bool | None = False
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream_options: StreamOptions | None = None
    system: Any = None
    tools: Any = None

    @property
    def max_output_tokens(self) -> int | None:
        """The bound on output tokens, under either of its names."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def include_usage(self) -> bool:
        """True if a stream must end with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def input_tokens(self) -> int:
        """Return an estimate from the number of characters; there is no tokenizer here."""
        characters = sum(_length(message.content) for message in self.messages) + _length(self.system)
        if self.tools:
            characters += len(msgspec.json.encode(self.tools))
        return -(-characters // _CHARACTERS_PER_TOKEN) + _TOKENS_PER_MESSAGE * len(self.messages)


_decoder: Final = msgspec.json.Decoder(ChatRequest)


def read_request(body: bytes) -> ChatRequest:
    """Parse a request.

    Raises:
        msgspec.MsgspecError: the body is not a valid request; the message names the field.
    """
    return _decoder.decode(body)


def _length(content: Any) -> int:
    """Return the characters of text in a content: a string, or parts that may hold one."""
    if isinstance(content, str):
        return len(content)
    if isinstance(content, list):
        return sum(_length(part.get("text") or part.get("content")) for part in content if isinstance(part, dict))
    return 0


def model_list(names: list[str]) -> bytes:
    """Return the list of models, in a format that both SDKs read."""
    openai = {"object": "model", "created": 0, "owned_by": "simulation"}
    anthropic = {"type": "model", "created_at": "2026-01-01T00:00:00Z"}
    data = [openai | anthropic | {"id": name, "display_name": name} for name in names]
    page = {"first_id": names[0], "last_id": names[-1], "has_more": False}
    return msgspec.json.encode({"object": "list", "data": data} | page)


# --- answers of OpenAI ----------------------------------------------------------------------------------------------


_OPENAI_REASONS: Final = {True: "stop", False: "length"}  # finish reasons, by whether the answer stopped by itself


class OpenAIWriter:
    """The writer of one chat completion, whole or as server-sent events."""

    def __init__(self, call_id: int, model: str, created: int, *, include_usage: bool = False) -> None:
        self._base = {"id": f"chatcmpl-{call_id:029d}", "created": created, "model": model}
        self._include_usage = include_usage

    def response(self, usage: tuple[int, int], *, stopped: bool) -> bytes:
        """Return the whole answer; `usage` is input and output tokens. It `stopped` by itself, or reached its bound."""
        reason = _OPENAI_REASONS[stopped]
        message: Body = {"role": "assistant", "content": answer_text(0, usage[1]), "refusal": None, "annotations": []}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        body = self._base | {"object": "chat.completion", "choices": [choice], "usage": self._usage(usage)}
        return msgspec.json.encode(body | {"service_tier": "default", "system_fingerprint": "fp_simulated"})

    def stream_start(self, input_tokens: int) -> bytes:  # noqa: ARG002 - Anthropic's format needs it
        """Return the events before the first token."""
        return self._chunk({"role": "assistant", "content": "", "refusal": None})

    def stream_tokens(self, first: int, tokens: int) -> bytes:
        """Return the event with `tokens` tokens, starting with token `first`."""
        return self._chunk({"content": answer_text(first, tokens)})

    def stream_end(self, usage: tuple[int, int], *, stopped: bool) -> bytes:
        """Return the events after the last token; the arguments are those of `response`."""
        events = [self._chunk({}, _OPENAI_REASONS[stopped])]
        if self._include_usage:
            usage_chunk = {"object": "chat.completion.chunk", "choices": [], "usage": self._usage(usage)}
            events.append(_data(self._base | usage_chunk))
        return b"".join((*events, b"data: [DONE]\n\n"))

    def stream_error(self, body: Body) -> bytes:
        """Return the event that reports an error."""
        return _data(body)

    def _chunk(self, delta: Body, reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        chunk = self._base | {
            "object": "chat.completion.chunk",
            "choices": [choice],
            "system_fingerprint": "fp_simulated",
        }
        return _data(chunk | {"usage": None} if self._include_usage else chunk)

    @staticmethod
    def _usage(usage: tuple[int, int]) -> Body:
        details: Body = {
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }
        tokens: Body = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": usage[0] + usage[1]}
        return tokens | details


def _data(body: Body) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


# --- answers of Anthropic -------------------------------------------------------------------------------------------


_ANTHROPIC_REASONS: Final = {True: "end_turn", False: "max_tokens"}  # as above


class AnthropicWriter:
    """The writer of one message, whole or as server-sent events."""

    def __init__(self, call_id: int, model: str) -> None:
        self._base = {"id": f"msg_{call_id:024d}", "type": "message", "role": "assistant", "model": model}

    def response(self, usage: tuple[int, int], *, stopped: bool) -> bytes:
        """Return the whole answer; `usage` is input and output tokens. It `stopped` by itself, or reached its bound."""
        content = [{"type": "text", "text": answer_text(0, usage[1])}]
        reason = _ANTHROPIC_REASONS[stopped]
        ending = {"content": content, "stop_reason": reason, "stop_sequence": None, "usage": self._usage(usage)}
        return msgspec.json.encode(self._base | ending)

    def stream_start(self, input_tokens: int) -> bytes:
        """Return the events before the first token."""
        empty: Body = {
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage((input_tokens, 1)),
        }
        block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
        start = {"type": "message_start", "message": self._base | empty}
        return _event(start) + _event(block) + _event({"type": "ping"})

    def stream_tokens(self, first: int, tokens: int) -> bytes:
        """Return the event with `tokens` tokens, starting with token `first`."""
        delta = {"type": "text_delta", "text": answer_text(first, tokens)}
        return _event({"type": "content_block_delta", "index": 0, "delta": delta})

    def stream_end(self, usage: tuple[int, int], *, stopped: bool) -> bytes:
        """Return the events after the last token; the arguments are those of `response`."""
        delta = {"stop_reason": _ANTHROPIC_REASONS[stopped], "stop_sequence": None}
        ending = {"type": "message_delta", "delta": delta, "usage": {"output_tokens": usage[1]}}
        stop = _event({"type": "content_block_stop", "index": 0})
        return stop + _event(ending) + _event({"type": "message_stop"})

    def stream_error(self, body: Body) -> bytes:
        """Return the event that reports an error."""
        return _event(body)

    @staticmethod
    def _usage(usage: tuple[int, int]) -> Body:
        cache = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
        return {"input_tokens": usage[0], "output_tokens": usage[1], "service_tier": "standard"} | cache


def _event(body: Body) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (str(body["type"]).encode(), msgspec.json.encode(body))
