"""Claude Code from npm, without a terminal, and the requests that it sends.

It takes 235 MB, so `make packages` leaves it out. It is installed by this command, in the top folder:

    scripts/npm.sh build/claude-code @anthropic-ai/claude-code@2.1.197
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from aiohttp import web
from tests.support.gateway_harness import Behaviour

VERSION: Final = "2.1.197"
_DIRECTORY: Final = Path(__file__).parents[3] / "build/claude-code"
_INSTALL: Final = f"scripts/npm.sh build/claude-code @anthropic-ai/claude-code@{VERSION}"

# The headers of its requests, as that version sends them; those of HTTP itself are left out.
HEADERS: Final = {
    "accept": "application/json",
    "content-type": "application/json",
    "user-agent": f"claude-cli/{VERSION} (external, sdk-cli)",
    "x-claude-code-session-id": "00000000-0000-4000-8000-000000000000",
    "x-stainless-arch": "x64",
    "x-stainless-lang": "js",
    "x-stainless-os": "Linux",
    "x-stainless-package-version": "0.94.0",
    "x-stainless-retry-count": "0",
    "x-stainless-runtime": "node",
    "x-stainless-runtime-version": "v26.3.0",
    "x-stainless-timeout": "600",
    "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14,context-management-2025-06-27",
    "anthropic-dangerous-direct-browser-access": "true",
    "anthropic-version": "2023-06-01",
    "x-app": "cli",
}
_SCHEMA: Final = {"type": "object", "properties": {"file_path": {"type": "string"}}, "required": ["file_path"]}
_CACHED: Final = {"cache_control": {"type": "ephemeral"}}


def request(*, tools: int = 20, words: int = 10_000) -> dict[str, Any]:
    """Return the body of a request like its own: long, with many tools, and parts to be cached."""
    text = "The repository has a gateway. " * (words // 5)
    described = [
        {"name": f"Tool{number}", "description": text[:3000], "input_schema": _SCHEMA} for number in range(tools)
    ]
    return {
        "model": "claude-opus-4-8",
        "messages": [{"role": "user", "content": [{"type": "text", "text": text, **_CACHED}]}],
        "system": [{"type": "text", "text": "You are Claude Code, Anthropic's official CLI.", **_CACHED}],
        "tools": [*described, {"name": "Read", "input_schema": _SCHEMA}],
        "metadata": {"user_id": json.dumps({"device_id": "0" * 64, "account_uuid": "", "session_id": "0"})},
        "max_tokens": 64_000,
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "stream": True,
    }


def find_program() -> Path | None:
    """Return the program, if it is installed."""
    return next(_DIRECTORY.glob("node_modules/@anthropic-ai/claude-code-*/claude"), None)


def missing() -> str | None:
    """Return what must be installed, or None."""
    return None if find_program() else f"Claude Code is missing: {_INSTALL}"


def environment(home: Path, url: str) -> dict[str, str]:
    """Return the environment in which it calls nothing but the gateway at `url`, with a key that is none."""
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": str(home),
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_API_KEY": "sk-ant-none",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
    }


# --- answers of the provider ---


def text(said: str) -> list[bytes]:
    """Return the events of an answer in words."""
    block = {"type": "text", "text": ""}
    return list(_events(block, {"type": "text_delta", "text": said}, "end_turn"))


def tool_use(name: str, arguments: dict[str, Any]) -> list[bytes]:
    """Return the events of an answer that calls a tool."""
    block = {"type": "tool_use", "id": "toolu_1", "name": name, "input": {}}
    delta = {"type": "input_json_delta", "partial_json": json.dumps(arguments)}
    return list(_events(block, delta, "tool_use"))


def _events(block: dict[str, Any], delta: dict[str, Any], stop_reason: str) -> Iterator[bytes]:
    message: dict[str, Any] = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-opus-4-8",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 11, "output_tokens": 1},
    }
    yield _event("message_start", message=message)
    yield _event("content_block_start", index=0, content_block=block)
    yield _event("ping")
    yield _event("content_block_delta", index=0, delta=delta)
    yield _event("content_block_stop", index=0)
    yield _event("message_delta", delta={"stop_reason": stop_reason, "stop_sequence": None}, usage={"output_tokens": 7})
    yield _event("message_stop")


def _event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


def answering(answers: Iterable[list[bytes] | web.Response], bodies: list[Any]) -> Behaviour:
    """Return a behaviour that gives one answer after the other, events or a response; `bodies` gets the requests."""
    left = iter(answers)

    async def behave(request: web.BaseRequest) -> web.StreamResponse:
        bodies.append(json.loads(await request.content.read()))  # `request.read` has a limit of 1 MiB
        answer = next(left)
        if isinstance(answer, web.Response):
            return answer
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for event in answer:
            await response.write(event)
        await response.write_eof()
        return response

    return behave


def error(status: int, kind: str, **headers: str) -> web.Response:
    """Return an error in Anthropic's shape."""
    body = {"type": "error", "error": {"type": kind, "message": "not now"}}
    return web.json_response(body, status=status, headers={name.replace("_", "-"): headers[name] for name in headers})
