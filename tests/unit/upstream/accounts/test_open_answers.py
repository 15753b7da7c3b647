"""Streaming answers that hold permits: when they are looked for, and how often garbage is collected for them."""

from __future__ import annotations

import math

from forebay.upstream.accounts.open_answers import OpenAnswers


class Answer:
    """An answer that its reader last read at a given time."""

    def __init__(self, unread_since: float = 0.0) -> None:
        self.unread_since = unread_since
        self.settled = False


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


def test_collections_that_release_nothing_become_rare() -> None:
    answers, kept = OpenAnswers(), Answer(0.0)
    answers.add(kept)
    moments = [second for second in range(1000) if answers.begin_collection(float(second))]
    assert len(moments) <= 22
    assert moments[-1] - moments[-2] == 60


def test_a_collection_that_releases_some_is_soon_followed_by_another() -> None:
    answers, kept = OpenAnswers(), [Answer(0.0) for _ in range(3)]
    for answer in kept:
        answers.add(answer)
    assert answers.begin_collection(10.0)
    kept.pop().settled = True
    assert answers.begin_collection(12.0)
    assert not answers.begin_collection(12.5)
    assert answers.begin_collection(13.0)
