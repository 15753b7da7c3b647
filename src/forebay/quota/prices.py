"""Prices of calls: your own, else the list of `genai-prices`, offline."""

from __future__ import annotations

import fnmatch
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from forebay._validate import is_number
from forebay.errors import InvalidPrice

_MILLION: Final = 1e6
_MAX_MODELS: Final = 1000  # models whose listed price is remembered
_CostFunction = Callable[[int, int, int], float]  # of input tokens, output tokens and cached input tokens, in dollars


class Price(msgspec.Struct, frozen=True, kw_only=True):
    """The price of a model in US dollars per million tokens.

    Attributes:
        input: tokens sent.
        output: tokens received.
        cached_input: tokens sent that the provider read from its cache; None for the price of the others.
    """

    input: float
    output: float
    cached_input: float | None = None

    def usd(self, input_tokens: int, output_tokens: int, cached_input_tokens: int = 0) -> float:
        """Return the US dollars of a call; `input_tokens` include the cached ones."""
        cached = min(cached_input_tokens, input_tokens)
        rate = self.input if self.cached_input is None else self.cached_input
        return ((input_tokens - cached) * self.input + cached * rate + output_tokens * self.output) / _MILLION


class Prices:
    """A table of prices.

    The list of `genai-prices` is installed by ``pip install 'forebay[prices]'`` and loaded at its first use, which
    takes a third of a second. It is never downloaded. Without it only your own prices are known.

    Args:
        own: prices by model name, where ``*`` matches any characters. The first match wins, and comes before the list.

    Raises:
        InvalidPrice: not a Price, or a negative one.
    """

    def __init__(self, own: Mapping[str, Price] | None = None) -> None:
        self._own = dict(own or {})
        for model, price in self._own.items():
            _check(model, price)
        self._listed: dict[tuple[str, str], _CostFunction | None] = {}  # bounded by `_MAX_MODELS`

    def usd(
        self, provider: str, model: str, input_tokens: int, output_tokens: int, cached_input_tokens: int = 0
    ) -> float | None:
        """Return the US dollars of a call.

        Args:
            provider: the provider of the model, such as ``"openai"``.
            model: its name, as in the request or the answer.
            input_tokens: tokens sent, cached ones included.
            output_tokens: tokens received.
            cached_input_tokens: tokens sent that the provider read from its cache.

        Returns:
            None if no price is known.
        """
        tokens = max(0, input_tokens), max(0, output_tokens), max(0, min(cached_input_tokens, input_tokens))
        for pattern, price in self._own.items():
            if fnmatch.fnmatchcase(model, pattern):
                return price.usd(*tokens)
        cost = self._find(provider, model)
        return None if cost is None else cost(*tokens)

    def has_price(self, provider: str, model: str) -> bool:
        """Return whether a price is known for the model."""
        return self.usd(provider, model, 0, 0) is not None

    def _find(self, provider: str, model: str) -> _CostFunction | None:
        key = (provider, model)
        if key not in self._listed:
            if len(self._listed) >= _MAX_MODELS:
                self._listed.clear()
            self._listed[key] = _listed_cost(provider, model)
        return self._listed[key]


@functools.cache
def _price_list() -> Any | None:
    try:
        import genai_prices  # noqa: PLC0415 - a third of a second, which only users of a budget should pay
    except ImportError:
        return None
    return genai_prices


def _listed_cost(provider: str, model: str) -> _CostFunction | None:
    """Return the cost function of a listed model: computed here if it has one price a token, else by the list."""
    genai_prices = _price_list()
    if genai_prices is None:
        return None

    def calculate(input_tokens: int, output_tokens: int, cached_input_tokens: int) -> Any:
        usage = genai_prices.Usage(
            input_tokens=input_tokens, output_tokens=output_tokens, cache_read_tokens=cached_input_tokens
        )
        return genai_prices.calc_price(usage, model, provider_id=provider)

    try:
        answer = calculate(0, 0, 0)
    except LookupError:
        return None
    if isinstance(answer.model.prices, list):  # by date or by the hour
        return lambda *tokens: float(calculate(*tokens).total_price)
    flat, bound = _flat_price(answer.model_price)

    def cost(input_tokens: int, output_tokens: int, cached_input_tokens: int) -> float:
        tokens = input_tokens, output_tokens, cached_input_tokens
        return flat.usd(*tokens) if input_tokens < bound else float(calculate(*tokens).total_price)

    return cost


def _flat_price(listed: Any) -> tuple[Price, float]:
    """Return the price per token and the input length up to which it holds. The list itself takes 90 us an answer."""
    rates, bound = [], math.inf
    for kind in ("input_mtok", "output_mtok", "cache_read_mtok"):
        rate: Any = getattr(listed, kind, None)
        if (tiers := getattr(rate, "tiers", None)) is not None:
            bound, rate = min([bound, *(tier.start for tier in tiers)]), rate.base
        rates.append(None if rate is None else float(rate))
    sent, received, cached = rates
    return Price(input=sent or 0.0, output=received or 0.0, cached_input=cached), bound


def _check(model: str, price: object) -> None:
    if not isinstance(price, Price):
        raise InvalidPrice(model=model, name="price", value=price, expected="a Price")
    for name in ("input", "output", "cached_input"):
        value = getattr(price, name)
        if value is None and name == "cached_input":
            continue
        if not is_number(value) or not 0 <= value < math.inf:
            raise InvalidPrice(model=model, name=name, value=value, expected="a number of at least 0")
