"""Workers of a gateway: when those that die are started again."""

from __future__ import annotations

from forebay.gateway.worker_processes import restart_delay


def test_a_worker_that_dies_again_and_again_is_started_later_each_time_but_within_half_a_minute() -> None:
    delays = [restart_delay(deaths) for deaths in range(1, 20)]
    assert delays[:3] == [0.25, 0.5, 1.0]
    assert delays == sorted(delays)
    assert delays[-1] == 30.0
