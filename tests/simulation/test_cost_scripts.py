"""Random scripts of tasks on workers of different costs: no slot that may take a waiting task idles."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
from bench.cost import CostRun
from tests.support.task_plane import Agent, run_ready

from forebay import BackpressureSupervisor, Deadline, Priority, Task, Ticket, clock
from forebay.simulation import simulate
from forebay.supervisor.dispatcher import Dispatcher


def check_slots(dispatcher: Dispatcher) -> None:
    """Check that nothing waits in a queue for a slot that is free, and nothing is held that it makes at less cost."""
    held = 0
    for pool in dispatcher.core.pools.by_type.values():
        for worker in pool.workers:
            if not worker.can_accept() or pool.paused:
                continue
            entry = pool.first_for(worker)
            assert entry is None, f"{worker} is free for {entry}, which is queued"
            ticket = dispatcher.held.next_for(worker)
            assert ticket is None, f"{worker} is free for {ticket}, which is held"
        held += pool.held
    assert held == dispatcher.held.count


@pytest.mark.parametrize("seed", range(8))
def test_no_slot_idles_that_may_take_a_waiting_task(seed: int) -> None:
    rng = clock.new_random(seed)

    async def main() -> None:
        async with BackpressureSupervisor(max_cost_wait=rng.choice((0.0, 3.0, math.inf, math.inf))) as supervisor:
            for number in range(rng.randint(2, 4)):
                slots, options = rng.choice((1, 1, 2, 4)), dict[str, Any]()
                if rng.random() < 0.4:
                    options["reserve"] = rng.randint(1, slots)
                supervisor.register_worker(
                    f"worker {number}",
                    handler=Agent(rng.choice((0.5, 1.0, 2.0, 5.0, 10.0))),
                    task_types=["a", "b"] if number == 0 or rng.random() < 0.7 else [rng.choice("ab")],
                    cost=rng.choice((0.0, 0.001, 0.002, 0.02)),
                    max_concurrent=slots,
                    **options,
                )
            supervisor.register_worker("last", handler=Agent(1.0), task_types=["a", "b"], cost=0.05)
            dispatcher = supervisor._dispatcher
            assert dispatcher is not None
            tickets: list[Ticket] = []
            for number in range(400):
                await asyncio.sleep(rng.expovariate(rng.choice((0.3, 1.0, 3.0))))
                deadline = rng.choice((None, 3.0, 8.0, 15.0, 30.0, 60.0))
                tickets.append(
                    supervisor.submit_nowait(
                        Task(
                            rng.choice("ab"),
                            number,
                            priority=rng.choice((Priority.NORMAL, Priority.NORMAL, Priority.LOW, Priority.HIGH)),
                            deadline=None if deadline is None else Deadline.within(deadline),
                            thread_id=rng.choice((None, None, None, "thread")),
                        )
                    )
                )
                if rng.random() < 0.05:
                    rng.choice(tickets).cancel()
                await run_ready()
                check_slots(dispatcher)
            for ticket in tickets:
                if ticket:
                    await ticket
            statistics = supervisor.statistics()
            assert (statistics.held, statistics.waiting) == (0, 0)

    simulate(main, seed=seed)


def test_a_worker_that_was_skipped_with_one_that_the_start_gate_stopped_is_not_forgotten() -> None:
    """Both use one upstream, whose limit falls for a while; afterwards tasks wait, and the dear worker stands idle."""
    _, late = CostRun("learned", load=0.6, within=60.0, seed=1).result()
    assert late < 0.01
