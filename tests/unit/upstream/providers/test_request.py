"""Requests as they are read, and the charge that they reserve."""

from __future__ import annotations

import json
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from forebay.errors import InvalidSetting
from forebay.interfaces import Charge
from forebay.upstream.providers import Endpoint, ProviderRequest, Usage, profile_for

PROVIDERS = ["openai", "azure", "anthropic", "vllm", "ollama", "llama.cpp", "openai-compatible", "generic"]
OPENAI, ANTHROPIC, AZURE = profile_for("openai"), profile_for("anthropic"), profile_for("azure")
SAY = [{"role": "user", "content": "x" * 400}]
JSON_TYPE = {"content-type": "application/json"}


def ask(path: str, body: Any, *, provider: str = "openai", **headers: str) -> ProviderRequest:
    data = body if isinstance(body, bytes) else json.dumps(body, separators=(",", ":")).encode()
    return profile_for(provider).read_request("POST", path, JSON_TYPE | headers, data)


@pytest.mark.parametrize(
    ("method", "path", "endpoint"),
    [
        ("POST", "/v1/chat/completions", Endpoint.CHAT),
        ("POST", "/v1/chat/completions?x=1", Endpoint.CHAT),
        ("POST", "https://api.openai.com/v1/chat/completions", Endpoint.CHAT),
        ("POST", "/openai/deployments/mine/chat/completions?api-version=2024-10-21", Endpoint.CHAT),
        ("POST", "/v1/completions", Endpoint.COMPLETIONS),
        ("POST", "/v1/responses", Endpoint.RESPONSES),
        ("GET", "/v1/responses/resp_1", Endpoint.OTHER),
        ("POST", "/v1/responses/resp_1/cancel", Endpoint.OTHER),
        ("POST", "/v1/embeddings", Endpoint.EMBEDDINGS),
        ("POST", "/v1/messages", Endpoint.MESSAGES),
        ("POST", "/v1/messages/", Endpoint.MESSAGES),
        ("POST", "/v1/messages?beta=true", Endpoint.MESSAGES),
        ("POST", "/v1/messages/count_tokens", Endpoint.COUNT_TOKENS),
        ("POST", "/v1/messages/batches", Endpoint.OTHER),
        ("POST", "/v1/threads/thread_1/messages", Endpoint.OTHER),
        ("GET", "/v1/models", Endpoint.MODELS),
        ("GET", "/v1/models/gpt-4o", Endpoint.MODELS),
        ("POST", "/v1/audio/transcriptions", Endpoint.OTHER),
        ("GET", "/v1/chat/completions", Endpoint.OTHER),
        ("POST", "", Endpoint.OTHER),
        ("POST", "http://[", Endpoint.OTHER),
    ],
)
def test_the_endpoint_is_read_from_method_and_path(method: str, path: str, endpoint: Endpoint) -> None:
    assert OPENAI.read_request(method, path, {}, b"{}" if method == "POST" else b"").endpoint is endpoint


@pytest.mark.parametrize(
    ("method", "path", "free"),
    [
        ("GET", "/v1/models", True),
        ("get", "/v1/models/gpt-4o", True),
        ("HEAD", "/v1/models", True),
        ("GET", "/v1/responses/resp_1", True),
        ("DELETE", "/v1/files/file_1", True),
        ("POST", "/v1/messages/count_tokens", True),
        ("POST", "/v1/chat/completions", False),
        ("POST", "/v1/responses/resp_1/cancel", True),
        ("POST", "/v1/images/generations", False),
        ("GET", "/v1/realtime?model=gpt-realtime", False),
        ("GET", "wss://api.openai.com/v1/responses", False),
    ],
)
def test_reading_and_deleting_costs_nothing(method: str, path: str, *, free: bool) -> None:
    assert OPENAI.read_request(method, path, {}, b"{}" if method == "POST" else b"").free is free


def test_a_websocket_is_not_free_though_it_starts_with_a_get() -> None:
    assert not OPENAI.read_request("GET", "/v1/responses", {"upgrade": "websocket"}, b"").free


def test_a_chat_completion_is_read() -> None:
    body = {"model": "gpt-4o", "messages": SAY, "stream": True, "max_tokens": 300, "n": 2}
    request = ask("/v1/chat/completions", body)
    assert request.model == "gpt-4o"
    assert request.stream
    assert request.max_output_tokens == 300
    assert request.choices == 2
    assert not request.include_usage
    assert 100 <= request.input_tokens <= 110
    assert ask("/v1/chat/completions", body | {"stream_options": {"include_usage": True}}).include_usage


@pytest.mark.parametrize(
    ("bounds", "most"),
    [
        ({"max_tokens": 7}, 7),
        ({"max_completion_tokens": 8, "max_tokens": 7}, 8),
        ({"max_completion_tokens": None, "max_tokens": 7}, 7),
        ({"max_output_tokens": 9}, None),
        ({"max_output_tokens": 9, "max_tokens": 7}, 7),
        ({"max_tokens": 0}, None),
        ({"max_tokens": -1}, None),
        ({"max_tokens": "7"}, None),
        ({"max_tokens": True}, None),
        ({"max_tokens": 1e300}, None),
        ({}, None),
    ],
)
def test_the_output_bound_has_several_names(bounds: dict[str, Any], most: int | None) -> None:
    assert ask("/v1/chat/completions", {"model": "m", "messages": SAY} | bounds).max_output_tokens == most


@pytest.mark.parametrize(
    ("fields", "choices"),
    [
        ({"n": 3}, 3),
        ({"n": "3"}, 3),  # a lenient server reads it
        ({"n": " 3.0 "}, 3),
        ({"n": 1, "best_of": "4"}, 4),
        ({"n": "1e9"}, 128),
        *(({"n": value}, 1) for value in (None, True, 0, -5, "", "two", "nan", "inf", "9" * 5000, [3])),
    ],
)
def test_choices_are_counted_as_the_most_lenient_server_does(fields: dict[str, Any], choices: int) -> None:
    assert ask("/v1/completions", {"model": "m", "prompt": "x"} | fields).choices == choices


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, True),
        ("true", True),
        (1, True),
        ("yes", True),
        (False, False),
        (None, False),
        ("false", False),
        (0, False),
    ],
)
def test_a_flag_is_read_as_the_most_lenient_server_does(value: Any, *, expected: bool) -> None:
    request = ask("/v1/responses", {"model": "m", "input": "x", "stream": value, "background": value})
    assert (request.stream, request.background) == (expected, expected)


@pytest.mark.parametrize(("options", "searches"), [({}, 1), ({"search_context_size": "low"}, 1), (None, 0)])
def test_a_chat_completion_that_asks_for_it_searches_the_web_once(options: Any, searches: int) -> None:
    body = {"model": "m", "messages": SAY}
    assert ask("/v1/chat/completions", {**body, "web_search_options": options}).searches == searches
    assert ask("/v1/chat/completions", body).searches == 0


@pytest.mark.parametrize(
    ("path", "body", "tokens"),
    [
        ("/v1/completions", {"prompt": "x" * 400}, 101),
        ("/v1/completions", {"prompt": [1, 2, 3, 4, 5]}, 5),
        ("/v1/embeddings", {"input": ["x" * 400, "y" * 400]}, 202),
        ("/v1/embeddings", {"input": [[1, 2, 3], [4, 5]]}, 5),
        ("/v1/responses", {"input": "x" * 400, "instructions": "y" * 400}, 201),
        ("/v1/responses", {"input": 100 * '"\t\n '}, 101),
        ("/v1/responses", {"input": 100 * "\u4e2d"}, 76),
        ("/v1/chat/completions", {"messages": None}, 0),
        ("/v1/chat/completions", {}, 0),
    ],
)
def test_input_is_estimated_from_its_bytes(path: str, body: dict[str, Any], tokens: int) -> None:
    assert ask(path, body).input_tokens == tokens


def test_tools_are_input_too() -> None:
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]
    without = ask("/v1/chat/completions", {"messages": SAY}).input_tokens
    assert ask("/v1/chat/completions", {"messages": SAY, "tools": tools}).input_tokens - without == pytest.approx(
        len(json.dumps(tools, separators=(",", ":"))) / 4, abs=1
    )


def test_an_image_costs_its_scaled_size_and_not_its_base64() -> None:
    data = "A" * 1_000_000
    url = {"url": f"data:image/png;base64,{data}"}
    text = {"type": "text", "text": "what is this?"}
    for image, tokens in (
        ({"type": "image_url", "image_url": url}, 765),
        ({"type": "image_url", "image_url": url | {"detail": "low"}}, 85),
    ):
        body = {"messages": [{"role": "user", "content": [text, image]}]}
        assert tokens < ask("/v1/chat/completions", body).input_tokens < tokens + 40
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}
    body = {"messages": [{"role": "user", "content": [text, image]}]}
    assert 1600 < ask("/v1/messages", body, provider="anthropic").input_tokens < 1640


def test_documents_and_sound_cost_a_fraction_of_their_base64() -> None:
    pdf = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "A" * 200_000}}
    body = {"messages": [{"role": "user", "content": [pdf]}]}
    assert 4000 <= ask("/v1/messages", body, provider="anthropic").input_tokens < 4040
    sound = {"type": "input_audio", "input_audio": {"data": "A" * 200_000, "format": "mp3"}}
    body = {"messages": [{"role": "user", "content": [sound]}]}
    assert 100 <= ask("/v1/chat/completions", body).input_tokens < 140
    plain = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "x" * 4000}}
    body = {"messages": [{"role": "user", "content": [plain]}]}
    assert 1100 < ask("/v1/messages", body, provider="anthropic").input_tokens < 1250


def test_a_request_of_more_parts_than_can_be_looked_at_counts_more_than_its_images() -> None:
    image = {"type": "image_url", "image_url": {"url": "https://images.test/1.png"}}
    messages = [{"role": "user", "content": [*[image] * 1_000, *[{}] * 200_000]}]
    size = len(json.dumps(messages, separators=(",", ":")))
    assert ask("/v1/chat/completions", {"messages": messages}).input_tokens == pytest.approx(
        size / 4 + 1_000 * 765, rel=0.01
    )


def test_text_about_images_is_text() -> None:
    talk = [{"role": "user", "content": 'he said "image_url" ' * 100}]
    assert 500 < ask("/v1/chat/completions", {"messages": talk}).input_tokens < 620


def test_azure_has_the_model_in_the_path() -> None:
    path = "/openai/deployments/my%20gpt/chat/completions?api-version=2024-10-21"
    request = ask(path, {"messages": SAY})
    assert request.model == "my gpt"
    assert request.api_version == "2024-10-21"
    assert ask(path, {"messages": SAY, "model": "cheap"}).model == "my gpt", "the deployment answers"


@pytest.mark.parametrize(
    ("body", "headers", "reason"),
    [
        (b"--x\r\n", {"content-type": "multipart/form-data; boundary=x"}, "not a JSON object"),
        (b'{"model":"m"}', {"content-encoding": "gzip"}, "the Content-Encoding 'gzip'"),
        (b'{"model":"m"}', {"content-encoding": "identity, br"}, "the Content-Encoding"),
        (b'{"model":"m"}', {"content-type": "application/json; charset=utf-7"}, "not in UTF-8"),
        (b"\xef\xbb\xbf" + b'{"model":"m"}', {}, "not a JSON object in UTF-8"),
        ('{"model":"m"}'.encode("utf-16"), {}, "not a JSON object in UTF-8"),
        (b"model=m", {"content-type": "application/x-www-form-urlencoded"}, "not a JSON object"),
        (b'["m"]', {}, "not a JSON object"),
        (b"", {}, "not a JSON object"),
    ],
)
def test_a_body_that_cannot_be_read_counts_as_one_request(body: bytes, headers: dict[str, str], reason: str) -> None:
    request = ask("/v1/chat/completions", body, **headers)
    assert (request.model, request.input_tokens) == (None, 0)
    assert reason in request.unreadable


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "multipart/x"},
        {"content-type": ""},
        {"content-type": "application/json; charset=UTF-8"},
        {"content-encoding": "identity"},
        {"content-encoding": "Identity"},
        {"content-encoding": ""},
    ],
)
def test_a_json_object_is_read_whatever_its_type_says(headers: dict[str, str]) -> None:
    request = ask("/v1/chat/completions", {"model": "m", "messages": SAY}, **headers)
    assert (request.model, request.unreadable, request.signed) == ("m", "", False)
    assert request.input_tokens


# --- what cannot be metered, what may not be touched ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/v1/realtime?model=gpt-realtime", {}),
        ("wss://api.openai.com/v1/responses", {}),
        ("/v1/anything", {"Upgrade": "websocket", "Connection": "Upgrade"}),
        ("/v1/anything", {"Sec-WebSocket-Key": "x"}),
    ],
)
def test_a_websocket_is_recognized(path: str, headers: dict[str, str]) -> None:
    assert OPENAI.read_request("GET", path, headers, b"").websocket
    assert not OPENAI.read_request("GET", "/v1/models", {}, b"").websocket


@pytest.mark.parametrize(
    ("query", "headers"),
    [
        ("", {"Authorization": "AWS4-HMAC-SHA256 Credential=AKIA/20260401/us-east-1/bedrock/aws4_request"}),
        ("", {"X-Amz-Date": "20260401T120000Z"}),
        ("?X-Amz-Signature=abc", {}),
        ("", {"Signature-Input": 'sig1=("@method")'}),
        ("", {"Content-Digest": "sha-256=:x:"}),
    ],
)
def test_a_signed_body_is_recognized_and_never_changed(query: str, headers: dict[str, str]) -> None:
    body = json.dumps({"model": "m", "messages": SAY, "stream": True}).encode()
    request = OPENAI.read_request("POST", "/v1/chat/completions" + query, headers, body)
    assert request.signed
    assert OPENAI.with_include_usage(request, body) is None
    bearer = OPENAI.read_request("POST", "/v1/chat/completions", {"authorization": "Bearer sk-x"}, body)
    assert not bearer.signed


# --- charges --------------------------------------------------------------------------------------------------------


def chat(provider: str, **body: Any) -> ProviderRequest:
    path = "/v1/messages" if provider == "anthropic" else "/v1/chat/completions"
    return ask(path, {"model": "m", "messages": SAY} | body, provider=provider)


def test_openai_charges_the_larger_of_bound_and_input_and_returns_nothing() -> None:
    request = chat("openai", max_tokens=1000)
    sent = request.input_tokens
    reserved = OPENAI.estimate_charge(request, output_tokens=50)
    assert reserved == Charge(input_tokens=sent, output_tokens=50, tokens=1000)
    usage = Usage(input_tokens=90, output_tokens=40, cached_input_tokens=64)
    assert OPENAI.final_charge(reserved, usage) == Charge(input_tokens=90, output_tokens=40, tokens=1000)
    assert OPENAI.estimate_charge(chat("openai", max_tokens=10)).tokens == sent
    assert OPENAI.estimate_charge(chat("openai")).tokens == sent


def test_azure_charges_the_sum_for_each_choice() -> None:
    request = chat("azure", max_tokens=1000, best_of=3)
    assert AZURE.estimate_charge(request).tokens == request.input_tokens + 3000


def test_anthropic_charges_uncached_input_and_generated_output() -> None:
    request = chat("anthropic", max_tokens=4096)
    reserved = ANTHROPIC.estimate_charge(request, output_tokens=200)
    sent = request.input_tokens
    assert reserved == Charge(input_tokens=sent, output_tokens=200, tokens=sent + 200)
    usage = Usage(input_tokens=1000, output_tokens=70, cached_input_tokens=900, cache_write_tokens=50)
    assert ANTHROPIC.final_charge(reserved, usage) == Charge(input_tokens=100, output_tokens=70, tokens=170)


def test_counting_tokens_takes_nothing_from_the_quotas_of_messages() -> None:
    request = ask("/v1/messages/count_tokens", {"model": "m", "messages": SAY}, provider="anthropic")
    assert ANTHROPIC.estimate_charge(request) == Charge(requests=0)


def test_without_usage_a_call_settles_as_it_reserved() -> None:
    reserved = OPENAI.estimate_charge(chat("openai", max_tokens=10))
    assert OPENAI.final_charge(reserved, None) == reserved


def test_the_reserved_output_is_the_typical_one_within_its_bound() -> None:
    profile = profile_for("vllm")
    assert profile.estimate_charge(chat("vllm", max_tokens=100), output_tokens=300).output_tokens == 100
    assert profile.estimate_charge(chat("vllm", max_tokens=100), output_tokens=30).output_tokens == 30
    assert profile.estimate_charge(chat("vllm", max_tokens=100)).output_tokens == 100
    assert profile.estimate_charge(chat("vllm")).output_tokens == 500
    assert profile.estimate_charge(chat("vllm", n=3, max_tokens=100)).output_tokens == 300


def test_embeddings_generate_no_tokens_and_an_unknown_path_takes_one_request() -> None:
    request = ask("/v1/embeddings", {"input": "x" * 400, "model": "m"})
    assert OPENAI.estimate_charge(request) == Charge(input_tokens=101, tokens=101)
    assert OPENAI.estimate_charge(ask("/v1/files", b"...")) == Charge()


def test_estimates_are_corrected_by_the_ratio_of_an_account() -> None:
    request = chat("vllm")
    corrected = profile_for("vllm").estimate_charge(request, input_ratio=1.5).input_tokens
    assert corrected == pytest.approx(1.5 * request.input_tokens, abs=2)


def test_an_unknown_provider_is_an_error_that_names_the_known_ones() -> None:
    assert [profile_for(name).provider for name in PROVIDERS] == PROVIDERS
    with pytest.raises(InvalidSetting, match="'openai', 'azure', 'anthropic'"):
        profile_for("opanai")


# --- garbage --------------------------------------------------------------------------------------------------------

FIELDS = ["model", "messages", "stream", "n", "max_tokens", "tools", "input", "prompt", "system", "stream_options"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "data", *FIELDS]), inner),
    max_leaves=20,
)
BODIES = st.binary(max_size=200) | st.dictionaries(st.sampled_from(FIELDS), JSON).map(lambda v: json.dumps(v).encode())


@given(
    method=st.sampled_from(["POST", "GET", "x"]) | st.text(max_size=5),
    path=st.sampled_from(["/v1/chat/completions", "/v1/messages", "/v1/embeddings"]) | st.text(max_size=60),
    headers=st.dictionaries(st.sampled_from(["content-type", "upgrade", "authorization"]), st.text(max_size=20)),
    body=BODIES,
    provider=st.sampled_from(PROVIDERS),
)
def test_no_request_raises(method: str, path: str, headers: dict[str, str], body: bytes, provider: str) -> None:
    profile = profile_for(provider)
    request = profile.read_request(method, path, headers, body)
    charge = profile.estimate_charge(request)
    assert min(charge.requests, charge.input_tokens, charge.output_tokens, charge.tokens) >= 0
    assert profile.final_charge(charge, None) == charge
    assert profile.with_include_usage(request, body) is None or request.stream


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages":' + b"[" * 100_000,
        b'{"messages":[{"type":"image","x":' + b"[" * 900 + b"]" * 900 + b"}]}",
        b'{"messages":"\xff\xfe"}',
        b'{"stream": 0, "n": [], "max_tokens": {}, "model": 7, "messages": 3}',
        b'{"messages":"' + b"x" * 10_000_000 + b'"}',
    ],
    ids=["deep", "deep media", "not utf-8", "wrong types", "long"],
)
def test_no_body_is_too_deep_or_too_long(body: bytes) -> None:
    request = OPENAI.read_request("POST", "/v1/chat/completions", JSON_TYPE, body)
    assert request.endpoint is Endpoint.CHAT
    assert not request.stream
