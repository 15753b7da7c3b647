"""The simulated provider in an event loop: awaited, cancelled and streamed, in virtual and in real time."""

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
    """Return a provider in which a call of n tokens takes 1 + n / 10 seconds."""
    settings: dict[str, Any] = {"slots": 2, "ttft": 1.0, "tpot": 0.1, "noise": 0.0} | rest
    return ProviderConfig(**settings)


async def one(provider: SimulatedProvider, output_tokens: int = 10, **rest: Any) -> CompletedCall:
    return await provider.call(model="gpt-4o", input_tokens=5, output_tokens=output_tokens, **rest)


def test_a_call_returns_its_duration() -> None:
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
        statistics = provider.statistics()
        assert (statistics.hung_up, statistics.finished, statistics.in_flight) == (1, 1, 0)
        assert statistics.wasted_output_tokens == 1

    simulate(main)


def test_a_refusal_is_raised_with_its_http_response_after_the_delay() -> None:
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


def test_a_cut_call_reports_its_output_tokens() -> None:
    async def main() -> AnswerCut:
        provider = SimulatedProvider(config(faults=Faults(late_error=1.0)))
        with pytest.raises(AnswerCut) as caught:
            await one(provider, 50)
        return caught.value

    broken = simulate(main)
    assert 1 <= broken.usage.output_tokens < 50
    assert broken.reported


def test_a_stream_is_read_while_tokens_are_produced_and_hangs_up_on_exit() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        provider = SimulatedProvider(config(tokens_per_event=5))
        call = SimulatedCall(model="gpt-4o", input_tokens=5, output_tokens=11, stream=True)
        events = []
        with await provider.open(call) as answer:
            async for event in answer:
                tokens = event.tokens if isinstance(event, TokensProduced) else int(isinstance(event, FirstToken))
                events.append((round(loop.time(), 3), tokens))
        assert events == [(1.0, 1), (1.5, 5), (2.0, 5), (2.1, 0)]
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


def test_an_outage_with_cut_wakes_waiting_callers() -> None:
    async def main() -> None:
        provider = SimulatedProvider(config(capacity_steps=(CapacityStep(at=1.5, slots=0, cut=True),)))
        call = SimulatedCall(model="gpt-4o", input_tokens=5, output_tokens=11)
        with await provider.open(call) as answer:
            events = [event async for event in answer]
        assert isinstance(events[-1], CallCut)
        assert asyncio.get_running_loop().time() == pytest.approx(1.5)

    simulate(main)


def test_statistics_are_current() -> None:
    async def main() -> None:
        provider = SimulatedProvider(config())
        waiting = asyncio.create_task(one(provider, run="r"))
        await asyncio.sleep(0.5)
        assert provider.statistics().now == pytest.approx(0.5)
        assert provider.statistics().in_flight == 1
        await waiting
        assert provider.bills()["r"].output_tokens == 10

    simulate(main)


async def test_it_works_in_a_real_event_loop() -> None:
    provider = SimulatedProvider(config(ttft=0.01, tpot=0.001, slots=50))
    done = await asyncio.gather(*(one(provider, stream=True) for _ in range(20)))
    assert all(0.02 <= completion.duration < 1.0 for completion in done)
    async with asyncio.timeout(5):
        events = [
            event async for event in await provider.open(SimulatedCall(model="gpt-4o", input_tokens=1, output_tokens=3))
        ]
    assert isinstance(events[-1], CallCompleted)


def useful_share(limit: int | None, seed: int) -> float:
    """Return the share of output that reaches clients at three times the capacity, for four minutes.

    Clients cancel after 30 s and retry at once. With a limit, at most `limit` calls are in flight.
    """
    slots, seconds = 10, 240.0

    async def main() -> float:
        provider = SimulatedProvider(config(slots=slots, ttft=0.5, tpot=0.03), seed)
        traffic, loop = Traffic.conversation(), asyncio.get_running_loop()
        rng = provider._model._noise
        in_flight = asyncio.Semaphore(limit or 10**6)

        async def client() -> None:
            input_tokens, output_tokens = traffic.lengths(rng)
            while loop.time() < seconds:
                try:
                    async with in_flight, asyncio.timeout(30.0):
                        await provider.call(model="gpt-4o", input_tokens=input_tokens, output_tokens=output_tokens)
                except TimeoutError:
                    continue
                return

        async with asyncio.TaskGroup() as group:
            while loop.time() < seconds:
                group.create_task(client())
                await asyncio.sleep(traffic.interarrival(rng, 3 * slots / 6.83))
        statistics = provider.statistics()
        return 1.0 - statistics.wasted_output_tokens / statistics.output_tokens

    return simulate(main, seed=seed)


def test_the_simulated_provider_is_not_too_lenient() -> None:
    """The negative control of all simulations: without a limit, overload makes goodput collapse."""
    assert useful_share(limit=None, seed=1) < 0.3
    assert useful_share(limit=10, seed=1) > 0.98
