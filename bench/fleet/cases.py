"""The calls of the agents and their providers. Each case is drawn from its seed, the same for every way."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from forebay.simulation.provider import wire_messages as wire
from forebay.simulation.provider.provider_config import (
    Bursts,
    BusyReason,
    Dialect,
    Faults,
    ProviderConfig,
    SimulatedRateLimit,
    Slowdown,
    Unit,
)
from forebay.simulation.provider.simulated_call import SimulatedCall

MODELS: Final = {Dialect.OPENAI: "gpt-4o-mini", Dialect.ANTHROPIC: "claude-sonnet"}
MAX_TOKENS: Final = 512  # of output that a call asks for
_CHARACTERS: Final = 4  # per token, and
_MESSAGE_TOKENS: Final = 4  # per message, as the simulated provider counts
_LOREM: Final = wire.answer_text(0, 4_000)


@dataclass(frozen=True, slots=True)
class Turn:
    """One call of an agent.

    Attributes:
        input_tokens: tokens sent.
        output_tokens: tokens of the answer.
        tools: seconds for which the agent uses tools before the call.
    """

    input_tokens: int
    output_tokens: int
    tools: float

    def text(self) -> str:
        """Return a text of `input_tokens` tokens, as the simulated provider counts them."""
        length = _CHARACTERS * (self.input_tokens - _MESSAGE_TOKENS)
        return (_LOREM * (1 + length // len(_LOREM)))[:length]

    def call(self, dialect: Dialect) -> SimulatedCall:
        """Return the call as the provider model sees it."""
        return SimulatedCall(
            model=MODELS[dialect],
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            max_tokens=MAX_TOKENS,
            dialect=dialect,
        )


@dataclass(frozen=True, kw_only=True)
class FleetCase:
    """Agents that start at once, and their provider.

    Attributes:
        config: the provider.
        agents: how many.
        turns: calls of each, one after the other.
        context: input tokens of the first call.
        growth: input tokens that each further call adds.
        streams: whether every second agent streams its answers. Such an agent calls again when an answer breaks off,
            because no proxy can take back what it has forwarded.
        seed: of all random numbers.
    """

    config: ProviderConfig
    agents: int
    turns: int = 6
    context: int = 800
    growth: int = 300
    streams: bool = True
    seed: int = 1
    plans: tuple[tuple[Turn, ...], ...] = field(init=False)

    def __post_init__(self) -> None:
        draw = random.Random(f"{self.seed}/plans")
        plans = tuple(tuple(self._turn(draw, number) for number in range(self.turns)) for _ in range(self.agents))
        object.__setattr__(self, "plans", plans)

    def _turn(self, draw: random.Random, number: int) -> Turn:
        made = min(400, max(40, round(draw.lognormvariate(5.0, 0.6))))
        sent = round((self.context + number * self.growth) * draw.uniform(0.9, 1.1))
        return Turn(sent, made, draw.uniform(0.2, 2.0) if number else 0.0)

    @property
    def dialect(self) -> Dialect:
        """Return the dialect of the provider."""
        return self.config.dialect

    @property
    def calls(self) -> int:
        """Return the number of calls of all agents, if none is retried."""
        return self.agents * self.turns


def _provider(dialect: Dialect, rates: Mapping[Unit, int], *, window: bool = False, **rest: Any) -> ProviderConfig:
    rate_limits = tuple(
        SimulatedRateLimit(unit=unit, amount=amount, fixed_window=window) for unit, amount in rates.items()
    )
    fields = {"slots": 100, "ttft": 0.5, "tpot": 0.02, "noise": 0.0, **rest}
    return ProviderConfig(dialect=dialect, rate_limits=rate_limits, **fields)


def _openai(agents: int, *, window: bool = False) -> FleetCase:
    """Return a case whose key grants, in a minute, a quarter of what the agents need."""
    rates = {Unit.REQUESTS: 3 * agents // 2, Unit.TOKENS: 4_000 * agents}
    return FleetCase(config=_provider(Dialect.OPENAI, rates, window=window), agents=agents)


def _anthropic(agents: int, *, window: bool = False) -> FleetCase:
    """Return the same case, limited by input tokens."""
    rates = {Unit.REQUESTS: 50 + 3 * agents, Unit.INPUT_TOKENS: 2_400 * agents, Unit.OUTPUT_TOKENS: 800 * agents}
    return FleetCase(config=_provider(Dialect.ANTHROPIC, rates, window=window), agents=agents)


def _eleven() -> FleetCase:
    """Return eleven coding agents on a first-tier key: 50 requests, 30,000 input and 8,000 output tokens a minute."""
    rates = {Unit.REQUESTS: 50, Unit.INPUT_TOKENS: 30_000, Unit.OUTPUT_TOKENS: 8_000}
    return FleetCase(config=_provider(Dialect.ANTHROPIC, rates), agents=11, turns=5, context=800, growth=500)


_FAULTS: Final = Faults(
    stray=0.02,
    error=0.01,
    bad_gateway=0.01,
    unavailable=0.01,
    cut=0.02,
    late_error=0.01,
    bursts=Bursts(every=40, seconds=4),
)


def _stress(dialect: Dialect, *, streams: bool) -> FleetCase:
    """Return a case with rates, slots, bursts of overload, cut calls, stray refusals and a slow spell, all at once."""
    rates = {Unit.REQUESTS: 40, Unit.TOKENS if dialect is Dialect.OPENAI else Unit.INPUT_TOKENS: 60_000}
    full: dict[str, Any] = {"slots": 8, "overcommit": 1.0, "busy_reason": BusyReason.CONCURRENCY}
    slow = Slowdown(at=60, seconds=30, factor=3.0)
    config = _provider(dialect, rates, faults=_FAULTS, slowdowns=(slow,), **full)
    return FleetCase(config=config, agents=20, streams=streams)


def _spike() -> FleetCase:
    """Return a case where a minute of calls takes six times as long, at a provider that refuses excess calls."""
    slow = (Slowdown(at=15, seconds=60, factor=6.0),)
    config = _provider(Dialect.ANTHROPIC, {Unit.REQUESTS: 200}, slots=12, overcommit=1.0, slowdowns=slow)
    return FleetCase(config=config, agents=20)


def _short(dialect: Dialect) -> FleetCase:
    """Return four agents for half a minute."""
    rates = {Unit.REQUESTS: 8, Unit.INPUT_TOKENS: 100_000}
    return FleetCase(config=_provider(dialect, rates), agents=4, turns=3)


CASES: Final[Mapping[str, FleetCase]] = {
    **{f"{agents} agents, OpenAI": _openai(agents) for agents in (5, 10, 20, 50)},
    **{f"{agents} agents, Anthropic": _anthropic(agents) for agents in (5, 10, 20, 50)},
    "20 agents, OpenAI, fixed windows": _openai(20, window=True),
    "20 agents, Anthropic, fixed windows": _anthropic(20, window=True),
    "eleven agents, growing contexts": _eleven(),
    "all faults at once, OpenAI": _stress(Dialect.OPENAI, streams=False),
    "all faults at once, Anthropic": _stress(Dialect.ANTHROPIC, streams=False),
    "all faults at once, streams": _stress(Dialect.ANTHROPIC, streams=True),
    "latency spike": _spike(),
}

OVER_SOCKETS: Final = ("20 agents, OpenAI", "eleven agents, growing contexts", "all faults at once, Anthropic")
"""The cases that also run over sockets."""

QUICK: Final[Mapping[str, FleetCase]] = {
    "4 agents, OpenAI": _short(Dialect.OPENAI),
    "4 agents, Anthropic": _short(Dialect.ANTHROPIC),
}
"""The cases that run over sockets with --quick."""
