"""What a simulated provider is: its size, its speed, its limits, its prices and its faults, as checked data.

Times are seconds; points in time are seconds since the provider began.
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
    """A simulated provider cannot have {name}={value!r}: it must be {expected}."""

    name: str
    value: object
    expected: str


def _positive(value: float) -> bool:
    return 0 < value < math.inf


def _require(name: str, value: object, holds: bool, expected: str) -> None:  # noqa: FBT001 - the condition itself
    if not holds:
        raise InvalidProviderConfig(name=name, value=value, expected=expected)


class Dialect(enum.StrEnum):
    """Whose wire format, headers and way of counting a provider has."""

    OPENAI = "openai"
    """Tokens are charged when a call is let in: the larger of its ``max_tokens`` and its estimated input."""
    ANTHROPIC = "anthropic"
    """Input is charged when a call is let in, output as it is made; a bucket of output may so go into debt."""


class Unit(enum.StrEnum):
    """What an allowance counts. A token is an LLM token and nothing else."""

    REQUESTS = "requests"
    TOKENS = "tokens"
    INPUT_TOKENS = "input_tokens"
    OUTPUT_TOKENS = "output_tokens"


class BusyReason(enum.StrEnum):
    """What a provider says to a call that finds too many others in flight."""

    OVERLOADED = "overloaded"
    """529 of Anthropic, 503 of OpenAI: the provider's own capacity."""
    CONCURRENCY = "concurrency"
    """429: a limit on the calls of this account that are in flight at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRateLimit:
    """A rate that the provider grants: ``amount`` of ``unit`` every ``per`` seconds.

    A bucket by default, full at the start and refilled all the time, so that over any span of t seconds it grants at
    most ``burst + amount * t / per``. With ``window``, a fixed window: ``amount`` in each period, periods beginning at
    multiples of ``per``.
    """

    unit: Unit
    amount: int
    period: float = 60.0  # seconds
    burst: float | None = None  # the most that a bucket holds; None: `amount`
    fixed_window: bool = False

    def __post_init__(self) -> None:
        _require("amount", self.amount, self.amount >= 1, "at least 1")
        _require("period", self.period, _positive(self.period), "a positive number of seconds")
        _require("burst", self.burst, self.burst is None or self.burst >= 1, "None or at least 1")
        _require(
            "fixed_window",
            self.fixed_window,
            not (self.fixed_window and self.burst is not None),
            "False where burst is set",
        )

    @property
    def size(self) -> float:
        """The most that can be granted at one moment."""
        return float(self.amount if self.burst is None else self.burst)


@dataclass(frozen=True, slots=True, kw_only=True)
class AccelerationLimit:
    """A limit on how fast use may grow, of the kind that Anthropic answers with 429.

    In each minute an account may use at most ``max(start, used in the minute before + growth)`` of ``unit``.
    """

    unit: Unit = Unit.INPUT_TOKENS
    start: float  # units in a minute
    growth: float  # units in a minute, more than in the minute before

    def __post_init__(self) -> None:
        allowed = (Unit.INPUT_TOKENS, Unit.REQUESTS)
        _require("acceleration.unit", self.unit, self.unit in allowed, "requests or input_tokens")
        _require("acceleration.start", self.start, _positive(self.start), "positive")
        _require("acceleration.growth", self.growth, self.growth >= 0, "at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityStep:
    """From second ``at``, the provider has ``slots`` slots; 0 is an outage.

    During an outage nothing is let in. What is in flight stands still until slots return, or with ``cut`` is ended at
    once. ``cut`` without an outage ends what is in flight too: a restart.
    """

    at: float  # seconds since the start
    slots: int
    cut: bool = False

    def __post_init__(self) -> None:
        _require("steps.at", self.at, self.at >= 0, "at least 0 seconds")
        _require("steps.slots", self.slots, self.slots >= 0, "at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slowdown:
    """From second ``at``, for ``seconds``, everything takes ``factor`` times as long, whatever the load."""

    at: float  # seconds since the start
    seconds: float
    factor: float

    def __post_init__(self) -> None:
        _require("slow.at", self.at, self.at >= 0, "at least 0 seconds")
        _require("slow.seconds", self.seconds, _positive(self.seconds), "a positive number of seconds")
        _require("slow.factor", self.factor, _positive(self.factor), "positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bursts:
    """Spells in which the provider says *overloaded* to a share of the arrivals, whatever the load."""

    every: float  # seconds from the start of one to the start of the next, on average
    seconds: float  # how long one lasts
    share: float = 1.0  # of the arrivals, refused during one
    regular: bool = False  # at multiples of `every`; else the gaps are exponential

    def __post_init__(self) -> None:
        _require("bursts.seconds", self.seconds, _positive(self.seconds), "a positive number of seconds")
        _require("bursts.every", self.every, self.every > self.seconds, "longer than bursts.seconds")
        _require("bursts.share", self.share, 0 <= self.share <= 1, "from 0 to 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What goes wrong without our doing: each a chance per arriving call, drawn from the seed."""

    stray: float = 0.0  # a 429 that no load caused
    error: float = 0.0  # a 500
    bad_gateway: float = 0.0  # a 502, with a page of HTML for a body
    unavailable: float = 0.0  # a 503, with an empty body
    cut: float = 0.0  # the connection drops somewhere in the answer
    late_error: float = 0.0  # an error is reported somewhere in the answer: an event in a stream, else a 500
    straggler: float = 0.0  # the call takes `straggler_factor` times as long
    straggler_factor: float = 10.0
    bursts: Bursts | None = None

    def __post_init__(self) -> None:
        for name in ("stray", "error", "bad_gateway", "unavailable", "cut", "late_error", "straggler"):
            value = getattr(self, name)
            _require(f"faults.{name}", value, 0 <= value <= 1, "a chance from 0 to 1")
        refused = self.stray + self.error + self.bad_gateway + self.unavailable
        _require("faults", refused, refused <= 1, "refusals with chances that add up to 1 at most")
        _require("faults", self.cut + self.late_error, self.cut + self.late_error <= 1, "cuts of at most 1 in all")
        _require("faults.straggler_factor", self.straggler_factor, _positive(self.straggler_factor), "positive")


@dataclass(frozen=True, slots=True)
class TokenPrice:
    """US dollars per million tokens."""

    input: float
    output: float

    def __post_init__(self) -> None:
        _require("price", (self.input, self.output), min(self.input, self.output) >= 0, "at least 0 dollars")

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        """US dollars for so many tokens."""
        return (input_tokens * self.input + output_tokens * self.output) / 1e6


PRICES: Final[Mapping[str, TokenPrice]] = MappingProxyType(
    {
        "gpt-4o-mini": TokenPrice(0.15, 0.60),
        "gpt-4o": TokenPrice(2.50, 10.00),
        "claude-sonnet": TokenPrice(3.00, 15.00),
        "claude-haiku": TokenPrice(1.00, 5.00),
    }
)
"""List prices of some models, by the beginning of their name (OpenAI and Anthropic, 2025)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderConfig:
    """A simulated provider of LLM calls.

    A call alone takes ``ttft + output tokens * tpot`` seconds, each of the two times a lognormal factor of mean 1 and
    deviation ``noise``. Up to ``slots`` calls run at full speed; n > ``slots`` share it, each at ``slots / n`` of the
    speed. By default that is all, the calls get slower and slower; with ``overcommit``, arrivals that find
    ``overcommit * slots`` calls in flight are refused, as ``busy`` says: 1.0 never shares.

    Raises:
        InvalidProvider: a value is out of its range; the message names it.
    """

    dialect: Dialect = Dialect.OPENAI
    slots: int = 50  # calls at full speed
    capacity_steps: tuple[CapacityStep, ...] = ()  # how `slots` changes over time
    slowdowns: tuple[Slowdown, ...] = ()  # spells of slowness
    overcommit: float | None = None  # calls in flight for each slot, above which arrivals are refused; None: no limit
    busy_reason: BusyReason = BusyReason.OVERLOADED
    max_in_flight: int = 10_000  # whatever the above: one more is refused as overloaded
    ttft: float = 0.5  # seconds to the first token, alone
    tpot: float = 0.03  # seconds for each output token, alone
    noise: float = 0.1
    rate_limits: tuple[SimulatedRateLimit, ...] = ()  # rates
    by_key: bool = False  # allowances, acceleration and spend_cap are for each API key, not for all together
    by_model: bool = False  # ... and for each model
    acceleration: AccelerationLimit | None = None
    spend_cap: float | None = None  # US dollars, after which an account is refused
    count_faults: bool = True  # a call answered 5xx has spent its request allowance
    count_refusals: bool = False  # a call answered 429 spends it too, so that hammering does not help
    faults: Faults = field(default_factory=Faults)
    prices: Mapping[str, TokenPrice] = field(default_factory=lambda: dict(PRICES))  # and with it, the models that exist
    finish_abandoned: bool = False  # a call whose client has left runs to its end, and is billed whole
    refusal_delay: float = 0.02  # seconds until a refusal is answered
    tokens_per_event: int = 8  # tokens in one event of a stream
    max_runs: int = (
        10_000  # how many runs (see `SimulatedCall.run`) are accounted for one by one; further ones together
    )

    def __post_init__(self) -> None:
        _require("slots", self.slots, self.slots >= 0, "at least 0 (0 is an outage)")
        _require("overcommit", self.overcommit, self.overcommit is None or self.overcommit >= 1, "None or at least 1")
        _require("max_in_flight", self.max_in_flight, self.max_in_flight >= 1, "at least 1")
        _require("ttft", self.ttft, _positive(self.ttft), "a positive number of seconds")
        _require("tpot", self.tpot, _positive(self.tpot), "a positive number of seconds per token")
        _require("noise", self.noise, 0 <= self.noise <= 2, "from 0 to 2")  # noqa: PLR2004 - wider is no noise
        _require("spend_cap", self.spend_cap, self.spend_cap is None or self.spend_cap >= 0, "None or dollars")
        _require("prices", self.prices, bool(self.prices), "a table with at least one model")
        _require("refusal_delay", self.refusal_delay, 0 <= self.refusal_delay < math.inf, "at least 0 seconds")
        _require("tokens_per_event", self.tokens_per_event, self.tokens_per_event >= 1, "at least 1 token")
        _require("max_runs", self.max_runs, self.max_runs >= 0, "at least 0")
        times = [step.at for step in self.capacity_steps]
        _require("capacity_steps", times, times == sorted(set(times)), "in order of time, one at a time")

    @classmethod
    def openai(cls, *, rpm: int | None = None, tpm: int | None = None, **rest: Any) -> Self:
        """A provider that counts as OpenAI does: `rpm` requests and `tpm` tokens a minute, None for no limit."""
        return cls(dialect=Dialect.OPENAI, rate_limits=_per_minute(requests=rpm, tokens=tpm), **rest)

    @classmethod
    def anthropic(
        cls, *, rpm: int | None = None, itpm: int | None = None, otpm: int | None = None, **rest: Any
    ) -> Self:
        """A provider that counts as Anthropic does: requests, input and output tokens a minute, None for no limit."""
        rates = _per_minute(requests=rpm, input_tokens=itpm, output_tokens=otpm)
        return cls(dialect=Dialect.ANTHROPIC, rate_limits=rates, **rest)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read a provider from JSON with the names of its fields; an unknown name is an error, not a surprise.

        Raises:
            InvalidProvider: not JSON, an unknown name, a wrong type or a value out of range.
        """
        try:
            raw = msgspec.json.decode(text)
            config = msgspec.convert(raw, cls)
        except (msgspec.MsgspecError, TypeError) as error:
            cause = error.__cause__
            if isinstance(cause, InvalidProviderConfig):
                raise cause from None
            raise InvalidProviderConfig(name="JSON", value=text, expected=f"a provider ({error})") from None
        for name in _unknown(raw, msgspec.to_builtins(config)):
            raise InvalidProviderConfig(name=name, value="...", expected="a field that exists")
        return config

    def to_json(self) -> bytes:
        """Everything that `from_json` reads back."""
        return msgspec.json.encode(self)


def _per_minute(**amounts: int | None) -> tuple[SimulatedRateLimit, ...]:
    return tuple(SimulatedRateLimit(unit=Unit(unit), amount=n) for unit, n in amounts.items() if n is not None)


def _unknown(raw: Any, known: Any) -> list[str]:
    """The names in `raw` that decoding has silently dropped."""
    if isinstance(raw, dict) and isinstance(known, dict):
        inside = (name for key in raw if key in known for name in _unknown(raw[key], known[key]))
        return [*(key for key in raw if key not in known), *inside]
    if isinstance(raw, list) and isinstance(known, list | tuple):
        return [name for a, b in zip(raw, known, strict=True) for name in _unknown(a, b)]
    return []
