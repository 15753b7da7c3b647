"""Calls to aimock from npm, an independent mock of OpenAI and Anthropic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import pytest
from tests.contract.sdks.aimock import Aimock, running
from tests.contract.sdks.sdk_harness import SDKS, CallPath, Sdk, SdkHarness, until
from tests.contract.sdks.test_faults import error_of
from tests.contract.sdks.test_llmock import OPENAI, tool_called, tool_of

from forebay.quota import Price

REPLY: Final = "The Danube rises in the Black Forest."


@pytest.fixture(scope="session")
def aimock_url() -> Iterator[str]:
    with running() as url:
        yield url


@pytest.fixture
def aimock(aimock_url: str) -> Aimock:
    return Aimock(aimock_url)


def saying(text: str) -> Any:
    return {"messages": [{"role": "user", "content": text}]}


def chaos(kind: str) -> Any:
    """Return the options that ask aimock for a fault, by a header that passes the gateway."""
    return {"extra_headers": {f"x-aimock-chaos-{kind}": "1"}}


def open_path(harness: SdkHarness, aimock: Aimock, **target: Any) -> CallPath:
    path = harness.open(aimock.url, **target)
    path.caller = path.caller.with_options(**aimock.options)
    return path


def test_whole_and_streamed_responses_arrive_and_are_metered(harness: SdkHarness, aimock: Aimock) -> None:
    path = open_path(harness, aimock, budget_usd=1e6, prices={"*": Price(input=1e6, output=1e6)})
    response = path.caller.create()
    assert (response.choices[0].message.content if harness.sdk.name == "openai" else response.content[0].text) == REPLY
    assert harness.sdk.used(response) == (11, 7)
    assert harness.sdk.text(path.caller.parts()) == REPLY
    assert len(aimock.requests) == 2
    assert path.is_idle()
    assert path.upstream.statistics().spent_usd == 2 * (11 + 7)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_tools_are_called(harness: SdkHarness, aimock: Aimock, stream: bool) -> None:  # noqa: FBT001
    path = open_path(harness, aimock)
    fields: Any = {"tools": [tool_of(harness.sdk)]}
    response = path.caller.parts(**fields) if stream else path.caller.create(**fields)
    assert tool_called(harness.sdk, response) == ("weather", {"city": "Paris"})
    assert path.is_idle()


@pytest.mark.parametrize("sdk", OPENAI, ids=str)
def test_responses_and_embeddings_arrive(harness: SdkHarness, aimock: Aimock) -> None:
    path = open_path(harness, aimock)
    fields: dict[str, Any] = {"model": "gpt-4o", "input": "Tell me of the longest."}
    assert path.caller.do(lambda client: client.responses.create(**fields)).output_text == REPLY
    parts = path.caller.read(lambda client: client.responses.create(stream=True, **fields))
    assert "".join(part.delta for part in parts if part.type == "response.output_text.delta") == REPLY
    assert parts[-1].response.usage.output_tokens == 7
    fields = {"model": "text-embedding-3-small", "input": "Rivers", "encoding_format": "float"}
    response = path.caller.do(lambda client: client.embeddings.create(**fields))
    assert response.data[0].embedding == [0.25, -0.5, 1.0]
    assert "gpt-4o" in [model.id for model in path.caller.read(lambda client: client.models.list())]
    assert path.is_idle()


def test_faults_are_retried(harness: SdkHarness, aimock: Aimock) -> None:
    path = open_path(harness, aimock)
    assert harness.sdk.used(path.caller.create(**saying("Are you busy?"))) == (11, 7)
    assert [entry["response"]["status"] for entry in aimock.requests] == [529, 500, 200]
    assert path.is_idle()


@pytest.mark.slow
@pytest.mark.parametrize("sdk", [sdk for sdk in SDKS if not sdk.awaits], ids=str)
def test_a_retry_after_is_respected(harness: SdkHarness, aimock: Aimock) -> None:
    path = open_path(harness, aimock)
    assert harness.sdk.used(path.caller.create(**saying("Do I ask too often?"))) == (11, 7)
    first, second = aimock.requests
    assert (first["response"]["status"], second["response"]["status"]) == (429, 200)
    assert second["timestamp"] - first["timestamp"] >= 1000  # ms, of its own clock
    assert path.is_idle()


@pytest.mark.parametrize("kind", ["drop", "disconnect"])
def test_chaos_is_retried_as_often_as_the_upstream_allows(harness: SdkHarness, aimock: Aimock, kind: str) -> None:
    path, bare = open_path(harness, aimock, max_attempts=2), harness.bare(aimock.url)
    error, other = (error_of(lambda caller=caller: caller.create(**chaos(kind))) for caller in (path.caller, bare))  # type: ignore[misc]
    assert len(aimock.requests) == 2
    assert isinstance(error, harness.sdk.module.APIError)
    if kind == "drop":  # it is a 500
        assert type(error) is type(other)
        assert error.body == other.body
    assert path.is_idle()


def test_an_invalid_response_is_passed_on_to_the_sdk(harness: SdkHarness, aimock: Aimock) -> None:
    path, bare = open_path(harness, aimock), harness.bare(aimock.url)
    error = error_of(lambda: path.caller.create(**chaos("malformed")))
    other = error_of(lambda: bare.create(**chaos("malformed")))
    assert type(error) is type(other)
    assert len(aimock.requests) == 1
    assert path.is_idle()


def test_a_stream_that_breaks_off_is_an_error(harness: SdkHarness, aimock: Aimock) -> None:
    path = open_path(harness, aimock)
    assert isinstance(error_of(lambda: path.caller.parts(**saying("Be cut off."))), harness.sdk.broken)
    assert len(aimock.requests) == 1  # a stream that has started is not retried
    assert path.is_idle()


@pytest.mark.parametrize("sdk", SDKS, ids=str)
def test_a_stream_may_be_closed_early(harness: SdkHarness, aimock: Aimock, sdk: Sdk) -> None:
    path = open_path(harness, aimock, max_concurrent=1)
    with path.caller.start_stream(**saying("Speak slowly.")):
        assert path.accounts[0].in_flight == 1
    assert path.is_idle()
    assert sdk.used(path.caller.create()) == (11, 7)
    until(lambda: len(aimock.requests) == 2)
