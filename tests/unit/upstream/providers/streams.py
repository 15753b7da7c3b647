"""Responses as providers send them, whole and streamed, for the tests of the usage meter."""

from __future__ import annotations

import json
from typing import Any

INPUT = 57  # estimated tokens of the request


def sse(*events: Any, named: bool = False) -> bytes:
    lines = []
    for event in events:
        if named:
            lines.append(f"event: {event['type']}\n")
        lines.append(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n")
    return "".join(lines).encode()


def chunk(delta: dict[str, Any], reason: str | None = None, **rest: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "gpt-4o", "choices": [choice]} | rest


CHAT_USAGE = {
    "prompt_tokens": 19,
    "completion_tokens": 10,
    "total_tokens": 29,
    "prompt_tokens_details": {"cached_tokens": 12, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 3},
}
CHAT_PARTS = [
    chunk({"role": "assistant", "content": ""}),
    chunk({"content": "Hello"}),
    chunk({"content": " there"}),
    chunk({}, "stop"),
]
USAGE_CHUNK = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [], "usage": CHAT_USAGE}
CHAT = sse(*CHAT_PARTS, "[DONE]")
CHAT_WITH_USAGE = sse(*({**part, "usage": None} for part in CHAT_PARTS), USAGE_CHUNK, "[DONE]")
CHAT_TOOLS = sse(
    chunk({"tool_calls": [{"index": 0, "id": "c", "function": {"name": "look", "arguments": ""}}]}),
    chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"at":'}}]}),
    chunk({"tool_calls": [{"index": 0, "function": {"arguments": '"sea"}'}}]}),
    chunk({}, "tool_calls"),
    "[DONE]",
)
VLLM = sse(  # continuous_usage_stats: a running total in every chunk
    chunk({"content": "a"}, usage={"prompt_tokens": 8, "completion_tokens": 1}),
    chunk({"content": "b"}, usage={"prompt_tokens": 8, "completion_tokens": 2}),
    chunk({}, "stop", usage={"prompt_tokens": 8, "completion_tokens": 3}),
    "[DONE]",
)
COMPLETION = sse(
    {"object": "text_completion", "choices": [{"text": "one", "finish_reason": None}]},
    {"object": "text_completion", "choices": [{"text": " two", "finish_reason": "length"}]},
    "[DONE]",
)

RESPONSES_PARTS = [
    {"type": "response.created", "response": {"id": "resp_1", "status": "in_progress", "usage": None}},
    {"type": "response.output_item.added", "output_index": 0, "item": {"type": "message"}},
    {"type": "response.output_text.delta", "delta": "Hi", "output_index": 0},
    {"type": "response.output_text.delta", "delta": " there", "output_index": 0},
    {"type": "response.output_text.done", "text": "Hi there"},
]
RESPONSES_USAGE = {
    "input_tokens": 37,
    "input_tokens_details": {"cached_tokens": 5},
    "output_tokens": 11,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 48,
}
RESPONSES = sse(
    *RESPONSES_PARTS,
    {"type": "response.completed", "response": {"id": "resp_1", "status": "completed", "usage": RESPONSES_USAGE}},
    named=True,
)
RESPONSES_FAILED = sse(
    *RESPONSES_PARTS[:3],
    {
        "type": "response.failed",
        "response": {"status": "failed", "error": {"code": "server_error", "message": "x"}, "usage": None},
    },
    named=True,
)

MESSAGE_USAGE = {
    "input_tokens": 25,
    "cache_creation_input_tokens": 20,
    "cache_read_input_tokens": 100,
    "output_tokens": 1,
}
MESSAGES_PARTS: list[dict[str, Any]] = [
    {"type": "message_start", "message": {"id": "msg_1", "role": "assistant", "usage": MESSAGE_USAGE}},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "ping"},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "Let me see"}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hello"}},
    {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": '{"a":1}'}},
    {"type": "content_block_stop", "index": 0},
]
MESSAGES = sse(
    *MESSAGES_PARTS,
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 15}},
    {"type": "message_stop"},
    named=True,
)
MESSAGES_OVERLOADED = sse(
    *MESSAGES_PARTS[:5],
    {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}},
    named=True,
)

ALL = {
    "chat": CHAT,
    "chat with usage": CHAT_WITH_USAGE,
    "chat tools": CHAT_TOOLS,
    "vllm": VLLM,
    "completion": COMPLETION,
    "responses": RESPONSES,
    "responses failed": RESPONSES_FAILED,
    "messages": MESSAGES,
    "messages overloaded": MESSAGES_OVERLOADED,
}
