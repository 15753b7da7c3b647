"""A quota that binds is used, and hardly a call is refused: beside simulated providers that count as real ones do."""

from __future__ import annotations

from dataclasses import replace

import pytest
from bench.quota import Case, Driver, cases

CASES = cases()
MEASURED = 240.0  # seconds; `python -m bench quota` takes ten minutes of each
QUICK = (
    "openai tokens bucket learned end",
    "anthropic input_tokens bucket given first",
    "openai requests window learned first",
    "anthropic input_tokens window given end",
)


def check(case: Case, seed: int) -> None:
    figures = Driver(case, seed).run()
    assert figures.use >= 0.98
    assert figures.refused <= 0.005


@pytest.mark.parametrize("name", QUICK)
def test_a_binding_quota_is_used_and_nothing_is_sent_that_it_would_refuse(name: str) -> None:
    check(replace(CASES[name], seconds=MEASURED / 2), seed=5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_so_it_is_for_all_units_shapes_and_headers(name: str) -> None:
    check(replace(CASES[name], seconds=MEASURED), seed=1)


def test_who_ignores_quotas_is_refused() -> None:
    """The plant is not too kind."""
    case = CASES["openai requests bucket given first"]
    driver = Driver(replace(case, given=(), headers="never", load=40.0, seconds=MEASURED / 4), seed=1)
    driver.most = 2_000
    assert driver.run().refused > 0.5
