from __future__ import annotations

import json
import math
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from forebay import Overloaded
from forebay.gateway.error_responses import (
    ApiProtocol,
    GatewayResponse,
    capacity_response,
    error_response,
    overloaded_response,
    stream_error_event,
)

PROTOCOLS = pytest.mark.parametrize("protocol", ["openai", "anthropic"])


def raised(protocol: ApiProtocol, answer: GatewayResponse) -> Any:
    """What the provider's SDK makes of an answer."""
    response = httpx2.Response(answer.status, headers=list(answer.headers), content=answer.body)
    http = httpx2.Client(transport=httpx2.MockTransport(lambda _: response))
    kind: Any = openai.OpenAI if protocol == "openai" else anthropic.Anthropic
    with kind(api_key="k", http_client=http, max_retries=0) as client, pytest.raises(Exception) as caught:  # noqa: PT011
        client.models.list()
    return caught.value


@PROTOCOLS
@pytest.mark.parametrize(
    ("binding", "load", "after", "status", "back"),
    [
        ("upstream:x:requests per minute", 1.0, 2.5, 429, True),
        ("upstream:x:concurrency", 1.0, None, 429, False),
        ("upstream:x:line", 1.0, 3600.0, 429, False),
        ("upstream:x:budget", 1.0, 5.0, 402, False),
        ("upstream:x:tokens per minute", math.inf, None, 413, False),
    ],
)
def test_a_refusal_is_one_of_the_providers_own_errors(  # noqa: PLR0913
    protocol: ApiProtocol, binding: str, load: float, after: float | None, status: int, *, back: bool
) -> None:
    answer = overloaded_response(protocol, Overloaded("why", limited_by=binding, load=load, retry_after=after))
    error = raised(protocol, answer)
    assert error.status_code == status
    assert "why" in error.message
    headers = dict(answer.headers)
    assert headers["x-should-retry"] == ("true" if back else "false")
    assert headers.get("retry-after-ms") == (None if after is None else str(math.ceil(1000 * after)))
    kind: Any = openai if protocol == "openai" else anthropic
    if status == 429:
        assert isinstance(error, kind.RateLimitError)


@pytest.mark.parametrize("part", ["breaker", "outage"])
@PROTOCOLS
def test_an_open_breaker_is_an_overloaded_provider_and_so_is_an_outage(protocol: ApiProtocol, part: str) -> None:
    answer = overloaded_response(
        protocol, Overloaded("broken", limited_by=f"upstream:x:{part}", load=1.0, retry_after=4.0)
    )
    assert raised(protocol, answer).status_code == (503 if protocol == "openai" else 529)


@PROTOCOLS
@pytest.mark.parametrize("status", [400, 401, 402, 404, 408, 413, 502, 503])
def test_a_problem_tells_what_to_do_and_is_not_tried_again(protocol: ApiProtocol, status: int) -> None:
    answer = error_response(protocol, status, "forebay_code", "do this")
    error = raised(protocol, answer)
    assert error.status_code == status
    assert "do this" in error.message
    assert dict(answer.headers)["x-should-retry"] == "false"


@PROTOCOLS
def test_a_gateway_that_is_full_is_come_back_to(protocol: ApiProtocol) -> None:
    answer = capacity_response(protocol, "forebay_code", "come back", seconds=2.5)
    error = raised(protocol, answer)
    assert error.status_code == (503 if protocol == "openai" else 529)
    headers = dict(answer.headers)
    assert (headers["x-should-retry"], headers["retry-after"], headers["retry-after-ms"]) == ("true", "3", "2500")


def test_an_error_in_a_stream_is_an_event() -> None:
    told = stream_error_event("openai", "cut")
    assert told.startswith(b"data: {")
    assert told.endswith(b"\n\n")
    assert json.loads(told[6:])["error"]["message"] == "cut"
    assert stream_error_event("anthropic", "cut").startswith(b'event: error\ndata: {"type":"error"')
