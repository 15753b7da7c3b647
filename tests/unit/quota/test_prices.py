"""Prices of calls: of the list, and of the user."""

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
        ("openai", "o3"),  # its price changes by date
        ("openai", "text-embedding-3-small"),  # no output
        ("anthropic", "claude-sonnet-4-5"),  # more expensive for long inputs
        ("anthropic", "claude-opus-4-1"),
        ("deepseek", "deepseek-chat"),  # cheaper at night
    ],
)
@pytest.mark.parametrize("tokens", [(1000, 100, 0), (1000, 100, 400), (199_999, 5_000, 0), (250_000, 5_000, 100_000)])
def test_a_listed_price_equals_the_one_of_the_list(provider: str, model: str, tokens: tuple[int, int, int]) -> None:
    usage = genai_prices.Usage(input_tokens=tokens[0], output_tokens=tokens[1], cache_read_tokens=tokens[2])
    expected = float(genai_prices.calc_price(usage, model, provider_id=provider).total_price)
    assert Prices().usd(provider, model, *tokens) == pytest.approx(expected)


def test_own_prices_come_before_the_list() -> None:
    table = Prices({"gpt-4o-mini": Price(input=9, output=9), "gpt-4o*": Price(input=1, output=2, cached_input=0.5)})
    assert table.usd("openai", "gpt-4o-2024-08-06", 1_000_000, 1_000_000, 500_000) == 0.5 + 0.25 + 2
    assert table.usd("mine", "gpt-4o-mini", 1_000_000, 0) == 9
    assert table.usd("openai", "gpt-4.1", 1_000_000, 0) == pytest.approx(2.0)


def test_cached_tokens_without_a_price_cost_as_much_as_others() -> None:
    assert Price(input=1, output=0).usd(1_000_000, 0, 600_000) == 1


@pytest.mark.parametrize(("provider", "model"), [("openai", "no-such-model"), ("my-vllm", "gpt-4o"), ("", "")])
def test_a_model_without_a_price_has_none(provider: str, model: str) -> None:
    assert Prices().usd(provider, model, 10, 10) is None
    assert not Prices().has_price(provider, model)


def test_impossible_token_counts_do_not_lower_the_cost() -> None:
    table = Prices({"m": Price(input=1, output=1, cached_input=0)})
    assert table.usd("x", "m", -5, -5, -5) == 0
    assert table.usd("x", "m", 1_000_000, 0, 10**9) == 0


def test_without_the_list_only_own_prices_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "genai_prices", None)
    prices._price_list.cache_clear()
    try:
        table = Prices({"m": Price(input=1, output=1)})
        assert table.usd("openai", "gpt-4o", 10, 10) is None
        assert table.has_price("openai", "m")
        assert prices._price_list() is None
    finally:
        prices._price_list.cache_clear()


@pytest.mark.parametrize(
    ("price", "says"),
    [
        (Price(input=-1, output=1), "input=-1"),
        (Price(input=1, output=float("nan")), "output=nan"),
        (Price(input=1, output=1, cached_input=-2), "cached_input=-2"),
        ((1, 2), "must be a Price"),
    ],
)
def test_an_invalid_price_is_reported(price: Any, says: str) -> None:
    with pytest.raises(InvalidPrice, match=says):
        Prices({"m": price})


def test_remembered_models_are_bounded() -> None:
    table = Prices()
    for n in range(3 * prices._MAX_MODELS):
        table.usd("openai", f"no-such-model-{n}", 1, 1)
    assert len(table._listed) <= prices._MAX_MODELS
