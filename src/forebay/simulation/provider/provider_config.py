"""The configuration of a simulated LLM provider: capacity, speed, limits, prices and faults, as validated data.

Durations are in seconds; points in time are in seconds since the provider started.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Self

import msgspec

from forebay.errors import ForebayError


class InvalidProviderConfig(ForebayError, ValueError):
    """The simulated provider has {name}={value!r}; it must be {expected}."""

    name: str
    value: object
    expected: str


def _positive(value: float) -> bool:
    return 0 < value < math.inf


def _require(name: str, value: object, holds: bool, expected: str) -> None:  # noqa: FBT001 - the condition itself
    if not holds:
        raise InvalidProviderConfig(name=name, value=value, expected=expected)


class Dialect(enum.StrEnum):
    """The API that a provider imitates: its wire format, its headers and its way of counting tokens."""

    OPENAI = "openai"
    """Tokens are charged when a call is accepted: the larger of its ``max_tokens`` and its estimated input."""
    ANTHROPIC = "anthropic"
    """Input is charged when a call is accepted, output while it is produced; an output bucket can go into debt."""


class Unit(enum.StrEnum):
    """The unit that a rate limit counts. A token is always an LLM token."""

    REQUESTS = "requests"
    TOKENS = "tokens"
    INPUT_TOKENS = "input_tokens"
    OUTPUT_TOKENS = "output_tokens"


UNITS_BY_NAME: Final[Mapping[str, Unit]] = MappingProxyType(
    {"rpm": Unit.REQUESTS, "tpm": Unit.TOKENS, "itpm": Unit.INPUT_TOKENS, "otpm": Unit.OUTPUT_TOKENS}
)
"""Units of the rate limits a minute, by their usual short names."""


class BusyReason(enum.StrEnum):
    """The reason that a provider gives when too many calls are in flight."""

    OVERLOADED = "overloaded"
    """529 of Anthropic, 503 of OpenAI: the provider's own capacity."""
    CONCURRENCY = "concurrency"
    """429: a limit on the account's calls in flight."""


class Wording(enum.StrEnum):
    """The reason that the message of a 429 gives, whatever the reason is."""

    VAGUE = "vague"
    """Nothing."""
    RATE = "rate"
    """Too many requests per minute."""
    CONCURRENCY = "concurrency"
    """Too many requests in flight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedLimits:
    """The departures of a provider's answers from the truth about its limits; the defaults are the truth."""

    wording: Wording | None = None  # of each 429; None: the truth
    retry_after: str | None = None  # value of the header of each 429; "" leaves it out; None: the truth
    rate_limit_headers: bool = True  # of any answer
    remaining: int | None = None  # what each rate limit header says is left; None: the truth


@dataclass(frozen=True, slots=True, kw_only=True)
class Penalty:
    """A penalty box: once a call was refused by a limit, every call of its account is refused for ``seconds``."""

    seconds: float
    extended: bool = False  # each call in that time begins it again

    def __post_init__(self) -> None:
        _require("penalty.seconds", self.seconds, _positive(self.seconds), "a positive number of seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRateLimit:
    """A rate limit of the provider: ``amount`` of ``unit`` in every ``period`` seconds.

    By default a token bucket, full at the start and refilled continuously, so that in any t seconds it grants at most
    ``burst + amount * t / period``. With ``fixed_window``, ``amount`` in each window; windows start at multiples of
    ``period``. It holds from second ``since`` until ``until``: two limits make a change of tier.
    """

    unit: Unit
    amount: int
    period: float = 60.0  # seconds
    burst: float | None = None  # size of the bucket; None: `amount`
    fixed_window: bool = False
    since: float = 0.0  # seconds since the start
    until: float | None = None  # seconds since the start; None: without end

    def __post_init__(self) -> None:
        _require("amount", self.amount, self.amount >= 1, "at least 1")
        _require("period", self.period, _positive(self.period), "a positive number of seconds")
        _require("burst", self.burst, self.burst is None or self.burst >= 1, "None or at least 1")
        has_two = self.fixed_window and self.burst is not None
        _require("fixed_window", self.fixed_window, not has_two, "False where burst is set")
        _require("until", self.until, self.until is None or self.until > self.since >= 0, "None or after since")

    @property
    def size(self) -> float:
        """The largest amount that can be granted at one moment."""
        return float(self.amount if self.burst is None else self.burst)


@dataclass(frozen=True, slots=True, kw_only=True)
class AccelerationLimit:
    """A limit on how fast usage may grow, as Anthropic enforces it with 429.

    In each minute an account may use at most ``max(start, usage of the previous minute + growth)`` of ``unit``.
    """

    unit: Unit = Unit.INPUT_TOKENS
    start: float  # units in a minute
    growth: float  # units in a minute, above the previous minute

    def __post_init__(self) -> None:
        allowed = (Unit.INPUT_TOKENS, Unit.REQUESTS)
        _require("acceleration.unit", self.unit, self.unit in allowed, "requests or input_tokens")
        _require("acceleration.start", self.start, _positive(self.start), "positive")
        _require("acceleration.growth", self.growth, self.growth >= 0, "at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityStep:
    """A change of capacity: from second ``at`` on, the provider has ``slots`` slots; 0 is an outage.

    During an outage every call is refused. Calls in flight pause until slots return; with ``cut`` they end at once.
    ``cut`` without an outage also ends the calls in flight: a restart.
    """

    at: float  # seconds since the start
    slots: int
    cut: bool = False

    def __post_init__(self) -> None:
        _require("capacity_steps.at", self.at, self.at >= 0, "at least 0 seconds")
        _require("capacity_steps.slots", self.slots, self.slots >= 0, "at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slowdown:
    """A slow period: from second ``at``, for ``seconds``, all work takes ``factor`` times as long, at any load."""

    at: float  # seconds since the start
    seconds: float
    factor: float

    def __post_init__(self) -> None:
        _require("slowdowns.at", self.at, self.at >= 0, "at least 0 seconds")
        _require("slowdowns.seconds", self.seconds, _positive(self.seconds), "a positive number of seconds")
        _require("slowdowns.factor", self.factor, _positive(self.factor), "positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bursts:
    """Recurring periods in which the provider answers *overloaded* to a share of the calls, at any load."""

    every: float  # seconds from the start of one period to the start of the next, on average
    seconds: float  # duration of one period
    share: float = 1.0  # share of the calls refused in a period
    regular: bool = False  # periods start at multiples of `every`; otherwise the gaps are exponential

    def __post_init__(self) -> None:
        _require("bursts.seconds", self.seconds, _positive(self.seconds), "a positive number of seconds")
        _require("bursts.every", self.every, self.every > self.seconds, "longer than bursts.seconds")
        _require("bursts.share", self.share, 0 <= self.share <= 1, "from 0 to 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """The faults of a provider that no load causes. Each number is a probability per arriving call."""

    stray: float = 0.0  # a 429 without a cause
    error: float = 0.0  # a 500
    bad_gateway: float = 0.0  # a 502 with an HTML page as its body
    unavailable: float = 0.0  # a 503 with an empty body
    cut: float = 0.0  # the connection drops during the answer
    late_error: float = 0.0  # an error during the answer: an event in a stream, otherwise a 500
    straggler: float = 0.0  # the call takes `straggler_factor` times as long
    straggler_factor: float = 10.0
    bursts: Bursts | None = None

    def __post_init__(self) -> None:
        for name in ("stray", "error", "bad_gateway", "unavailable", "cut", "late_error", "straggler"):
            value = getattr(self, name)
            _require(f"faults.{name}", value, 0 <= value <= 1, "a probability from 0 to 1")
        refused = self.stray + self.error + self.bad_gateway + self.unavailable
        _require("faults", refused, refused <= 1, "refusals with probabilities that add up to at most 1")
        cut = self.cut + self.late_error
        _require("faults", cut, cut <= 1, "cuts and late errors with probabilities that add up to at most 1")
        _require("faults.straggler_factor", self.straggler_factor, _positive(self.straggler_factor), "positive")


@dataclass(frozen=True, slots=True)
class TokenPrice:
    """The price of a model's tokens, in US dollars per million tokens."""

    input: float
    output: float

    def __post_init__(self) -> None:
        _require("price", (self.input, self.output), min(self.input, self.output) >= 0, "at least 0 dollars")

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        """Return the cost of a call in US dollars."""
        return (input_tokens * self.input + output_tokens * self.output) / 1e6


PRICES: Final[Mapping[str, TokenPrice]] = MappingProxyType(
    {
        "gpt-4o-mini": TokenPrice(0.15, 0.60),
        "gpt-4o": TokenPrice(2.50, 10.00),
        "claude-sonnet": TokenPrice(3.00, 15.00),
        "claude-haiku": TokenPrice(1.00, 5.00),
    }
)
"""List prices of some models, by the prefix of their names (OpenAI and Anthropic, 2025)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderConfig:
    """The configuration of a simulated LLM provider.

    A call that runs alone takes ``ttft + output tokens * tpot`` seconds; each of the two times is multiplied by a
    lognormal factor of mean 1 and deviation ``noise``. Up to ``slots`` calls run at full speed; n > ``slots`` calls
    share it, each at ``slots / n`` of the speed (processor sharing). Without ``overcommit`` nothing else happens: the
    calls get slower. With it, calls that arrive while ``overcommit * slots`` are in flight are refused with
    ``busy_reason``; with 1.0 the speed is never shared. With ``replicas``, the slots are split evenly among so many;
    each call goes to one of them at random, and is refused if that one is full: servers behind a load balancer.

    Raises:
        InvalidProviderConfig: a value is out of range; the message names it.
    """

    dialect: Dialect = Dialect.OPENAI
    slots: int = 50  # calls at full speed
    capacity_steps: tuple[CapacityStep, ...] = ()  # changes of `slots` over time
    slowdowns: tuple[Slowdown, ...] = ()
    overcommit: float | None = None  # calls in flight per slot above which calls are refused; None: no limit
    busy_reason: BusyReason = BusyReason.OVERLOADED
    max_in_flight: int = 10_000  # in any case; one more call is refused as overloaded
    replicas: int = 1  # servers that share the slots; more than 1 need `overcommit`
    tokens_in_flight: int | None = None  # input and output tokens of the calls in flight, at most; None: no limit
    stalls: bool = True  # a fall of capacity slows the calls in flight; False: only new calls notice it
    ttft: float = 0.5  # seconds to the first token of a call that runs alone
    tpot: float = 0.03  # seconds per output token of a call that runs alone
    noise: float = 0.1
    rate_limits: tuple[SimulatedRateLimit, ...] = ()
    by_key: bool = False  # each API key has its own rate limits, acceleration limit and spend cap
    by_model: bool = False  # each model has its own, too
    acceleration: AccelerationLimit | None = None
    spend_cap: float | None = None  # US dollars; an account that has spent them is refused
    count_faults: bool = True  # a call answered with 5xx counts against the request limit
    count_refusals: bool = False  # a call answered with 429 counts too, so that immediate retries do not help
    penalty: Penalty | None = None  # what follows a call that a limit has refused
    reports: ReportedLimits = field(default_factory=ReportedLimits)
    faults: Faults = field(default_factory=Faults)
    prices: Mapping[str, TokenPrice] = field(default_factory=lambda: dict(PRICES))  # also the models that exist
    finish_abandoned: bool = False  # a call whose client hung up runs to its end and is billed in full
    refusal_delay: float = 0.02  # seconds until a refusal is answered
    tokens_per_event: int = 8  # of a stream
    max_runs: int = 10_000  # runs (see `SimulatedCall.run`) that are billed separately; further ones share a bill

    def __post_init__(self) -> None:
        _require("slots", self.slots, self.slots >= 0, "at least 0 (0 is an outage)")
        _require("overcommit", self.overcommit, self.overcommit is None or self.overcommit >= 1, "None or at least 1")
        _require("max_in_flight", self.max_in_flight, self.max_in_flight >= 1, "at least 1")
        _require("replicas", self.replicas, self.replicas >= 1, "at least 1")
        refuses = self.replicas == 1 or self.overcommit is not None
        _require("replicas", self.replicas, refuses, "1 where overcommit is None")
        tokens = self.tokens_in_flight
        _require("tokens_in_flight", tokens, tokens is None or tokens >= 1, "None or at least 1")
        _require("ttft", self.ttft, _positive(self.ttft), "a positive number of seconds")
        _require("tpot", self.tpot, _positive(self.tpot), "a positive number of seconds per token")
        _require("noise", self.noise, 0 <= self.noise <= 2, "from 0 to 2")  # noqa: PLR2004 - more is unrealistic
        _require("spend_cap", self.spend_cap, self.spend_cap is None or self.spend_cap >= 0, "None or dollars")
        _require("prices", self.prices, bool(self.prices), "a table with at least one model")
        _require("refusal_delay", self.refusal_delay, 0 <= self.refusal_delay < math.inf, "at least 0 seconds")
        _require("tokens_per_event", self.tokens_per_event, self.tokens_per_event >= 1, "at least 1 token")
        _require("max_runs", self.max_runs, self.max_runs >= 0, "at least 0")
        times = [step.at for step in self.capacity_steps]
        _require("capacity_steps", times, times == sorted(set(times)), "in order of time, one at a time")

    @classmethod
    def openai(cls, *, rpm: int | None = None, tpm: int | None = None, **rest: Any) -> Self:
        """Return a provider that counts as OpenAI does.

        Args:
            rpm: requests a minute; None: no limit.
            tpm: tokens a minute; None: no limit.
            **rest: other fields.
        """
        return cls(dialect=Dialect.OPENAI, rate_limits=limits_per_minute(rpm=rpm, tpm=tpm), **rest)

    @classmethod
    def anthropic(
        cls, *, rpm: int | None = None, itpm: int | None = None, otpm: int | None = None, **rest: Any
    ) -> Self:
        """Return a provider that counts as Anthropic does.

        Args:
            rpm: requests a minute; None: no limit.
            itpm: input tokens a minute; None: no limit.
            otpm: output tokens a minute; None: no limit.
            **rest: other fields.
        """
        limits = limits_per_minute(rpm=rpm, itpm=itpm, otpm=otpm)
        return cls(dialect=Dialect.ANTHROPIC, rate_limits=limits, **rest)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read a configuration from a JSON object with the names of its fields; an unknown name is an error.

        Raises:
            InvalidProviderConfig: the text is not JSON, or has an unknown name, a wrong type or a value out of range.
        """
        try:
            raw = msgspec.json.decode(text)
            config = msgspec.convert(raw, cls)
        except (msgspec.MsgspecError, TypeError) as error:
            cause = error.__cause__
            if isinstance(cause, InvalidProviderConfig):
                raise cause from None
            raise InvalidProviderConfig(name="JSON", value=text, expected=f"a provider ({error})") from None
        for name in _unknown_names(raw, msgspec.to_builtins(config)):
            raise InvalidProviderConfig(name=name, value="...", expected="a field that exists")
        return config

    def to_json(self) -> bytes:
        """Return the configuration as JSON that `from_json` reads."""
        return msgspec.json.encode(self)


def limits_per_minute(**amounts: int | None) -> tuple[SimulatedRateLimit, ...]:
    """Return rate limits a minute by the short names of their units, as in ``rpm=500``; None is no limit."""
    return tuple(SimulatedRateLimit(unit=UNITS_BY_NAME[name], amount=n) for name, n in amounts.items() if n is not None)


def _unknown_names(raw: Any, known: Any) -> list[str]:
    """Return the names in `raw` that decoding silently dropped."""
    if isinstance(raw, dict) and isinstance(known, dict):
        nested = (name for key in raw if key in known for name in _unknown_names(raw[key], known[key]))
        return [*(key for key in raw if key not in known), *nested]
    if isinstance(raw, list) and isinstance(known, list | tuple):
        return [name for a, b in zip(raw, known, strict=True) for name in _unknown_names(a, b)]
    return []
