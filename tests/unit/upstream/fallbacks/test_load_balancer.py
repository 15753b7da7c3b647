"""The choice among accounts that share calls, and the draws by which they share them."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from forebay.upstream.call_request import Prospect
from forebay.upstream.fallbacks.even_draws import EvenDraws
from forebay.upstream.fallbacks.load_balancer import choose_by_room

NEVER = Prospect(math.inf, 0.0)


def now(calls: float) -> Prospect:
    return Prospect(0.0, calls)


@pytest.mark.parametrize("draw", [0.0, 0.5, 0.999999])
def test_the_account_that_would_send_the_call_soonest_is_chosen(draw: float) -> None:
    options = [(Prospect(2.0, 900.0), 9.0), (Prospect(1.0, 1.0), 1.0), (NEVER, 1.0)]
    assert choose_by_room(options, draw) == 1


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ([(now(100), 1.0), (now(300), 1.0)], [0.25, 0.75]),
        ([(now(100), 3.0), (now(300), 1.0)], [0.5, 0.5]),
        ([(now(100), 1.0), (Prospect(0.1, 300), 1.0), (now(100), 1.0)], [0.5, 0.0, 0.5]),
        ([(now(math.inf), 1.0), (now(math.inf), 3.0)], [0.25, 0.75]),
        ([(now(0.0), 1.0), (now(0.0), 1.0)], [0.5, 0.5]),
        ([(NEVER, 1.0), (NEVER, 1.0)], [0.5, 0.5]),
    ],
)
def test_accounts_that_would_send_it_equally_soon_share_calls_by_room_and_weight(
    options: list[tuple[Prospect, float]], shares: list[float]
) -> None:
    chosen = Counter(choose_by_room(options, number / 1_000) for number in range(1_000))
    assert [chosen[number] / 1_000 for number in range(len(options))] == pytest.approx(shares, abs=0.002)


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 0.9])
def test_any_run_of_even_draws_keeps_a_share_to_a_few_calls(share: float) -> None:
    draw = EvenDraws()
    draws = [draw() for _ in range(5_000)]
    assert all(0.0 <= each < 1.0 for each in draws)
    for length in (10, 100, 1_000):
        for start in range(0, 5_000 - length, 97):
            below = sum(each < share for each in draws[start : start + length])
            assert abs(below - share * length) <= 4.0


def test_even_draws_begin_anywhere() -> None:
    assert len({EvenDraws()() for _ in range(10)}) == 10
