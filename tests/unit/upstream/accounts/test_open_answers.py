"""Streaming answers that hold permits: when they are looked for, and how often garbage is collected for them."""

from __future__ import annotations

import math

from forebay.upstream.accounts.open_answers import OpenAnswers


class Answer:
    """An answer that its reader last read at a given time."""

    def __init__(self, unread_since: float = 0.0) -> None:
        self.unread_since = unread_since
        self.settled = False

    def take_back(self) -> None:
        self.settled = True


def test_without_answers_there_is_nothing_to_look_for() -> None:
    answers = OpenAnswers()
    assert answers.next_look(0.0) is None
    assert not answers.begin_collection(0.0)


def test_an_answer_that_was_dropped_or_has_ended_is_not_looked_for() -> None:
    answers = OpenAnswers()
    answers.add(Answer())
    ended = Answer()
    answers.add(ended)
    assert answers.next_look(0.0) == 1.0
    ended.settled = True
    assert answers.next_look(0.0) is None


def test_garbage_is_collected_once_an_answer_has_not_been_read_for_a_second() -> None:
    answers, read, unread = OpenAnswers(), Answer(math.inf), Answer(5.0)
    answers.add(read)
    assert not answers.begin_collection(100.0)
    answers.add(unread)
    assert not answers.begin_collection(5.5)
    assert answers.begin_collection(6.0)
    assert answers.unread(6.0) == 1


def test_an_answer_that_is_not_read_for_half_a_minute_is_overdue() -> None:
    answers, unread, read = OpenAnswers(), Answer(5.0), Answer(math.inf)
    answers.add(unread)
    answers.add(read)
    assert answers.overdue(34.9) == []
    assert answers.overdue(35.0) == [unread]
    unread.take_back()
    assert answers.overdue(35.0) == []


def test_where_calls_may_not_wait_for_long_it_is_overdue_sooner() -> None:
    answers, unread = OpenAnswers(patience=2.0), Answer(5.0)
    answers.add(unread)
    assert answers.overdue(7.0) == [unread]


def test_collections_that_release_nothing_become_rare() -> None:
    answers, kept = OpenAnswers(), Answer(0.0)
    answers.add(kept)
    moments = [second for second in range(1000) if answers.begin_collection(float(second))]
    assert len(moments) <= 22
    assert moments[-1] - moments[-2] == 60


def test_slow_readers_do_not_make_collections_frequent() -> None:
    answers, moments = OpenAnswers(), []
    readers = [Answer() for _ in range(10)]
    for reader in readers:
        answers.add(reader)
    for second in range(1000):
        readers[second % 10].unread_since = float(second)  # each reads once in ten seconds
        if answers.begin_collection(float(second)):
            moments.append(second)
    assert len(moments) <= 22


def test_a_collection_that_releases_some_is_soon_followed_by_another() -> None:
    answers, kept = OpenAnswers(), Answer(0.0)
    answers.add(kept)
    assert answers.begin_collection(10.0)
    assert not answers.begin_collection(11.9)
    assert answers.begin_collection(12.0)
    answers.record_abandoned(0.5)  # closed by a reader who had just read it
    answers.record_abandoned(1.5)
    assert answers.begin_collection(16.0)
    assert not answers.begin_collection(16.9)
    assert answers.begin_collection(17.0)
