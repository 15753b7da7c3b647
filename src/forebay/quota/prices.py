"""What a call costs: prices of one's own, else the list that `genai-prices` keeps, offline."""

from __future__ import annotations

import fnmatch
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from forebay.errors import InvalidPrice

_MILLION: Final = 1e6
_MOST: Final = 1000  # models remembered
_Cost = Callable[[int, int, int], float]  # of input tokens, output tokens, and those of the input that were cached


class Price(msgspec.Struct, frozen=True, kw_only=True):
    """What a model costs, in US dollars per million tokens.

    Attributes:
        input: tokens sent.
        output: tokens received.
        cached_input: of the tokens sent, those that were read from the provider's cache; None: as the others.
    """

    input: float
    output: float
    cached_input: float | None = None

    def usd(self, input_tokens: int, output_tokens: int, cached_input_tokens: int = 0) -> float:
        """US dollars for so many tokens; those cached are among those of the input."""
        cached = min(cached_input_tokens, input_tokens)
        rate = self.input if self.cached_input is None else self.cached_input
        return ((input_tokens - cached) * self.input + cached * rate + output_tokens * self.output) / _MILLION


class Prices:
    """Looks up what calls cost.

    The list of `genai-prices` comes with ``pip install 'forebay[prices]'``, is never fetched from anywhere, and is
    loaded when first asked (a third of a second); without it only the prices given here are known.

    Args:
        own: by the model's name, ``*`` for any rest of it; the first that fits comes before the list.

    Raises:
        InvalidPrice: not a Price, or a negative one.
    """

    def __init__(self, own: Mapping[str, Price] | None = None) -> None:
        self._own = dict(own or {})
        for model, price in self._own.items():
            _check(model, price)
        self._listed: dict[tuple[str, str], _Cost | None] = {}  # bounded by `_MOST`

    def usd(
        self, provider: str, model: str, input_tokens: int, output_tokens: int, cached_input_tokens: int = 0
    ) -> float | None:
        """US dollars for a call.

        Args:
            provider: whose model, such as ``"openai"``; what a server of one's own serves costs what is said here.
            model: its name, as the request or the answer has it.
            input_tokens: tokens sent, cached ones among them.
            output_tokens: tokens received.
            cached_input_tokens: of those sent, those read from the provider's cache.

        Returns:
            None if no price is known: count it, and warn of the model once.
        """
        tokens = max(0, input_tokens), max(0, output_tokens), max(0, min(cached_input_tokens, input_tokens))
        for pattern, price in self._own.items():
            if fnmatch.fnmatchcase(model, pattern):
                return price.usd(*tokens)
        cost = self._find(provider, model)
        return None if cost is None else cost(*tokens)

    def has_price(self, provider: str, model: str) -> bool:
        """Whether a price is known for the model."""
        return self.usd(provider, model, 0, 0) is not None

    def _find(self, provider: str, model: str) -> _Cost | None:
        key = (provider, model)
        if key not in self._listed:
            if len(self._listed) >= _MOST:
                self._listed.clear()
            self._listed[key] = _listed(provider, model)
        return self._listed[key]


def price_list_installed() -> bool:
    """Whether the list of prices is installed."""
    return _list() is not None


@functools.cache
def _list() -> Any | None:
    try:
        import genai_prices  # noqa: PLC0415 - a third of a second, for those who have a budget
    except ImportError:
        return None
    return genai_prices


def _listed(provider: str, model: str) -> _Cost | None:
    """How the list prices a model: by the token if that is all there is to it, else asked each time."""
    genai_prices = _list()
    if genai_prices is None:
        return None

    def ask(input_tokens: int, output_tokens: int, cached_input_tokens: int) -> Any:
        usage = genai_prices.Usage(
            input_tokens=input_tokens, output_tokens=output_tokens, cache_read_tokens=cached_input_tokens
        )
        return genai_prices.calc_price(usage, model, provider_id=provider)

    try:
        answer = ask(0, 0, 0)
    except LookupError:
        return None
    if isinstance(answer.model.prices, list):  # by date or by the hour
        return lambda *tokens: float(ask(*tokens).total_price)
    usual, bound = _usual(answer.model_price)

    def cost(input_tokens: int, output_tokens: int, cached_input_tokens: int) -> float:
        tokens = input_tokens, output_tokens, cached_input_tokens
        return usual.usd(*tokens) if input_tokens < bound else float(ask(*tokens).total_price)

    return cost


def _usual(listed: Any) -> tuple[Price, float]:
    """The price of each token as long as the input is shorter than a bound; the list takes 90 us for an answer."""
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
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise InvalidPrice(model=model, name=name, value=value, expected="a number of at least 0")
