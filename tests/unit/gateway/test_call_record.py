"""The record of a call: how long it has waited."""

from __future__ import annotations

import asyncio

import pytest

from forebay.gateway.call_record import CallRecord
from forebay.simulation import Simulation
from forebay.upstream.call_request import Caller


def new_record() -> CallRecord:
    return CallRecord("POST", "/v1/chat/completions", {})


def test_a_call_waits_for_its_permits_and_not_while_an_attempt_is_under_way() -> None:
    async def main() -> float:
        record = new_record()
        record.begin(Caller(), "openai", "gpt-4o", "account")
        await asyncio.sleep(3.0)
        record.begin_attempt("openai", "gpt-4o", "account")
        await asyncio.sleep(6.0)
        record.end_attempt()
        await asyncio.sleep(2.0)  # it is sent again
        record.begin_attempt("openai", "gpt-4o", "account")
        await asyncio.sleep(6.0)
        return record.waited

    with Simulation() as simulation:
        assert simulation.run(main()) == pytest.approx(5.0)


def test_a_call_that_asked_for_no_permit_has_not_waited() -> None:
    async def main() -> float:
        record = new_record()
        await asyncio.sleep(3.0)
        record.end_waiting()
        return record.waited

    with Simulation() as simulation:
        assert simulation.run(main()) == 0.0


def test_the_end_of_the_last_attempt_is_no_wait() -> None:
    async def main() -> float:
        record = new_record()
        record.begin(Caller(), "openai", "gpt-4o", "account")
        record.begin_attempt("openai", "gpt-4o", "account")
        record.end_attempt()
        record.end_waiting()
        await asyncio.sleep(3.0)
        record.end_waiting()
        return record.waited

    with Simulation() as simulation:
        assert simulation.run(main()) == 0.0
