"""Workers of a gateway: when those that die are started again."""

from __future__ import annotations

import os

from forebay.gateway.workers.worker_processes import announce_ready, restart_delay


def test_a_worker_that_dies_again_and_again_is_started_later_each_time_but_within_half_a_minute() -> None:
    delays = [restart_delay(deaths) for deaths in range(1, 20)]
    assert delays[:3] == [0.25, 0.5, 1.0]
    assert delays == sorted(delays)
    assert delays[-1] == 30.0


def test_a_worker_that_is_ready_after_its_parent_has_died_does_not_fail_of_that() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    announce_ready(writer, 1)
    os.close(writer)
