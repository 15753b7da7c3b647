"""Claude Code behind the gateway: its requests replayed, and the program itself where it is installed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import anthropic
import pytest
from aiohttp import web
from tests.integration.recipes.claude_code import (
    HEADERS,
    answering,
    environment,
    error,
    find_program,
    missing,
    request,
    text,
    tool_use,
)
from tests.integration.recipes.conftest import Run
from tests.support.gateway_harness import NOTHING_LEFT, GatewayHarness, leftovers

from forebay.gateway.server import Gateway

PATH = "/v1/messages?beta=true"
installed = pytest.mark.skipif(missing() is not None, reason=missing() or "")


# --- its requests, replayed ---


@pytest.mark.parametrize("credential", [{"x-api-key": "sk-ant-1"}, {"authorization": "Bearer sk-ant-oat-1"}], ids=str)
async def test_a_request_arrives_as_it_was_sent(harness: GatewayHarness, credential: dict[str, str]) -> None:
    bodies: list[Any] = []
    harness.provider.behaviour = answering([text("The Danube.")], bodies)
    async with Gateway(harness.settings()) as gateway:
        status, headers, answer = await harness.post(gateway, PATH, json=request(), headers={**HEADERS, **credential})
        assert (status, answer) == (200, b"".join(text("The Danube.")))
        assert headers["content-type"] == "text/event-stream"
        (received,) = harness.provider.requests
        assert received.raw_path == PATH
        sent = {**HEADERS, **credential}
        assert {name: received.headers.get(name) for name in sent} == sent
        assert bodies == [request()]
        assert leftovers(gateway) == NOTHING_LEFT


async def test_tokens_are_counted_at_the_provider_free_of_charge(harness: GatewayHarness) -> None:
    harness.provider.behaviour = answering([web.json_response({"input_tokens": 11})], [])
    body = {name: request()[name] for name in ("model", "messages", "tools", "system")}
    async with Gateway(harness.settings(budget_usd=1e-9)) as gateway:
        path = "/v1/messages/count_tokens?beta=true"
        status, _, answer = await harness.post(gateway, path, json=body, headers={**HEADERS, "x-api-key": "sk-ant-1"})
        assert (status, answer) == (200, {"input_tokens": 11})
        assert [received.raw_path for received in harness.provider.requests] == [path]


async def test_anthropics_sdk_reads_a_stream_of_its_with_tools(harness: GatewayHarness) -> None:
    bodies: list[Any] = []
    harness.provider.behaviour = answering([tool_use("Read", {"file_path": "/notes"})], bodies)
    fields = {name: value for name, value in request().items() if name != "stream"}
    async with (
        Gateway(harness.settings()) as gateway,
        anthropic.AsyncAnthropic(base_url=harness.at(gateway, ""), api_key="sk-ant-1") as client,
        client.beta.messages.stream(**fields, betas=[HEADERS["anthropic-beta"]]) as stream,
    ):
        message = await stream.get_final_message()
        (block,) = message.content
        assert (block.type, message.usage.output_tokens) == ("tool_use", 7)
        assert getattr(block, "input", None) == {"file_path": "/notes"}
        (received,) = harness.provider.requests
        assert received.path == "/v1/messages"
        assert received.headers["anthropic-beta"] == HEADERS["anthropic-beta"]


async def test_a_body_as_long_as_a_full_context_passes(harness: GatewayHarness) -> None:
    bodies: list[Any] = []
    harness.provider.behaviour = answering([text("The Danube.")], bodies)
    body = request(words=800_000)
    assert len(json.dumps(body)) > 4 << 20
    async with Gateway(harness.settings()) as gateway:
        headers = {**HEADERS, "x-api-key": "sk-ant-1"}
        sent = io.BytesIO(json.dumps(body).encode())
        assert (await harness.post(gateway, PATH, data=sent, headers=headers))[0] == 200
        assert bodies == [body]


# --- the program itself ---


@installed
@pytest.mark.slow
async def test_claude_code_uses_a_tool_and_answers(harness: GatewayHarness, run: Run, tmp_path: Path) -> None:
    note = tmp_path / "note.txt"
    note.write_text("The Danube rises in the Black Forest.")
    bodies: list[Any] = []
    answers = [tool_use("Read", {"file_path": str(note)}), text("In the Black Forest.")]
    harness.provider.behaviour = answering(answers, bodies)
    async with Gateway(harness.settings()) as gateway:
        result = await _claude(run, gateway, tmp_path, "--allowedTools", "Read")
        assert (result["result"], result["is_error"]) == ("In the Black Forest.", False)
        assert result["usage"]["output_tokens"] == 14
        assert [received.raw_path for received in harness.provider.requests] == [PATH] * 2
        assert "The Danube rises" in json.dumps(bodies[1]["messages"])
        sent = harness.provider.requests[0].headers
        assert sorted(name for name in HEADERS if name not in sent) == []
        assert leftovers(gateway) == NOTHING_LEFT


@installed
@pytest.mark.slow
async def test_the_gateway_retries_for_claude_code(harness: GatewayHarness, run: Run, tmp_path: Path) -> None:
    answers: list[list[bytes] | web.Response] = [
        error(529, "overloaded_error"),
        error(429, "rate_limit_error", retry_after="1"),
        text("The Danube."),
    ]
    harness.provider.behaviour = answering(answers, [])
    async with Gateway(harness.settings()) as gateway:
        assert (await _claude(run, gateway, tmp_path))["result"] == "The Danube."
        counts = [received.headers["x-stainless-retry-count"] for received in harness.provider.requests]
        assert counts == ["0"] * 3


@installed
@pytest.mark.slow
async def test_claude_code_presents_the_token_of_the_gateway(
    harness: GatewayHarness, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "0123456789abcdef"  # noqa: S105 - it opens nothing else
    monkeypatch.setenv("GATEWAY_TOKEN", token)
    harness.provider.behaviour = answering([text("The Danube.")], [])
    async with Gateway(harness.settings(gateway={"token_env": "GATEWAY_TOKEN"})) as gateway:
        custom = {"ANTHROPIC_CUSTOM_HEADERS": f"x-forebay-token: {token}"}
        assert (await _claude(run, gateway, tmp_path, **custom))["result"] == "The Danube."
        (received,) = harness.provider.requests
        assert "x-forebay-token" not in received.headers


async def _claude(run: Run, gateway: Gateway, directory: Path, *options: str, **variables: str) -> Any:
    program = find_program()
    assert program is not None
    command = (str(program), "-p", "Where does the Danube rise?", "--output-format", "json", *options)
    url = f"http://127.0.0.1:{gateway.port}"
    return await run(*command, environment={**environment(directory, url), **variables}, cwd=directory)
