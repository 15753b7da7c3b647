"""The simulated provider inside a loop: awaited, cancelled, read as a stream, in virtual time and in real."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from forebay.simulation import Deadlock, simulate
from forebay.simulation.provider.fault_plan import RefusalReason
from forebay.simulation.provider.provider_config import CapacityStep, Faults, ProviderConfig
from forebay.simulation.provider.simulated_call import CallCompleted, CallCut, FirstToken, SimulatedCall, TokensProduced
from forebay.simulation.provider.simulated_provider import AnswerCut, CompletedCall, ProviderRefusal, SimulatedProvider
from forebay.simulation.provider.traffic import Traffic


def config(**rest: Any) -> ProviderConfig:
    """A call of n tokens takes 1 + n / 10 seconds."""
    settings: dict[str, Any] = {"slots": 2, "ttft": 1.0, "tpot": 0.1, "noise": 0.0} | rest
    return ProviderConfig(**settings)


async def one(provider: SimulatedProvider, output_tokens: int = 10, **rest: Any) -> CompletedCall:
    return await provider.call(model="gpt-4o", input_tokens=5, output_tokens=output_tokens, **rest)


def test_a_call_takes_its_time_and_says_so() -> None:
    async def main() -> None:
        await asyncio.sleep(7.25)
        completion = await one(SimulatedProvider(config()))
        assert completion.ttft == pytest.approx(1.0)
        assert completion.duration == pytest.approx(2.0)
        assert completion.usage.output_tokens == 10
        assert asyncio.get_running_loop().time() == pytest.approx(9.25)

    simulate(main)


def test_calls_share_the_slots() -> None:
    async def main() -> list[CompletedCall]:
        provider = SimulatedProvider(config(slots=2))
        return await asyncio.gather(*(one(provider) for _ in range(4)))

    assert [done.duration for done in simulate(main)] == pytest.approx([4.0] * 4)


def test_a_cancelled_call_hangs_up() -> None:
    async def main() -> None:
        provider = SimulatedProvider(config(slots=1))
        gone, stays = asyncio.create_task(one(provider)), asyncio.create_task(one(provider))
        await asyncio.sleep(2.0)
        gone.cancel()
        assert (await stays).duration == pytest.approx(3.0)
        assert gone.cancelled()
        told = provider.statistics()
        assert (told.hung_up, told.finished, told.in_flight, told.wasted_output_tokens) == (1, 1, 0, 1)

    simulate(main)


def test_a_refusal_is_raised_as_it_goes_over_the_wire_after_a_moment() -> None:
    async def main() -> ProviderRefusal:
        provider = SimulatedProvider(config(slots=0, refusal_delay=0.05))
        with pytest.raises(ProviderRefusal) as caught:
            await one(provider)
        assert asyncio.get_running_loop().time() == pytest.approx(0.05, abs=1e-4)
        return caught.value

    refusal = simulate(main)
    assert (refusal.status, refusal.reason, refusal.retry_after) == (503, RefusalReason.OVERLOADED, None)
    assert b"overloaded" in refusal.body
    assert refusal.headers["content-type"] == "application/json"


def test_a_broken_call_says_how_far_it_came() -> None:
    async def main() -> AnswerCut:
        provider = SimulatedProvider(config(faults=Faults(late_error=1.0)))
        with pytest.raises(AnswerCut) as caught:
            await one(provider, 50)
        return caught.value

    broken = simulate(main)
    assert 1 <= broken.usage.output_tokens < 50
    assert broken.reported


def test_a_stream_is_read_while_it_is_made_and_hung_up_when_left() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        provider = SimulatedProvider(config(tokens_per_event=5))
        call = SimulatedCall(model="gpt-4o", input_tokens=5, output_tokens=11, stream=True)
        told = []
        with await provider.open(call) as answer:
            async for event in answer:
                tokens = event.tokens if isinstance(event, TokensProduced) else int(isinstance(event, FirstToken))
                told.append((round(loop.time(), 3), tokens))
        assert told == [(1.0, 1), (1.5, 5), (2.0, 5), (2.1, 0)]
        with await provider.open(call) as answer:
            await anext(answer)
        assert provider.statistics().hung_up == 1
        with pytest.raises(StopAsyncIteration):
            await anext(answer)

    simulate(main)


def test_an_idle_provider_holds_no_timer() -> None:
    async def main() -> None:
        provider = SimulatedProvider(config(capacity_steps=(CapacityStep(at=1000.0, slots=1),)))
        await one(provider)
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Deadlock):
        simulate(main)


def test_an_outage_that_cuts_wakes_those_who_wait() -> None:
    async def main() -> None:
        provider = SimulatedProvider(config(capacity_steps=(CapacityStep(at=1.5, slots=0, cut=True),)))
        call = SimulatedCall(model="gpt-4o", input_tokens=5, output_tokens=11)
        with await provider.open(call) as answer:
            events = [event async for event in answer]
        assert isinstance(events[-1], CallCut)
        assert asyncio.get_running_loop().time() == pytest.approx(1.5)

    simulate(main)


def test_statistics_are_of_now() -> None:
    async def main() -> None:
        provider = SimulatedProvider(config())
        waiting = asyncio.create_task(one(provider, run="r"))
        await asyncio.sleep(0.5)
        assert provider.statistics().now == pytest.approx(0.5)
        assert provider.statistics().in_flight == 1
        await waiting
        assert provider.bills()["r"].output_tokens == 10

    simulate(main)


async def test_it_lives_in_a_real_loop_too() -> None:
    provider = SimulatedProvider(config(ttft=0.01, tpot=0.001, slots=50))
    done = await asyncio.gather(*(one(provider, stream=True) for _ in range(20)))
    assert all(0.02 <= completion.duration < 1.0 for completion in done)
    async with asyncio.timeout(5):
        events = [
            event async for event in await provider.open(SimulatedCall(model="gpt-4o", input_tokens=1, output_tokens=3))
        ]
    assert isinstance(events[-1], CallCompleted)


def surge(gate: int | None, seed: int) -> float:
    """Finished work over capacity when three times the capacity is offered for four minutes, by clients who give up
    after 30 s and come again at once; with a gate, no more than `gate` calls are made at a time.
    """
    slots, seconds = 10, 240.0

    async def main() -> float:
        provider = SimulatedProvider(config(slots=slots, ttft=0.5, tpot=0.03), seed)
        traffic, loop = Traffic.conversation(), asyncio.get_running_loop()
        rng = provider._provider._noise
        room = asyncio.Semaphore(gate or 10**6)

        async def client() -> None:
            wants = traffic.lengths(rng)
            while loop.time() < seconds:
                try:
                    async with room, asyncio.timeout(30.0):
                        await provider.call(model="gpt-4o", input_tokens=wants[0], output_tokens=wants[1])
                except TimeoutError:
                    continue
                return

        async with asyncio.TaskGroup() as group:
            while loop.time() < seconds:
                group.create_task(client())
                await asyncio.sleep(traffic.interarrival(rng, 3 * slots / 6.83))
        told = provider.statistics()
        return 1.0 - told.wasted_output_tokens / told.output_tokens

    return simulate(main, seed=seed)


def test_the_plant_is_not_too_kind() -> None:
    """The negative control of everything that is proved on it: without a limit, overload is a collapse."""
    assert surge(gate=None, seed=1) < 0.3
    assert surge(gate=10, seed=1) > 0.98
