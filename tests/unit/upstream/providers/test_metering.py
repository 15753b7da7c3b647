"""What keeps a request from being metered."""

from __future__ import annotations

import json
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import assume, given

from forebay.upstream.providers import ProviderRequest, find_unpriced, find_unreadable, profile_for
from forebay.upstream.providers.metering import _has_duplicate_keys, expected_searches, find_unseen_input
from forebay.upstream.providers.request import READ_FIELDS

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
    folded = {name.casefold() for name in extra}
    assume(len(folded) == len(extra) and folded.isdisjoint(READ_FIELDS))
    text = json.dumps({**extra, **BODY}, separators=separators, indent=indent, ensure_ascii=ascii_only)
    body = text.encode("utf-8", "replace")
    assert not unreadable(body)


def test_a_key_that_is_not_utf_8_cannot_be_read() -> None:
    assert "a key twice" in unreadable(b'{"model":"m","messages":[],"x\xe1y":1}')


def test_a_body_of_nothing_but_keys_is_not_searched_for_repeated_ones() -> None:
    keys = b",".join(b'"%07d":1' % number for number in range(100_001))
    assert "100,000 keys" in unreadable(b'{"model":"m","messages":[],%b}' % keys)
    pasted = keys.replace(b'"', b'\\"')
    assert not unreadable(b'{"model":"m","messages":[],"prediction":{"type":"content","content":"%b"}}' % pasted)
    assert not unreadable(b'{"model":"m","messages":[{"role":"user","content":"%b"}]}' % pasted)
    assert not unreadable(b'{"model":"m","prompt":"%b"}' % (b"x" * len(keys)))


@pytest.mark.parametrize("indent", [None, 0, 2])
def test_long_bodies_can_be_read_however_they_are_written(indent: int | None) -> None:
    text = '{"a":{"b":[{}]}},' * 60_000
    body = {"model": "m", "messages": [{"role": "user", "content": text}], "metadata": {"Run": 1}}
    assert not unreadable(json.dumps(body, indent=indent).encode())
    twice = json.dumps(body, indent=indent).replace('"metadata"', '"model":"x","metadata"')
    assert "a key twice" in unreadable(twice.encode())


@given(fields=st.lists(st.tuples(st.text(max_size=3), st.sampled_from((1, "}", [{"a": ","}])))), space=st.text(" \n\t"))
def test_a_key_that_stands_there_twice_is_found_however_it_is_written(
    fields: list[tuple[str, Any]], space: str
) -> None:
    pairs = [f"{space}{json.dumps(key)}{space}:{space}{json.dumps(value)}" for key, value in fields]
    body = f"{space}{{{','.join(pairs)}{space}}}{space}".encode()
    repeated = len({key for key, _ in fields}) < len(fields)
    mixed = len({key.casefold() for key, _ in fields}) < len(fields)
    mixed |= any(key.casefold() in READ_FIELDS and key != key.casefold() for key, _ in fields)  # such as "N", for "n"
    assert bool(_has_duplicate_keys(body)) is (repeated or mixed)


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


ADDITIONAL: dict[str, Any] = {"type": "additional_tools", "role": "developer"}


@pytest.mark.parametrize("kind", ["image_generation", "code_interpreter", 5])
@pytest.mark.parametrize("place", ["additional_tools", "tool_search_output", "tool_addition"])
def test_a_tool_within_the_input_is_looked_at_too(place: str, kind: Any) -> None:
    for tool, priced in (({"type": kind}, False), ({"type": "function", "name": "f"}, True)):
        addition = {"type": "tool_addition", "tool": {"type": "tool_definition", "definition": tool}}
        item = {"role": "user", "content": [addition]} if place == "tool_addition" else {"type": place, "tools": [tool]}
        for field in ("input", "messages"):
            reason = unpriced("/v1/responses" if field == "input" else "/v1/messages", **{field: [*SAY, item]})
            assert reason == ("" if priced else f"its provider bills the tool {str(kind)!r} apart from the tokens")


@pytest.mark.parametrize(
    "item",
    [
        b'{"type":"additional_tools","type":"message","tools":[{"type":"shell"}]}',
        b'{"t\\u0079pe":"additional_tools","type":"message","tools":[{"type":"shell"}]}',
        b'{"type":"\\u0061dditional_tools","type":"message","tools":[{"type":"shell"}]}',
    ],
)
def test_tools_within_the_input_that_servers_read_differently_are_unpriced(item: bytes) -> None:
    request = read(b'{"model":"m","messages":[],"input":[%s]}' % item, "/v1/responses")
    assert "its tools cannot be read" in find_unpriced(request)


@pytest.mark.parametrize("many", [b"1," * 1_000_000, b"[]," * 600_000])
def test_tools_within_an_input_of_too_many_values_are_not_looked_for(many: bytes) -> None:
    body = b'{"model":"m","input":[%s1,{"type":"additional_tools","tools":[]}]}' % many
    assert "its tools cannot be read" in find_unpriced(read(body, "/v1/responses"))
    assert not find_unpriced(read(body.replace(b"additional_tools", b"message"), "/v1/responses"))


def test_tools_of_any_depth_raise_nothing() -> None:
    for depth in range(0, 1_200, 7):
        body = b'{"model":"m","input":[{"type":"additional_tools","tools":%s}]}' % (b"[" * depth + b"1" + b"]" * depth)
        request = read(body, "/v1/responses")
        assert find_unpriced(request) or request.unreadable


@pytest.mark.parametrize("tools", ["all", {"web": {}}, [5], [None]])
def test_tools_within_the_input_that_are_no_list_are_unpriced(tools: Any) -> None:
    assert not unpriced(input=[{**ADDITIONAL, "tools": None}, {**ADDITIONAL, "tools": []}])
    assert not unpriced(input=[{"type": "message", "tools": tools}])
    assert unpriced(input=[{**ADDITIONAL, "tools": tools}])


@pytest.mark.parametrize("tool", [{"google_search": {}}, {}, {"type": None}, {"name": None, "function": "f"}])
def test_a_tool_without_a_type_and_a_name_is_unpriced(tool: dict[str, Any]) -> None:
    variants: list[dict[str, Any]] = [{"tools": [tool]}, {"input": [{**ADDITIONAL, "tools": [tool]}]}]
    for fields in variants:
        assert "without a type and a name" in unpriced(**fields)
    assert not unpriced(tools=[{"function": {"name": "f"}}, {"name": "f", "input_schema": {}}])


@pytest.mark.parametrize(
    ("kind", "searches"), [("web_search", 5), ("web_search_20260318", 5), ("function", 0), ("web_fetch_1", 0)]
)
def test_searches_are_expected_wherever_their_tool_is_defined(kind: str, searches: int) -> None:
    tools = [{"type": kind, "name": "web_search"}]
    done = {"type": "web_search_call", "id": "1", "status": "completed"}
    for fields in ({"tools": tools, "input": "x"}, {"input": [done, {**ADDITIONAL, "tools": tools}]}):
        request = read(json.dumps({"model": "m", **fields}).encode(), "/v1/responses")
        assert OPENAI.estimate_usage(request).web_searches == searches


@pytest.mark.parametrize(
    "fields",
    [
        {"plugins": [{"id": "web"}]},
        {"model": "openai/gpt-4o:online"},
        {"models": ["openai/gpt-4o:online"], "model": None},
        {"search_parameters": {"mode": "on"}},
        {"fallbacks": "default"},
        {"fallbacks": [{"model": "dear"}]},
        {"preset": "mine"},
    ],
)
def test_a_field_whose_cost_no_usage_tells_is_unpriced(fields: dict[str, Any]) -> None:
    assert unpriced("/v1/chat/completions", **fields)
    assert not unpriced("/v1/chat/completions", **dict.fromkeys(fields.keys() - {"model", "models"}))


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        (None, ()),
        ([], ()),
        (["a", "b"], ("a", "b")),
        ("a", ("",)),
        ({"a": 1}, ("",)),
        (["a", 5, "", None], ("a", "", "", "")),
        (["a"] * 21, ("",)),
    ],
)
def test_models_that_may_answer_instead_are_read(models: Any, expected: tuple[str, ...]) -> None:
    assert read(json.dumps({**BODY, "models": models}).encode()).alternatives == expected
    alone = read(json.dumps({"models": models, "messages": SAY}).encode())
    assert alone.model == (expected[0] if expected else None)


FILE = {"type": "document", "source": {"type": "file", "file_id": "file_1"}}
BY_URL = {"type": "document", "source": {"type": "url", "url": "https://x/y.pdf"}}


@pytest.mark.parametrize(
    ("fields", "stored"),
    [
        ({"messages": [{"role": "user", "content": [FILE, BY_URL]}]}, 2),
        ({"messages": [], "system": [FILE, BY_URL]}, 2),
        ({"messages": [], "input": [{"type": "input_file", "file_id": "file_1"}]}, 1),
        ({"input": [], "instructions": [{"type": "input_file", "file_url": "https://x"}]}, 1),
        ({"messages": [{"content": [{"type": "file", "file": {"file_data": "https://x/y.pdf"}}]}]}, 1),
        ({"messages": [{"content": [{"type": "file", "file": {"file_data": "data:application/pdf;base64,"}}]}]}, 0),
        ({"messages": [{"content": [{"type": "video_url", "video_url": {"url": "https://x"}}]}]}, 1),
        ({"messages": SAY, "conversation": "conv_1"}, 1),
        ({"messages": SAY, "system": "say file_id", "tools": [{"name": "file_id"}]}, 0),
    ],
)
def test_what_a_request_only_refers_to_is_counted_wherever_it_is(fields: dict[str, Any], stored: int) -> None:
    for path in ("/v1/messages", "/v1/responses"):
        request = read(json.dumps({"model": "m", **fields}).encode(), path)
        assert find_unseen_input(request).stored == stored


def test_sound_is_found_wherever_it_is() -> None:
    sound = [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]
    for field in ("messages", "input", "system"):
        assert find_unseen_input(read(json.dumps({**BODY, "messages": [], field: sound}).encode())).audio


def test_a_call_to_be_computed_in_the_us_reserves_what_that_costs() -> None:
    for place, factor in (("us", 1.1), ("global", 1.0), (None, 1.0)):
        request = read(json.dumps({**BODY, "inference_geo": place}).encode(), "/v1/messages")
        assert OPENAI.estimate_usage(request).factor == factor


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


@pytest.mark.parametrize("model", ["a:online", "@preset/x", "a@preset/x"])
def test_what_a_models_name_asks_for_besides_is_unpriced(model: str) -> None:
    for named in ({"model": model}, {"model": "a", "models": ["b", model]}):
        body = json.dumps({"messages": SAY, **named}).encode()
        assert find_unpriced(read(body))
    searching = json.dumps({"model": "a", "models": ["gpt-4o-search-preview"], "messages": SAY}).encode()
    assert expected_searches(read(searching)) == 1
