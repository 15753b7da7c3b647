"""The samples that a side of the demo writes about itself."""

from __future__ import annotations

import msgspec

from demo.provider import Provider
from demo.sample import Instructions, Sample, Side, pace, refused
from demo.settings import ENDLESS, Settings


def sample(t: float, done: int) -> Sample:
    return Sample(t=t, stage="surge", done=done)


def test_the_pace_of_nothing_is_nought() -> None:
    assert pace([]) == 0.0
    assert pace([sample(0, 0)]) == 0.0


def test_the_pace_is_what_was_done_in_the_last_window_a_minute() -> None:
    steady = [sample(t, 2 * t) for t in range(60)]
    assert pace(steady) == 120.0
    stopped = [*steady, *(sample(t, 118) for t in range(60, 90))]
    assert pace(stopped) == 0.0


def test_early_on_the_pace_is_over_as_long_as_there_is() -> None:
    assert pace([sample(0, 0), sample(5, 10)]) == 120.0


def test_what_was_refused_lately_is_a_share_of_what_was_sent_lately() -> None:
    samples = [Sample(t=float(t), stage="surge", calls=10 * t, calls_429=5 * min(t, 60)) for t in range(100)]
    assert refused(samples[:50]) == 0.5
    assert refused(samples) == 0.0
    assert refused([]) == refused(samples[:1]) == 0.0


def test_tokens_are_useless_until_the_task_that_they_are_of_is_done() -> None:
    assert Sample(t=1.0, stage="surge").useless == 0.0
    assert Sample(t=1.0, stage="surge", input_tokens=300, output_tokens=100).useless == 1.0
    assert Sample(t=1.0, stage="surge", input_tokens=300, output_tokens=100, useful_tokens=300).useless == 0.25


def test_orders_and_samples_survive_the_wire() -> None:
    instructions = Instructions(
        side=Side.RESUME, settings=Settings(seconds=ENDLESS), provider=Provider(url="http://127.0.0.1:1")
    )
    assert msgspec.json.decode(msgspec.json.encode(instructions), type=Instructions) == instructions
    samples = Sample(t=1.5, stage="draining", done_by=(1, 2, 3, 4), latencies=(0.5,), workers={"busy": 3})
    assert msgspec.json.decode(msgspec.json.encode(samples), type=Sample) == samples


def test_the_draining_is_a_part_of_the_time_and_shorter_on_a_faster_provider() -> None:
    assert Settings().drain == 16.0
    assert Settings(speed=4.0).drain == 4.0
    assert Settings(seconds=8.0).drain == 2.0
