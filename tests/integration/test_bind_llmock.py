"""Bound clients before a server that nobody here wrote: llmock, in the shapes of OpenAI and of Anthropic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from llmock.pytest_plugin import LLMock
from llmock.testing import LLMockServer
from tests.unit.upstream.transport.wire import NOTHING, left

from forebay import Overloaded
from forebay.breaker import BreakerRules
from forebay.retry import Retry
from forebay.upstream import Upstream

SAY: Any = [{"role": "user", "content": "Tell me of rivers."}]
SIDES = pytest.mark.parametrize("name", ["openai", "anthropic"])


@pytest.fixture(scope="module")
def server() -> Iterator[LLMockServer]:
    with LLMockServer() as server:
        yield server


@pytest.fixture
def mock(server: LLMockServer) -> LLMock:
    return LLMock(server).reset()


made: list[Any] = []


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    for client in made:
        client.close()
    made.clear()


def upstream(name: str, **how: Any) -> Upstream:
    return Upstream(name, **{"provider": name, "retry": Retry(base=0.001, ceiling=0.01), **how})


def bound(up: Upstream, mock: LLMock) -> Any:
    kind: Any = openai.OpenAI if up.name == "openai" else anthropic.Anthropic
    client = up.bind(kind(base_url=mock.base_url(up.name), api_key="k", max_retries=4))
    made.append(client)
    return client


def create(client: Any, **how: Any) -> Any:
    if isinstance(client, openai.OpenAI):
        return client.chat.completions.create(model="gpt-4o", messages=SAY, **how)
    return client.messages.create(model="claude-sonnet-5", max_tokens=100, messages=SAY, **how)


def account(up: Upstream) -> Any:
    (desk,) = up.books
    return desk.account


@SIDES
def test_answers_come_whole_and_in_pieces(name: str, mock: LLMock) -> None:
    up = upstream(name)
    client = bound(up, mock)
    answer = create(client)
    used = answer.usage.completion_tokens if name == "openai" else answer.usage.output_tokens
    assert used > 0
    assert len(list(create(client, stream=True))) > 2
    assert left(up) == NOTHING
    assert account(up).breaker.state(0.0).value == "closed"


@SIDES
def test_refusals_and_faults_are_tried_again_here(name: str, mock: LLMock) -> None:
    mock.rate_limit(times=2, retry_after=0.01).fail(500, times=2)
    up = upstream(name)
    assert create(bound(up, mock)).usage
    assert len(mock.requests) == 5
    assert left(up) == NOTHING


@SIDES
def test_a_long_retry_after_is_handed_on_and_kept(name: str, mock: LLMock) -> None:
    mock.rate_limit(times=None, retry_after=86_400)
    up = upstream(name, longest_wait=10.0)
    client = bound(up, mock)
    with pytest.raises(openai.RateLimitError if name == "openai" else anthropic.RateLimitError):
        create(client)
    with pytest.raises(Overloaded):
        create(client)
    assert len(mock.requests) == 1
    assert left(up) == NOTHING


@SIDES
@pytest.mark.parametrize("fault", ["disconnect", "truncate", "corrupt"])
def test_streams_that_go_wrong_leave_nothing_behind(name: str, fault: str, mock: LLMock) -> None:
    getattr(mock, fault)(after_chunks=2, times=None)
    up = upstream(name, breaker=BreakerRules())
    client = bound(up, mock)
    for _ in range(3):
        try:
            with create(client, stream=True) as stream:
                list(stream)
        except Exception as error:  # noqa: BLE001 - which, is between the SDK and its server
            assert not isinstance(error, Overloaded)  # noqa: PT017
    assert left(up) == NOTHING


@SIDES
def test_an_outage_opens_the_breaker(name: str, mock: LLMock) -> None:
    mock.outage(status=500)
    up = upstream(name, retry=Retry(max_attempts=1))
    client = bound(up, mock)
    for _ in range(5):
        with pytest.raises((openai.InternalServerError, anthropic.InternalServerError)):
            create(client)
    with pytest.raises(Overloaded, match="breaker"):
        create(client)
    assert len(mock.requests) == 5
    assert left(up) == NOTHING
