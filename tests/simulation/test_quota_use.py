"""A limiting quota is used fully and hardly any call is refused, on providers that count like real ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
from bench.quota import CaseRun, QuotaCase, cases

CASES = cases()
MEASURED = 240.0  # seconds; `python -m bench quota` simulates ten minutes of each
QUICK = (
    "openai tokens bucket learned end",
    "anthropic input_tokens bucket given first",
    "openai requests window learned first",
    "anthropic input_tokens window given end",
)


def check(case: QuotaCase, seed: int) -> None:
    result = CaseRun(case, seed).run()
    assert result.use >= 0.98
    assert result.refused <= 0.005


@pytest.mark.parametrize("name", QUICK)
def test_a_limiting_quota_is_used_fully_and_hardly_any_call_is_refused(name: str) -> None:
    check(replace(CASES[name], seconds=MEASURED / 2), seed=5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_quotas_of_all_units_shapes_and_headers_are_used_fully(name: str) -> None:
    check(replace(CASES[name], seconds=MEASURED), seed=1)


def test_calls_that_ignore_quotas_are_refused() -> None:
    """The negative control: the simulated provider enforces its quotas."""
    case = CASES["openai requests bucket given first"]
    run = CaseRun(replace(case, given=(), headers="never", load=40.0, seconds=MEASURED / 4), seed=1)
    run.max_in_flight = 2_000
    assert run.run().refused > 0.5
