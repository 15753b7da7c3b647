"""How long callers wait, by their headers, their user agent, and earlier hang-ups."""

from __future__ import annotations

import pytest

from forebay.gateway.requests.client_timeouts import ClientTimeoutReader

HTTPX = {"user-agent": "python-httpx/0.28.1", "authorization": "Bearer a"}


@pytest.mark.parametrize(
    ("headers", "max_wait", "read_timeout"),
    [
        ({}, 299.0, 600.0),
        ({"x-stainless-read-timeout": "600"}, 599.0, 605.0),
        ({"x-stainless-read-timeout": "2.5"}, 2.25, 7.5),
        ({"x-stainless-timeout": "30"}, 29.0, 35.0),
        ({"x-stainless-read-timeout": "never"}, 299.0, 600.0),
        ({"x-stainless-read-timeout": "-1"}, 299.0, 600.0),
        ({"x-stainless-read-timeout": "1e12"}, 86_399.0, 86_405.0),
    ],
)
def test_timeouts_are_those_that_the_sdk_sends(headers: dict[str, str], max_wait: float, read_timeout: float) -> None:
    assert ClientTimeoutReader(300.0).read(0.0, headers) == (max_wait, read_timeout)


@pytest.mark.parametrize(
    ("user_agent", "max_wait"),
    [
        ("OpenAI/JS 7.59.0", 299.0),
        ("ai/7.0.173 ai-sdk-provider-utils/5.0.81 node.js/v20.20.2", 299.0),
        ("node", 299.0),
        ("Python/3.13 aiohttp/3.13.0", 299.0),
        ("curl/8.14.1", 1_199.0),
        ("", 1_199.0),
    ],
)
def test_a_client_that_does_not_say_waits_as_long_as_its_kind(user_agent: str, max_wait: float) -> None:
    assert ClientTimeoutReader(1_200.0).read(0.0, {"user-agent": user_agent}).max_wait == max_wait


def hang_up(reader: ClientTimeoutReader, *waits: float, headers: dict[str, str] = HTTPX) -> None:
    for waited in waits:
        reader.record_hang_up(100.0, headers, waited)


def test_three_hang_ups_after_equally_long_show_the_timeout_of_that_kind_of_client() -> None:
    reader = ClientTimeoutReader(300.0)
    hang_up(reader, 30.1, 30.0)
    assert reader.read(100.0, HTTPX).max_wait == 299.0
    hang_up(reader, 30.4)
    assert reader.read(100.0, HTTPX).max_wait == 29.0
    assert reader.read(100.0, HTTPX | {"authorization": "Bearer b"}).max_wait == 299.0


def test_a_learned_timeout_goes_before_what_nine_clients_of_ten_say() -> None:
    reader = ClientTimeoutReader(300.0)
    headers = {"user-agent": "OpenAI/Python 3.3.0", "x-stainless-read-timeout": "600"}
    assert reader.read(100.0, headers).max_wait == 599.0
    hang_up(reader, 100.1, 100.2, 100.3, headers=headers)
    assert reader.read(100.0, headers).max_wait == pytest.approx(99.1)


def test_nodes_fetch_gives_up_before_the_timeout_that_its_sdk_announces() -> None:
    headers = {"user-agent": "Anthropic/JS 1.14.0", "x-stainless-timeout": "600"}
    assert ClientTimeoutReader(300.0).read(0.0, headers) == (299.0, 605.0)
    assert ClientTimeoutReader(300.0).read(0.0, headers | {"x-stainless-timeout": "20"}).max_wait == 19.0


def test_cancellations_at_different_times_are_no_timeout() -> None:
    reader = ClientTimeoutReader(300.0)
    hang_up(reader, 5.0, 9.0, 17.0, 33.0, 61.0, 0.1, 0.1, 0.1, 0.1)
    assert reader.read(100.0, HTTPX).max_wait == 299.0


def test_callers_that_wait_longer_outvote_those_that_hang_up() -> None:
    reader = ClientTimeoutReader(300.0)
    hang_up(reader, 30.0, 30.1, 30.2)
    for _ in range(3):
        assert reader.read(100.0, HTTPX).max_wait == 29.0
        reader.record_answer(100.0, HTTPX, 80.0)
    assert reader.read(100.0, HTTPX).max_wait == 299.0


def test_a_learned_timeout_is_forgotten_after_ten_minutes_without_a_wait() -> None:
    reader = ClientTimeoutReader(300.0)
    hang_up(reader, 30.0, 30.1, 30.2)
    assert reader.read(700.0, HTTPX).max_wait == 29.0
    assert reader.read(700.1, HTTPX).max_wait == 299.0


def test_a_thousand_kinds_of_clients_are_remembered() -> None:
    reader = ClientTimeoutReader(300.0)
    hang_up(reader, 30.0, 30.1, 30.2)
    for number in range(999):
        hang_up(reader, 30.0, headers={"user-agent": f"agent {number}"})
    assert reader.read(100.0, HTTPX).max_wait == 29.0
    hang_up(reader, 30.0, headers={"user-agent": "agent 999"})
    assert reader.read(100.0, HTTPX).max_wait == 299.0


ANNOUNCED = {"user-agent": "OpenAI/Python 3.3.0", "x-stainless-read-timeout": "600"}


@pytest.mark.parametrize(("headers", "longest"), [(HTTPX, 299.0), (ANNOUNCED, 599.0)])
def test_one_call_in_ten_may_wait_longer_than_others_of_its_kind_did(headers: dict[str, str], longest: float) -> None:
    reader = ClientTimeoutReader(300.0)
    hang_up(reader, 30.0, 30.1, 30.2, headers=headers)
    waits = [reader.read(100.0, headers).max_wait for _ in range(20)]
    assert waits == [29.0] * 9 + [longest] + [29.0] * 9 + [longest]


def test_an_answer_that_was_read_after_the_latest_hang_up_shows_a_longer_timeout() -> None:
    reader = ClientTimeoutReader(300.0)
    hang_up(reader, 30.0, 30.1, 30.2, headers=ANNOUNCED)
    reader.record_answer(100.0, ANNOUNCED, 30.2)
    assert reader.read(100.0, ANNOUNCED).max_wait == 29.0
    reader.record_answer(100.0, ANNOUNCED, 30.3)
    assert reader.read(100.0, ANNOUNCED).max_wait == 599.0


def test_callers_that_announce_a_longer_timeout_are_believed_once_a_tenth_of_their_kind_waits_longer() -> None:
    reader = ClientTimeoutReader(300.0)
    hang_up(reader, *[30.0] * 20, headers=ANNOUNCED)
    reader.record_answer(100.0, ANNOUNCED, 80.0)
    assert reader.read(100.0, ANNOUNCED).max_wait == 29.0
    reader.record_answer(100.0, ANNOUNCED, 80.0)
    assert reader.read(100.0, ANNOUNCED).max_wait == 599.0
    assert reader.read(100.0, ANNOUNCED | {"x-stainless-read-timeout": "20"}).max_wait == 19.0
    hang_up(reader, *[30.0] * 20, headers=ANNOUNCED)
    assert reader.read(100.0, ANNOUNCED).max_wait == 29.0
