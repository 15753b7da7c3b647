"""Error responses of the gateway, as the SDKs of the providers read them."""

from __future__ import annotations

import json
import math
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from openai.types.responses import ResponseErrorEvent

from forebay import Overloaded
from forebay.gateway.error_responses import (
    ApiProtocol,
    GatewayResponse,
    StreamProtocol,
    capacity_response,
    error_response,
    overloaded_response,
    stream_error_event,
)

PROTOCOLS = pytest.mark.parametrize("protocol", ["openai", "anthropic"])


def raised(protocol: ApiProtocol, response: GatewayResponse) -> Any:
    """Return the exception that the provider's SDK raises for a response."""
    reply = httpx2.Response(response.status, headers=list(response.headers), content=response.body)
    http = httpx2.Client(transport=httpx2.MockTransport(lambda _: reply))
    kind: Any = openai.OpenAI if protocol == "openai" else anthropic.Anthropic
    with kind(api_key="k", http_client=http, max_retries=0) as client, pytest.raises(Exception) as caught:  # noqa: PT011
        client.models.list()
    return caught.value


@PROTOCOLS
@pytest.mark.parametrize(
    ("limited_by", "load", "after", "status", "retry"),
    [
        ("upstream:x:requests per minute", 1.0, 2.5, 429, True),
        ("upstream:x:concurrency", 1.0, None, 429, False),
        ("upstream:x:queue", 1.0, 3600.0, 429, False),
        ("upstream:x:budget", 1.0, 50.0, 402, False),
        ("upstream:x:budget", 0.9, 5.0, 402, True),  # calls under way may return what they reserved
        ("upstream:x:unreadable", math.inf, None, 415, False),
        ("upstream:x:unpriced", math.inf, None, 400, False),
        ("upstream:x:unbounded", math.inf, None, 400, False),
        ("upstream:x:tokens per minute", math.inf, None, 413, False),
    ],
)
def test_a_rejection_is_an_error_of_the_providers_sdk(  # noqa: PLR0913
    protocol: ApiProtocol, limited_by: str, load: float, after: float | None, status: int, *, retry: bool
) -> None:
    response = overloaded_response(protocol, Overloaded("why", limited_by=limited_by, load=load, retry_after=after))
    error = raised(protocol, response)
    assert error.status_code == status
    assert "why" in error.message
    headers = dict(response.headers)
    assert headers["x-should-retry"] == ("true" if retry else "false")
    assert headers.get("retry-after-ms") == (None if after is None else str(math.ceil(1000 * after)))
    kind: Any = openai if protocol == "openai" else anthropic
    if status == 429:
        assert isinstance(error, kind.RateLimitError)


@pytest.mark.parametrize("limit", ["breaker", "outage"])
@PROTOCOLS
def test_an_open_breaker_and_an_outage_are_an_overloaded_provider(protocol: ApiProtocol, limit: str) -> None:
    response = overloaded_response(
        protocol, Overloaded("broken", limited_by=f"upstream:x:{limit}", load=1.0, retry_after=4.0)
    )
    assert raised(protocol, response).status_code == (503 if protocol == "openai" else 529)


@PROTOCOLS
@pytest.mark.parametrize("status", [400, 401, 402, 404, 408, 413, 502, 503])
def test_an_error_says_what_to_do_and_is_not_retried(protocol: ApiProtocol, status: int) -> None:
    response = error_response(protocol, status, "forebay_code", "do this")
    error = raised(protocol, response)
    assert error.status_code == status
    assert "do this" in error.message
    assert dict(response.headers)["x-should-retry"] == "false"


@PROTOCOLS
def test_a_gateway_without_capacity_asks_for_a_retry(protocol: ApiProtocol) -> None:
    response = capacity_response(protocol, "forebay_code", "try again", seconds=2.5)
    error = raised(protocol, response)
    assert error.status_code == (503 if protocol == "openai" else 529)
    headers = dict(response.headers)
    assert (headers["x-should-retry"], headers["retry-after"], headers["retry-after-ms"]) == ("true", "3", "2500")


def test_an_error_in_a_stream_is_an_event() -> None:
    event = stream_error_event("openai", "cut")
    assert event.startswith(b"data: {")
    assert event.endswith(b"\n\n")
    assert json.loads(event[6:])["error"]["message"] == "cut"
    assert stream_error_event("anthropic", "cut").startswith(b'event: error\ndata: {"type":"error"')


def stream_end(protocol: StreamProtocol) -> Any:
    """Return the exception that an SDK raises for a stream that ends with an error event."""
    content = stream_error_event(protocol, "cut")
    reply = httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=content)
    http = httpx2.Client(transport=httpx2.MockTransport(lambda _: reply))
    kind: Any = anthropic.Anthropic if protocol == "anthropic" else openai.OpenAI
    with kind(api_key="k", http_client=http, max_retries=0) as client, pytest.raises(Exception) as caught:  # noqa: PT011, PT012
        if protocol == "openai-responses":
            list(client.responses.create(model="m", input="x", stream=True))
        elif protocol == "openai":
            list(client.chat.completions.create(model="m", messages=[], stream=True))
        else:
            list(client.messages.create(model="m", max_tokens=1, messages=[], stream=True))
    return caught.value


@pytest.mark.parametrize("protocol", ["openai", "openai-responses", "anthropic"])
def test_an_sdk_raises_the_error_of_a_stream(protocol: StreamProtocol) -> None:
    error = stream_end(protocol)
    assert isinstance(error, openai.APIError | anthropic.APIError)
    assert "cut" in str(error)


def test_the_error_event_of_responses_is_one_of_their_events() -> None:
    name, _, data = stream_error_event("openai-responses", "cut").partition(b"\n")
    event = json.loads(data.removeprefix(b"data: "))
    assert name == b"event: error"
    assert ResponseErrorEvent.model_validate(event).message == "cut"  # what node's SDK reads by its type
    assert event["type"] == "error"


def test_a_mistake_of_a_caller_is_never_called_an_error_of_the_server() -> None:
    for status in (400, 403, 405, 415, 417, 431):
        assert json.loads(error_response("openai", status, "c", "m").body)["error"]["type"] == "invalid_request_error"
        kind = json.loads(error_response("anthropic", status, "c", "m").body)["error"]["type"]
        assert kind == ("permission_error" if status == 403 else "invalid_request_error")


@PROTOCOLS
@pytest.mark.parametrize("model", ["gpt-4o\n", "a\r\nset-cookie: x", "a\x00b", "a\x7f"])
def test_a_name_with_control_characters_makes_a_header_that_can_be_sent(protocol: ApiProtocol, model: str) -> None:
    error = Overloaded("no", limited_by=f"upstream:u:{model}:budget", load=1.0)
    for response in (
        overloaded_response(protocol, error),
        capacity_response(protocol, "c", "no", seconds=1.0, limited_by=model),
    ):
        assert dict(response.headers)["x-forebay-limited-by"].isprintable()
