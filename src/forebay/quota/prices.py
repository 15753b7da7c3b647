"""Prices of calls: your own, else the list of `genai-prices`, offline."""

from __future__ import annotations

import fnmatch
import functools
import math
from collections.abc import Mapping
from operator import attrgetter
from typing import Any, Final

import msgspec

from forebay._validate import is_number
from forebay.errors import InvalidPrice

_MILLION: Final = 1e6
_MAX_MODELS: Final = 1000  # models whose listed price is remembered

# Prices that a model's entry may lack. Each is the highest that is charged anywhere, so that nothing is billed too low.
# Sources: the price pages of OpenAI and Anthropic (prompt caching, tools, service tiers), November 2026.
_CACHE_WRITE_FACTOR: Final = 1.25  # of the price of input: a cache entry that lives five minutes
_CACHE_WRITE_1H_FACTOR: Final = 2.0
_WEB_SEARCH: Final = 0.025  # dollars
_FILE_SEARCH: Final = 0.0025
_USUAL_TIERS: Final = ("", "default", "auto", "standard")
_TIER_FACTORS: Final = {"priority": 2.5, "fast": 6.0}  # of the price without a tier; others are not dearer

_MEDIA: Final = {  # units of `BilledUsage` that are priced only where the list has these prices
    "input_audio_tokens": "input_audio_mtok",
    "output_audio_tokens": "output_audio_mtok",
    "characters": "input_mchars",
}


_media_of: Final = attrgetter(*_MEDIA)


class Price(msgspec.Struct, frozen=True, kw_only=True):
    """The price of a model in US dollars per million tokens.

    Attributes:
        input: tokens sent.
        output: tokens received.
        cached_input: tokens sent that the provider read from its cache; None for the price of the others.
        cache_write: tokens sent that it wrote to its cache; None for 1.25 times the price of the others.
        cache_write_1h: those that it keeps there for an hour; None for twice the price of the others.
    """

    input: float
    output: float
    cached_input: float | None = None
    cache_write: float | None = None
    cache_write_1h: float | None = None

    def usd(self, input_tokens: int, output_tokens: int, cached_input_tokens: int = 0) -> float:
        """Return the US dollars of a call; `input_tokens` include the cached ones."""
        cached = min(cached_input_tokens, input_tokens)
        rate = self.input if self.cached_input is None else self.cached_input
        return ((input_tokens - cached) * self.input + cached * rate + output_tokens * self.output) / _MILLION

    def cost(self, usage: BilledUsage) -> float:
        """Return the US dollars of a usage without searches, media and tiers."""
        usd = self.usd(usage.input_tokens, usage.output_tokens, usage.cached_input_tokens)
        if usage.cache_write_tokens:
            short = _CACHE_WRITE_FACTOR * self.input if self.cache_write is None else self.cache_write
            long = _CACHE_WRITE_1H_FACTOR * self.input if self.cache_write_1h is None else self.cache_write_1h
            kept = usage.cache_write_1h_tokens
            usd += ((usage.cache_write_tokens - kept) * (short - self.input) + kept * (long - self.input)) / _MILLION
        return usd


class BilledUsage(msgspec.Struct, frozen=True, kw_only=True):
    """The units of one call that its provider bills.

    Attributes:
        input_tokens: sent; all the other input is part of them.
        output_tokens: received, with hidden reasoning; all the other output is part of them.
        cached_input_tokens: read from the provider's cache.
        cache_write_tokens: written to it.
        cache_write_1h_tokens: those of them that it keeps for an hour.
        input_audio_tokens: of sound that was sent.
        output_audio_tokens: of sound that was received.
        input_image_tokens: of images that were sent.
        output_image_tokens: of images that were received.
        web_searches: searches by the provider's web search tool.
        file_searches: searches by the provider's file search tool.
        characters: of text that was sent to be spoken.
        reasoning_tokens: those of the output that were hidden reasoning. They cost as much as the others.
        tier: the service tier or speed: ``"priority"``, ``"fast"``, ``"flex"``, or ``"batch"`` for a call that was in a
            batch; empty for the usual one.
        factor: by which the tokens are dearer than usual, for the place where they are computed.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cached_input_tokens: int = 0
    cache_write_tokens: int = 0
    cache_write_1h_tokens: int = 0
    input_audio_tokens: int = 0
    output_audio_tokens: int = 0
    input_image_tokens: int = 0
    output_image_tokens: int = 0
    web_searches: int = 0
    file_searches: int = 0
    characters: int = 0
    reasoning_tokens: int = 0
    tier: str = ""
    factor: float = 1.0


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
        self._listed: dict[tuple[str, str], _ListedModel | None] = {}  # bounded by `_MAX_MODELS`

    def usd(
        self, provider: str, model: str, input_tokens: int, output_tokens: int, cached_input_tokens: int = 0
    ) -> float | None:
        """Return the US dollars of a call of text.

        Args:
            provider: the provider of the model, such as ``"openai"``.
            model: its name, as in the request or the answer.
            input_tokens: tokens sent, cached ones included.
            output_tokens: tokens received.
            cached_input_tokens: tokens sent that the provider read from its cache.

        Returns:
            None if no price is known.
        """
        usage = BilledUsage(
            input_tokens=max(0, input_tokens),
            output_tokens=max(0, output_tokens),
            cached_input_tokens=max(0, min(cached_input_tokens, input_tokens)),
        )
        return self.cost(provider, model, usage)

    def cost(self, provider: str, model: str, usage: BilledUsage) -> float | None:
        """Return the US dollars of a call, whatever it used; None if no price is known for some of that.

        Your own prices are for text, without a tier. Searches, and the tiers that are dearer, cost the highest that a
        provider charges for them. Images in the input count as text.
        """
        own = self._own_price(model) if self._own else None
        if own is None:
            listed = self._find(provider, model)
            return None if listed is None else listed.cost(usage)
        if any(getattr(usage, unit) for unit in _MEDIA):
            return None
        searches = usage.web_searches * _WEB_SEARCH + usage.file_searches * _FILE_SEARCH
        return own.cost(usage) * _TIER_FACTORS.get(usage.tier, 1.0) * usage.factor + searches

    def _own_price(self, model: str) -> Price | None:
        return next((price for pattern, price in self._own.items() if fnmatch.fnmatchcase(model, pattern)), None)

    @property
    def cover_all_models(self) -> bool:
        """True if your own prices are for every model, so that the list is never asked."""
        return "*" in self._own

    def has_price(self, provider: str, model: str) -> bool:
        """Return whether a price is known for the model's text."""
        return self.usd(provider, model, 0, 0) is not None

    def _find(self, provider: str, model: str) -> _ListedModel | None:
        key = (provider, model)
        if key not in self._listed:
            if len(self._listed) >= _MAX_MODELS:
                self._listed.clear()
            self._listed[key] = _listed_model(provider, model)
        return self._listed[key]


@functools.cache
def _price_list() -> Any | None:
    try:
        import genai_prices  # noqa: PLC0415 - a third of a second, which only users of a budget should pay
    except ImportError:
        return None
    return genai_prices


_loaded = False


def is_price_list_loaded() -> bool:
    """Return whether `load_price_list` has loaded the price list, or has found that it is not installed."""
    return _loaded


def is_price_list_installed() -> bool:
    """Return whether there is a price list, for models without a price of your own."""
    return _price_list() is not None


def load_price_list() -> None:
    """Load the price list, if it is installed: it takes a third of a second, and blocks meanwhile."""
    global _loaded  # noqa: PLW0603 - as a module is loaded once
    Prices().has_price("openai", "gpt-4o")  # its first answer takes as long again as its import
    _loaded = True


class _ListedModel:
    """The prices of a listed model: computed here if it has one price a token, else by the list.

    Args:
        genai_prices: the list.
        provider: of the model.
        model: its name.

    Raises:
        LookupError: it is not in the list.
    """

    __slots__ = ("_bound", "_flat", "_genai", "_model", "_provider", "_units", "_variants")

    def __init__(self, genai_prices: Any, provider: str, model: str) -> None:
        self._genai = genai_prices
        self._provider = provider
        self._model = model
        answer = self._calculate({"input_tokens": 0})
        self._variants: list[dict[str, str]] = [variant.when for variant in answer.model.price_variants or ()]
        self._units = {name for name, value in vars(answer.model_price).items() if value is not None}
        self._flat: Price | None = None  # None: its prices change by date or by the hour
        self._bound = math.inf
        if not isinstance(answer.model.prices, list):
            self._flat, self._bound = _flat_price(answer.model_price)

    def cost(self, usage: BilledUsage) -> float | None:
        """Return the US dollars of a call; None if some of its units has no price."""
        if any(_media_of(usage)) and not self._prices_media(usage):
            return None
        if "input_mtok" not in self._units and not usage.characters:
            return None  # it is priced by the hour, for example
        context, tier_factor = self._context(usage.tier)
        flat = self._flat
        if flat is not None and not context and usage.input_tokens < self._bound and not _has_media(usage):
            usd = flat.cost(usage)
        else:
            try:
                usd = float(self._calculate(_listed_usage(usage), context).total_price)
            except ValueError:
                return None  # its counts contradict each other
        usd *= tier_factor * usage.factor
        if usage.web_searches or usage.file_searches:
            usd += self._searches(usage)
        return usd

    def _prices_media(self, usage: BilledUsage) -> bool:
        return all(listed in self._units for unit, listed in _MEDIA.items() if getattr(usage, unit))

    def _context(self, tier: str) -> tuple[dict[str, str], float]:
        """Return the context by which the list finds the prices of a tier, or the factor for one that it lacks."""
        for when in () if tier in _USUAL_TIERS else self._variants:
            if list(when.values()) == [tier]:  # a service tier, a speed, or the processing in a batch
                return when, 1.0
        return {}, _TIER_FACTORS.get(tier, 1.0)

    def _searches(self, usage: BilledUsage) -> float:
        usd = 0.0
        for unit, listed, count, default in (
            ("web_searches", "web_searches_kcount", usage.web_searches, _WEB_SEARCH),
            ("storage_searches", "storage_searches_kcount", usage.file_searches, _FILE_SEARCH),
        ):
            known = listed in self._units
            usd += float(self._calculate({unit: count}).total_price) if count and known else count * default
        return usd

    def _calculate(self, units: Mapping[str, int], context: Mapping[str, str] | None = None) -> Any:
        usage = self._genai.Usage(**units)
        return self._genai.calc_price(usage, self._model, provider_id=self._provider, price_context=context or None)


def _listed_model(provider: str, model: str) -> _ListedModel | None:
    genai_prices = _price_list()
    if genai_prices is None:
        return None
    try:
        return _ListedModel(genai_prices, provider, model)
    except (LookupError, ValueError):  # names come from the wire
        return None


def _has_media(usage: BilledUsage) -> bool:
    return bool(
        usage.input_audio_tokens
        or usage.output_audio_tokens
        or usage.input_image_tokens
        or usage.output_image_tokens
        or usage.characters
    )


def _listed_usage(usage: BilledUsage) -> dict[str, int]:
    """Return a usage, without its searches, by the names of the list."""
    cached = usage.cached_input_tokens
    if usage.input_audio_tokens or usage.input_image_tokens:
        cached = 0  # no answer says how much of these was cached, and the list would not guess
    units = {
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "cache_read_tokens": cached,
        "cache_write_tokens": usage.cache_write_tokens,
        "cache_write_1h_tokens": usage.cache_write_1h_tokens,
        "input_audio_tokens": usage.input_audio_tokens,
        "output_audio_tokens": usage.output_audio_tokens,
        "input_image_tokens": usage.input_image_tokens,
        "output_image_tokens": usage.output_image_tokens,
        "input_characters": usage.characters,
    }
    return {name: count for name, count in units.items() if count or name in ("input_tokens", "output_tokens")}


def _flat_price(listed: Any) -> tuple[Price, float]:
    """Return the price per token and the input length up to which it holds. The list itself takes 50 us an answer."""
    rates, bound = [], math.inf
    for kind in ("input_mtok", "output_mtok", "cache_read_mtok", "cache_write_mtok", "cache_write_1h_mtok"):
        rate: Any = getattr(listed, kind, None)
        if (tiers := getattr(rate, "tiers", None)) is not None:
            bound, rate = min([bound, *(tier.start for tier in tiers)]), rate.base
        rates.append(None if rate is None else float(rate))
    sent, received, cached, written, written_1h = rates
    written = sent or 0.0 if written is None else written
    price = Price(
        input=sent or 0.0,
        output=received or 0.0,
        cached_input=cached,
        cache_write=written,
        cache_write_1h=written if written_1h is None else written_1h,
    )
    return price, bound


def _check(model: str, price: object) -> None:
    if not isinstance(price, Price):
        raise InvalidPrice(model=model, name="price", value=price, expected="a Price")
    for name in Price.__struct_fields__:
        value = getattr(price, name)
        if value is None and name not in ("input", "output"):
            continue
        if not is_number(value) or not 0 <= value < math.inf:
            raise InvalidPrice(model=model, name=name, value=value, expected="a number of at least 0")
