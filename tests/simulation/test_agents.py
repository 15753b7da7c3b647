"""Fleets of agents on one key, with the real SDKs and the gateway's own code in virtual time.

The published figures come from `python -m bench agents`; these are some of the same runs.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from bench.fleet.cases import CASES
from bench.fleet.oracle import schedule
from bench.fleet.ways import virtually

pytestmark = pytest.mark.blocks  # the SDKs ask once what they run on, and a virtual loop has no threads for that

FEW = ("5 agents, OpenAI", "5 agents, Anthropic", "eleven agents, growing contexts")
REACH = 1.02  # times the oracle's schedule


@pytest.mark.parametrize("name", FEW)
def test_all_agents_finish_through_the_gateway_about_as_soon_as_can_be(name: str) -> None:
    case = CASES[name]
    through = virtually(case, "gateway")
    assert through.failed == 0
    assert through.calls == case.calls
    assert through.seconds <= REACH * schedule(case)


@pytest.mark.parametrize("name", FEW)
def test_most_of_them_fail_without_it(name: str) -> None:
    case = CASES[name]
    assert virtually(case, "direct").failed > case.agents / 2


def test_one_seed_gives_one_run() -> None:
    case = replace(CASES["5 agents, Anthropic"], seed=5)
    assert virtually(case, "gateway") == virtually(case, "gateway")
    assert virtually(case, "direct") == virtually(case, "direct")
