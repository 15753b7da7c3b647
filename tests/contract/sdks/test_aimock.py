"""aimock from npm, another provider that nobody here wrote, in the shapes of OpenAI and of Anthropic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import pytest
from tests.contract.sdks.aimock import Aimock, running
from tests.contract.sdks.sdk_harness import SDKS, CallPath, Sdk, SdkHarness, until
from tests.contract.sdks.test_faults import error_of
from tests.contract.sdks.test_llmock import OPENAI, tool_called, tool_of

from forebay.quota import Price

SAID: Final = "The Danube rises in the Black Forest."


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
    """Its faults, asked for by header: they pass the gateway as any other."""
    return {"extra_headers": {f"x-aimock-chaos-{kind}": "1"}}


def opened(house: SdkHarness, aimock: Aimock, **target: Any) -> CallPath:
    way = house.open(aimock.url, **target)
    way.caller = way.caller.with_options(**aimock.options)
    return way


def test_answers_come_whole_and_in_pieces_and_are_metered(house: SdkHarness, aimock: Aimock) -> None:
    way = opened(house, aimock, budget_usd=1e6, prices={"*": Price(input=1e6, output=1e6)})
    answer = way.caller.create()
    assert (answer.choices[0].message.content if house.sdk.name == "openai" else answer.content[0].text) == SAID
    assert house.sdk.used(answer) == (11, 7)
    assert house.sdk.text(way.caller.parts()) == SAID
    assert len(aimock.asked) == 2
    assert way.is_idle()
    assert way.upstream.statistics().spent_usd == 2 * (11 + 7)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_tools_are_called(house: SdkHarness, aimock: Aimock, stream: bool) -> None:  # noqa: FBT001
    way = opened(house, aimock)
    ask: Any = {"tools": [tool_of(house.sdk)]}
    answer = way.caller.parts(**ask) if stream else way.caller.create(**ask)
    assert tool_called(house.sdk, answer) == ("weather", {"city": "Paris"})
    assert way.is_idle()


@pytest.mark.parametrize("sdk", OPENAI, ids=str)
def test_responses_and_embeddings_come(house: SdkHarness, aimock: Aimock) -> None:
    way = opened(house, aimock)
    ask: dict[str, Any] = {"model": "gpt-4o", "input": "Tell me of the longest."}
    assert way.caller.do(lambda client: client.responses.create(**ask)).output_text == SAID
    parts = way.caller.read(lambda client: client.responses.create(stream=True, **ask))
    assert "".join(part.delta for part in parts if part.type == "response.output_text.delta") == SAID
    assert parts[-1].response.usage.output_tokens == 7
    ask = {"model": "text-embedding-3-small", "input": "Rivers", "encoding_format": "float"}
    answer = way.caller.do(lambda client: client.embeddings.create(**ask))
    assert answer.data[0].embedding == [0.25, -0.5, 1.0]
    assert "gpt-4o" in [model.id for model in way.caller.read(lambda client: client.models.list())]
    assert way.is_idle()


def test_faults_are_mended_on_the_way(house: SdkHarness, aimock: Aimock) -> None:
    way = opened(house, aimock)
    assert house.sdk.used(way.caller.create(**saying("Are you busy?"))) == (11, 7)
    assert [entry["response"]["status"] for entry in aimock.asked] == [529, 500, 200]
    assert way.is_idle()


@pytest.mark.slow
@pytest.mark.parametrize("sdk", [sdk for sdk in SDKS if not sdk.awaits], ids=str)
def test_a_retry_after_is_waited_for(house: SdkHarness, aimock: Aimock) -> None:
    way = opened(house, aimock)
    assert house.sdk.used(way.caller.create(**saying("Do I ask too often?"))) == (11, 7)
    first, second = aimock.asked
    assert (first["response"]["status"], second["response"]["status"]) == (429, 200)
    assert second["timestamp"] - first["timestamp"] >= 1000  # ms, of its own clock
    assert way.is_idle()


@pytest.mark.parametrize("kind", ["drop", "disconnect"])
def test_chaos_is_asked_as_often_as_the_upstream_says(house: SdkHarness, aimock: Aimock, kind: str) -> None:
    way, bare = opened(house, aimock, max_attempts=2), house.bare(aimock.url)
    error, other = (error_of(lambda who=who: who.create(**chaos(kind))) for who in (way.caller, bare))  # type: ignore[misc]
    assert len(aimock.asked) == 2
    assert isinstance(error, house.sdk.module.APIError)
    if kind == "drop":  # it is a 500
        assert type(error) is type(other)
        assert error.body == other.body
    assert way.is_idle()


def test_garbage_for_an_answer_is_the_sdks_to_judge(house: SdkHarness, aimock: Aimock) -> None:
    way, bare = opened(house, aimock), house.bare(aimock.url)
    error, other = (error_of(lambda who=who: who.create(**chaos("malformed"))) for who in (way.caller, bare))  # type: ignore[misc]
    assert type(error) is type(other)
    assert len(aimock.asked) == 1
    assert way.is_idle()


def test_a_stream_that_breaks_off_is_never_taken_for_whole(house: SdkHarness, aimock: Aimock) -> None:
    way = opened(house, aimock)
    assert isinstance(error_of(lambda: way.caller.parts(**saying("Be cut off."))), house.sdk.broken)
    assert len(aimock.asked) == 1  # what has begun is not asked for again
    assert way.is_idle()


@pytest.mark.parametrize("sdk", SDKS, ids=str)
def test_a_stream_is_given_up_half_way(house: SdkHarness, aimock: Aimock, sdk: Sdk) -> None:
    way = opened(house, aimock, max_concurrent=1)
    with way.caller.begin(**saying("Speak slowly.")):
        assert way.accounts[0].in_flight == 1
    assert way.is_idle()
    assert sdk.used(way.caller.create()) == (11, 7)
    until(lambda: len(aimock.asked) == 2)
