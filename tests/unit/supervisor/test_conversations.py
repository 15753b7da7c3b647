"""Conversations inside a supervisor: who is first, who is parked, and what it costs to leave."""

from __future__ import annotations

import time
from typing import Any

from forebay import Task
from forebay.supervisor.conversations import Conversations
from forebay.supervisor.ticket import Ticket


def enter(conversations: Conversations, count: int) -> list[Ticket]:
    dispatcher: Any = None
    tickets = [Ticket(dispatcher, Task("work", thread_id="alice"), None, None) for _ in range(count)]
    for ticket in tickets:
        conversations.enter(ticket)
    return tickets


def test_the_first_one_goes_on_and_the_next_follows_it_whoever_has_left_between() -> None:
    conversations = Conversations()
    first, second, third, fourth = enter(conversations, 4)
    assert not conversations.is_parked(first)
    conversations.remove_parked(second)
    conversations.remove_parked(fourth)
    assert [conversations.is_parked(ticket) for ticket in (first, second, third, fourth)] == [False, False, True, False]
    assert conversations.end_first(third) is None
    assert conversations.end_first(first) is third
    assert conversations.end_first(third) is None
    assert conversations.get("alice") is None


def seconds_to_leave(count: int) -> float:
    conversations = Conversations()
    _, *parked = enter(conversations, count)
    started = time.process_time()
    for ticket in reversed(parked[: count // 2]):
        assert conversations.is_parked(ticket)
        conversations.remove_parked(ticket)
    return time.process_time() - started


def test_leaving_the_middle_of_a_conversation_costs_the_same_however_long_it_is() -> None:
    short, long = (min(seconds_to_leave(count) for _ in range(3)) for count in (1_000, 20_000))
    assert long / 20 < 6 * short  # it is 20 times and more if each is searched for
