"""What keeps a request from being metered."""

from __future__ import annotations

import json
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from forebay.upstream.providers import ProviderRequest, find_unpriced, find_unreadable, profile_for

SAY = [{"role": "user", "content": "x"}]
BODY: dict[str, Any] = {"model": "m", "messages": SAY}
OPENAI = profile_for("openai")


def read(body: bytes, path: str = "/v1/chat/completions", **headers: str) -> ProviderRequest:
    return OPENAI.read_request("POST", path, headers, body)


def unreadable(body: bytes) -> str:
    return find_unreadable(read(body), body)


def unpriced(path: str = "/v1/responses", **body: Any) -> str:
    return find_unpriced(read(json.dumps({"model": "m", "input": "x", **body}).encode(), path))


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"cheap","model":"dear","messages":[]}',
        b'{"model": "cheap", "messages": [], "model": "dear"}',
        b'{"model":"cheap","messages":[],"mod\\u0065l":"dear"}',
        b'{ "model":"cheap" ,"messages":[],"background":false,"background":true}',
        b'{"model":"m","messages":[],"seed":%s }' % (b"9" * 5000),  # Python refuses such a number
    ],
)
def test_a_body_that_servers_read_differently_cannot_be_read(body: bytes) -> None:
    assert "a key twice" in unreadable(body)


@given(
    extra=st.dictionaries(
        st.text(max_size=5), st.recursive(st.none() | st.booleans() | st.integers(-5, 5) | st.text(), st.lists)
    ),
    separators=st.sampled_from([(",", ":"), (", ", ": ")]),
    indent=st.sampled_from([None, 2]),
    ascii_only=st.booleans(),
)
def test_any_other_json_object_can_be_read(
    extra: dict[str, Any], separators: tuple[str, str], indent: int | None, *, ascii_only: bool
) -> None:
    text = json.dumps({**extra, **BODY}, separators=separators, indent=indent, ensure_ascii=ascii_only)
    body = text.encode("utf-8", "replace")
    assert not unreadable(body)


def test_a_body_of_nothing_but_keys_is_not_searched_for_repeated_ones() -> None:
    keys = b",".join(b'"%07d":1' % number for number in range(100_000))
    assert "besides its messages" in unreadable(b'{"model":"m","messages":[],%b}' % keys)
    assert not unreadable(b'{"model":"m","messages":[{"role":"user","content":"%b"}]}' % (b"x" * len(keys)))
    assert not unreadable(b'{"model":"m","prompt":"%b"}' % (b"x" * len(keys)))


def test_a_body_of_nothing_but_objects_is_not_searched_one_by_one() -> None:
    assert "a key twice" in unreadable(b'{"model":  "m","messages":[%b{}]}' % (b"{}," * 100_000))
    assert not unreadable(b'{"model":"m","messages":[%b{}]}' % (b"{}," * 100_000))


def test_a_repeated_key_deeper_down_changes_nothing() -> None:
    assert not unreadable(b'{"model":"m","messages":[{"role":"user","role":"user"}]}')


@pytest.mark.parametrize(
    "kind",
    [
        *("function", "custom", "mcp", "local_shell", "apply_patch", "file_search", "web_search", "web_search_preview"),
        *("web_search_20260209", "web_fetch_20250910", "bash_20250124", "text_editor_20250728", "memory_20250818"),
        *("computer_20250124", "computer_use_preview", "tool_search_tool_bm25_20251119", "browser_toolset_20260801"),
    ],
)
def test_a_tool_whose_cost_is_in_the_usage_passes(kind: str) -> None:
    assert not unpriced(tools=[{"type": kind, "name": "x"}])
    assert not unpriced("/v1/messages", messages=SAY, tools=[{"name": "x", "input_schema": {"type": "object"}}])


@pytest.mark.parametrize(
    "kind", ["image_generation", "code_interpreter", "shell", "code_execution_20250825", "advisor_20260301", "new", 5]
)
def test_a_tool_that_is_billed_apart_is_unpriced(kind: Any) -> None:
    assert f"bills the tool {str(kind)!r} apart" in unpriced(tools=[{"type": "function", "name": "f"}, {"type": kind}])


@pytest.mark.parametrize(
    "tools",
    [
        b'[{"type":"image_generation","type":"function"}]',
        b'[{"t\\u0079pe":"image_generation","type":"function"}]',
        b'{"type":"function"}',
        b'"all"',
    ],
)
def test_tools_that_servers_read_differently_are_unpriced(tools: bytes) -> None:
    request = read(b'{"model":"m","input":"x","tools":%s}' % tools, "/v1/responses")
    assert "its tools" in find_unpriced(request)


def test_a_response_in_the_background_needs_a_bound() -> None:
    assert "give it max_output_tokens" in unpriced(background=True)
    assert not unpriced(background=True, max_output_tokens=100)


def test_a_stored_prompt_is_unpriced() -> None:
    assert "stored prompt" in unpriced(prompt={"id": "pmpt_1"})
    assert not unpriced(prompt=None)
    assert not unpriced("/v1/completions", prompt="{")


@pytest.mark.parametrize("method", ["GET", "DELETE", "OPTIONS", "PUT", "PATCH"])
def test_a_body_for_a_priced_endpoint_is_read_by_any_method(method: str) -> None:
    request = OPENAI.read_request(method, "/v1/chat/completions", {}, json.dumps(BODY).encode())
    assert (request.endpoint.value, request.model, request.free) == ("chat", "m", False)
    if method == "GET":
        assert OPENAI.read_request(method, "/v1/chat/completions", {}, b"").free
        assert OPENAI.read_request(method, "/v1/files", {}, b"{}").free


@pytest.mark.parametrize("header", ["x-http-method-override", "X-HTTP-Method", "x-method-override"])
def test_a_method_that_a_header_changes_is_unpriced(header: str) -> None:
    request = OPENAI.read_request("GET", "/v1/chat/completions", {header: "POST"}, b"{}")
    assert "another one" in find_unpriced(request)
    assert not request.free


@pytest.mark.parametrize(
    ("path", "headers"), [("/v1/realtime?model=m", {}), ("/v1/responses", {"upgrade": "websocket"})]
)
def test_a_websocket_is_unpriced(path: str, headers: dict[str, str]) -> None:
    assert "WebSocket" in find_unpriced(OPENAI.read_request("GET", path, headers, b""))
