"""Fleets of agents on one key, with the real SDKs and the code of the gateway, in virtual time.

The published numbers come from `python -m bench agents`; these are some of the same runs.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from bench.baselines.oracle_schedule import schedule
from bench.fleet.cases import CASES
from bench.fleet.ways import virtually

pytestmark = pytest.mark.blocks  # the SDKs detect their platform once, in a thread

CHOSEN = ("5 agents, OpenAI", "5 agents, Anthropic", "eleven agents, growing contexts")
MAX_RATIO = 1.02  # of the duration to that of an ideal schedule


@pytest.mark.parametrize("name", CHOSEN)
def test_all_agents_finish_through_the_gateway_almost_as_soon_as_possible(name: str) -> None:
    case = CASES[name]
    through = virtually(case, "gateway")
    assert through.failed == 0
    assert through.calls == case.calls
    assert through.seconds <= MAX_RATIO * schedule(case)


@pytest.mark.parametrize("name", CHOSEN)
def test_most_agents_fail_without_the_gateway(name: str) -> None:
    case = CASES[name]
    assert virtually(case, "direct").failed > case.agents / 2


def test_one_seed_gives_one_run() -> None:
    case = replace(CASES["5 agents, Anthropic"], seed=5)
    assert virtually(case, "gateway") == virtually(case, "gateway")
    assert virtually(case, "direct") == virtually(case, "direct")
