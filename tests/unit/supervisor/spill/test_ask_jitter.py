"""How long a process waits before it asks a store that others use too."""

from __future__ import annotations

from forebay.supervisor.spill.ask_jitter import AskJitter


def test_the_window_doubles_with_each_question_in_vain_up_to_its_bound() -> None:
    jitter = AskJitter(min_window=2.0, max_window=10.0)
    windows = []
    for _ in range(5):
        windows.append(jitter.delay(1.0))
        jitter.record(found=False)
    assert windows == [2.0, 4.0, 8.0, 10.0, 10.0]
    assert jitter.delay(0.0) == 0.0
    assert jitter.delay(0.5) == 5.0


def test_the_window_is_the_smallest_again_when_there_was_something() -> None:
    jitter = AskJitter(min_window=2.0, max_window=10.0)
    jitter.record(found=False)
    jitter.record(found=True)
    assert jitter.delay(1.0) == 2.0
