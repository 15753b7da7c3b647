"""The surge: which tasks there are, and that the seed repeats them."""

from __future__ import annotations

from collections import Counter

from demo.workload import MIX, STEPS, surge


def test_the_same_seed_gives_the_same_surge() -> None:
    assert surge(200, 3) == surge(200, 3)


def test_another_seed_gives_another_surge() -> None:
    ours, theirs = surge(200, 3), surge(200, 4)
    assert [job.lengths for job in ours] != [job.lengths for job in theirs]
    assert not {job.task_id for job in ours} & {job.task_id for job in theirs}


def test_a_smaller_surge_is_as_large_as_asked_and_every_task_has_its_own_name() -> None:
    jobs = surge(17, 1)
    assert len(jobs) == len({job.task_id for job in jobs}) == 17


def test_priorities_are_mixed_as_promised() -> None:
    counted = Counter(job.priority for job in surge(10_000, 7))
    for priority, percent in MIX.items():
        assert abs(counted[priority] / 100 - percent) < 2


def test_each_call_has_an_answer_of_a_length_seen_in_real_traffic() -> None:
    for job in surge(500, 7):
        assert len(job.lengths) == len(STEPS)
        assert all(7 <= length <= 1000 for length in job.lengths)


def test_a_payload_is_the_input_of_the_graph_and_can_travel() -> None:
    job = surge(1, 7)[0]
    assert job.payload() == {"task_id": job.task_id, "topic": job.topic, "lengths": list(job.lengths)}
