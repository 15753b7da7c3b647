"""Prices of calls: of the list, and of the user."""

from __future__ import annotations

import sys
from typing import Any

import genai_prices
import hypothesis.strategies as st
import pytest
from genai_prices import data
from hypothesis import given

from forebay.errors import InvalidPrice
from forebay.quota import BilledUsage, Price, Prices, prices


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


# --- whatever else is billed ---


def listed_models(*providers: str) -> list[tuple[str, str]]:
    """Return each model of the list with prices by token, by the provider."""
    found = []
    for provider in data.providers:
        for model in provider.models if provider.id in providers else ():
            first = model.prices[-1].prices if isinstance(model.prices, list) else model.prices
            if first.input_mtok is not None:
                found.append((provider.id, model.id))
    return found


@pytest.mark.parametrize(("provider", "model"), listed_models("openai", "anthropic", "azure"))
def test_each_row_of_the_list_costs_what_the_list_says(provider: str, model: str) -> None:
    usage = BilledUsage(
        input_tokens=10_000,
        output_tokens=500,
        cached_input_tokens=3_000,
        cache_write_tokens=4_000,
        cache_write_1h_tokens=1_000,
    )
    listed = genai_prices.Usage(
        input_tokens=10_000,
        output_tokens=500,
        cache_read_tokens=3_000,
        cache_write_tokens=4_000,
        cache_write_1h_tokens=1_000,
    )
    try:
        expected = float(genai_prices.calc_price(listed, model, provider_id=provider).total_price)
    except LookupError:
        pytest.skip("the list itself does not find it by its id")
    assert Prices().cost(provider, model, usage) == pytest.approx(expected)


def cost(provider: str, model: str, **usage: Any) -> float | None:
    return Prices().cost(provider, model, BilledUsage(**usage))


def test_writes_to_the_cache_cost_more_than_other_input() -> None:
    model = ("anthropic", "claude-sonnet-4-5")
    assert cost(*model, input_tokens=10_000, cache_write_tokens=10_000) == pytest.approx(0.0375)
    assert cost(*model, input_tokens=10_000, cache_write_tokens=10_000, cache_write_1h_tokens=10_000) == (
        pytest.approx(0.06)
    )
    own = Prices({"m": Price(input=4, output=0), "n": Price(input=4, output=0, cache_write=6, cache_write_1h=7)})
    written = BilledUsage(input_tokens=1_000_000, cache_write_tokens=1_000_000, cache_write_1h_tokens=500_000)
    assert own.cost("", "m", written) == 2.5 + 4
    assert own.cost("", "n", written) == 3 + 3.5


@pytest.mark.parametrize(
    ("model", "tier", "factor"),
    [
        ("gpt-5", "", 1.0),
        ("gpt-5", "default", 1.0),
        ("gpt-5", "flex", 0.5),
        ("gpt-5", "priority", 2.0),
        ("gpt-3.5-turbo", "priority", 2.5),  # the list has no price for that: the highest of all
        ("gpt-3.5-turbo", "flex", 1.0),
        ("gpt-5", "unheard-of", 1.0),
    ],
)
def test_a_service_tier_has_its_price(model: str, tier: str, factor: float) -> None:
    usual = cost("openai", model, input_tokens=1_000, output_tokens=100)
    assert usual
    assert cost("openai", model, input_tokens=1_000, output_tokens=100, tier=tier) == pytest.approx(factor * usual)


def test_fast_calls_of_anthropic_and_those_in_the_us_cost_more() -> None:
    usual = cost("anthropic", "claude-opus-4-6", input_tokens=1_000)
    assert usual
    assert cost("anthropic", "claude-opus-4-6", input_tokens=1_000, tier="fast") == pytest.approx(6 * usual)
    assert cost("anthropic", "claude-opus-4-6", input_tokens=1_000, factor=1.1) == pytest.approx(1.1 * usual)
    own = Prices({"m": Price(input=1, output=1)})
    assert own.cost("", "m", BilledUsage(input_tokens=1_000_000, tier="priority")) == 2.5


@pytest.mark.parametrize(
    ("provider", "model", "usd"),
    [
        ("openai", "gpt-4o", 0.03),
        ("openai", "gpt-4", 0.075),  # the list has none: the highest of all
        ("anthropic", "claude-sonnet-4-5", 0.03),
    ],
)
def test_searches_cost_money(provider: str, model: str, usd: float) -> None:
    assert cost(provider, model, web_searches=3) == pytest.approx(usd)
    assert Prices({"m": Price(input=0, output=0)}).cost("", "m", BilledUsage(web_searches=3, file_searches=2)) == (
        pytest.approx(0.08)
    )


def test_images_and_sound_have_prices_of_their_own() -> None:
    assert cost("openai", "gpt-image-1", output_tokens=1_000_000, output_image_tokens=1_000_000) == pytest.approx(40)
    assert cost("openai", "gpt-image-1", input_tokens=1_000_000, input_image_tokens=1_000_000) == pytest.approx(10)
    assert cost("openai", "gpt-realtime", input_tokens=1_000_000, input_audio_tokens=1_000_000) == pytest.approx(32)
    assert cost("openai", "tts-1", characters=1_000_000) == pytest.approx(15)


@pytest.mark.parametrize(
    ("model", "usage"),
    [
        ("gpt-4o-audio-preview", {"input_tokens": 10, "input_audio_tokens": 10}),
        ("gpt-4o", {"output_tokens": 10, "output_audio_tokens": 10}),
        ("gpt-4o-mini-tts", {"characters": 10}),
        ("gpt-4o", {"characters": 10}),
        ("whisper-1", {"input_tokens": 10}),
        ("omni-moderation-latest", {"input_tokens": 10}),
        ("gpt-live-1", {"input_tokens": 10}),
        ("dall-e-3", {"output_tokens": 10}),
    ],
)
def test_what_the_list_cannot_price_has_no_price(model: str, usage: dict[str, int]) -> None:
    assert cost("openai", model, **usage) is None


def test_sound_has_no_price_of_your_own() -> None:
    assert Prices({"m": Price(input=1, output=1)}).cost("", "m", BilledUsage(input_audio_tokens=1)) is None


@given(provider=st.sampled_from(["openai", "anthropic", "azure", "", "x"]), model=st.text(), tier=st.text(max_size=9))
def test_no_name_from_the_wire_raises(provider: str, model: str, tier: str) -> None:
    usage = BilledUsage(input_tokens=1, cached_input_tokens=9, cache_write_1h_tokens=3, tier=tier)
    assert (cost(provider, model) or 0.0) >= 0.0
    assert (Prices().cost(provider, model, usage) or 0.0) >= 0.0
