"""What calls cost: by the list that comes along, or by what its user says."""

from __future__ import annotations

import sys
from typing import Any

import genai_prices
import pytest

from forebay.errors import InvalidPrice
from forebay.quota import Price, Prices, prices


@pytest.mark.parametrize(
    ("provider", "model"),
    [
        ("openai", "gpt-4o"),
        ("openai", "gpt-4o-mini-2024-07-18"),
        ("openai", "o3"),  # its price has changed
        ("openai", "text-embedding-3-small"),  # no output
        ("anthropic", "claude-sonnet-4-5"),  # dearer for long inputs
        ("anthropic", "claude-opus-4-1"),
        ("deepseek", "deepseek-chat"),  # cheaper at night
    ],
)
@pytest.mark.parametrize("tokens", [(1000, 100, 0), (1000, 100, 400), (199_999, 5_000, 0), (250_000, 5_000, 100_000)])
def test_listed_prices_are_those_of_the_list(provider: str, model: str, tokens: tuple[int, int, int]) -> None:
    usage = genai_prices.Usage(input_tokens=tokens[0], output_tokens=tokens[1], cache_read_tokens=tokens[2])
    expected = float(genai_prices.calc_price(usage, model, provider_id=provider).total_price)
    assert Prices().usd(provider, model, *tokens) == pytest.approx(expected)


def test_ones_own_prices_come_before_the_list() -> None:
    table = Prices({"gpt-4o-mini": Price(input=9, output=9), "gpt-4o*": Price(input=1, output=2, cached_input=0.5)})
    assert table.usd("openai", "gpt-4o-2024-08-06", 1_000_000, 1_000_000, 500_000) == 0.5 + 0.25 + 2
    assert table.usd("mine", "gpt-4o-mini", 1_000_000, 0) == 9
    assert table.usd("openai", "gpt-4.1", 1_000_000, 0) == pytest.approx(2.0)


def test_cached_tokens_without_a_price_cost_what_the_others_cost() -> None:
    assert Price(input=1, output=0).usd(1_000_000, 0, 600_000) == 1


@pytest.mark.parametrize(("provider", "model"), [("openai", "no-such-model"), ("my-vllm", "gpt-4o"), ("", "")])
def test_what_has_no_price_says_so(provider: str, model: str) -> None:
    assert Prices().usd(provider, model, 10, 10) is None
    assert not Prices().has_price(provider, model)


def test_counts_from_the_wire_that_make_no_sense_cost_nothing_less() -> None:
    table = Prices({"m": Price(input=1, output=1, cached_input=0)})
    assert table.usd("x", "m", -5, -5, -5) == 0
    assert table.usd("x", "m", 1_000_000, 0, 10**9) == 0


def test_without_the_list_only_ones_own_prices_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "genai_prices", None)
    prices._list.cache_clear()
    try:
        table = Prices({"m": Price(input=1, output=1)})
        assert table.usd("openai", "gpt-4o", 10, 10) is None
        assert table.has_price("openai", "m")
        assert not prices.price_list_installed()
    finally:
        prices._list.cache_clear()


@pytest.mark.parametrize(
    ("price", "says"),
    [
        (Price(input=-1, output=1), "input=-1"),
        (Price(input=1, output=float("nan")), "output=nan"),
        (Price(input=1, output=1, cached_input=-2), "cached_input=-2"),
        ((1, 2), "must be a Price"),
    ],
)
def test_a_price_that_cannot_be_meant_says_so(price: Any, says: str) -> None:
    with pytest.raises(InvalidPrice, match=says):
        Prices({"m": price})


def test_models_are_remembered_up_to_a_bound() -> None:
    table = Prices()
    for n in range(3 * prices._MOST):
        table.usd("openai", f"no-such-model-{n}", 1, 1)
    assert len(table._listed) <= prices._MOST
