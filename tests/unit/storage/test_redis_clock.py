"""The difference between the wall clock of this process and that of a Redis server."""

from __future__ import annotations

import pytest

from forebay.storage import redis_clock
from forebay.storage.redis_clock import RedisClock


class Machine:
    """The clocks of this machine, and the server's.

    Attributes:
        now: monotonic seconds.
        wall: epoch seconds here at monotonic 0.
        server: epoch seconds there at monotonic 0.
        duration: seconds that the server takes to answer.
    """

    def __init__(self) -> None:
        self.now, self.wall, self.server, self.duration = 500.0, 1e9, 1e9, 0.0

    def ask(self) -> float:
        self.now += self.duration / 2
        seconds = self.server + self.now
        self.now += self.duration / 2
        return seconds


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(redis_clock, "monotonic", lambda: machine.now)
    monkeypatch.setattr(redis_clock, "wall_time", lambda: machine.wall + machine.now)
    return machine


@pytest.mark.parametrize(
    ("skew", "ahead"), [(0.0, 0.0), (0.9, 0.0), (-0.9, 0.0), (1.2, 1.0), (60.4, 60.0), (-86_400.0, -86_400.0)]
)
def test_it_is_in_whole_seconds_and_zero_for_clocks_that_agree(machine: Machine, skew: float, ahead: float) -> None:
    clock = RedisClock()
    assert clock.ahead() == 0.0
    machine.wall += skew
    clock.measure(machine.ask)
    assert clock.ahead() == ahead


def test_it_stays_while_the_clocks_drift_by_less_than_a_second(machine: Machine) -> None:
    clock = RedisClock()
    machine.wall += 10.4
    clock.measure(machine.ask)
    assert clock.ahead() == 10.0
    for drift in (0.2, 0.2, -0.5, -0.8):
        machine.wall += drift
        assert clock.ahead() == 10.0


def test_it_follows_the_clock_of_this_machine_at_once_and_is_measured_again(machine: Machine) -> None:
    clock = RedisClock()
    clock.measure(machine.ask)
    assert not clock.is_due()
    machine.wall -= 3_600.0
    assert clock.ahead() == -3_600.0
    assert clock.is_due()


def test_it_follows_the_clock_of_the_server_when_it_is_measured(machine: Machine) -> None:
    clock = RedisClock()
    clock.measure(machine.ask)
    machine.server += 30.0
    machine.now += 9.0
    assert not clock.is_due()
    machine.now += 1.0
    assert clock.is_due()
    clock.measure(machine.ask)
    assert clock.ahead() == -30.0


def test_a_server_that_does_not_tell_its_time_is_taken_to_agree(machine: Machine) -> None:
    clock = RedisClock()
    machine.wall += 50.0
    clock.measure(lambda: None)
    assert clock.ahead() == 0.0
    assert not clock.is_due()


def test_a_slow_answer_is_not_believed(machine: Machine) -> None:
    clock = RedisClock()
    machine.duration = 1.5
    clock.measure(machine.ask)
    assert clock.is_due()
    machine.duration, machine.wall = 0.8, machine.wall + 20.0
    clock.measure(machine.ask)
    assert clock.ahead() == 20.0
