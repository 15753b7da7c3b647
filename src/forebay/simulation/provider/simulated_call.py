"""A call to a simulated provider, and the events that follow it."""

from __future__ import annotations

from dataclasses import dataclass

from forebay.errors import ForebayError
from forebay.simulation.provider.billing import SimulatedUsage
from forebay.simulation.provider.fault_plan import RefusalReason
from forebay.simulation.provider.provider_config import Dialect


class InvalidSimulatedCall(ForebayError, ValueError):
    """Tokens must be >= 0, max_tokens >= 1; got {input_tokens} input, {output_tokens} output, {max_tokens} at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedCall:
    """One call as it reaches the provider.

    `input_tokens` is the provider's count of the input. `output_tokens` is the length of the answer at which the model
    stops by itself; ``max_tokens`` can end it earlier. Without `stream`, the events are the first token and the end.

    Raises:
        InvalidSimulatedCall: a number of tokens is out of range.
    """

    model: str
    input_tokens: int
    output_tokens: int
    max_tokens: int | None = None
    stream: bool = False
    key: str = ""  # the API key
    run: str | None = None  # the agent's run that the tokens are billed to, see `ProviderModel.bills`
    dialect: Dialect | None = None  # of the answer; None: the provider's own

    def __post_init__(self) -> None:
        if min(self.input_tokens, self.output_tokens) < 0 or (self.max_tokens is not None and self.max_tokens < 1):
            raise InvalidSimulatedCall(
                input_tokens=self.input_tokens, output_tokens=self.output_tokens, max_tokens=self.max_tokens
            )

    @property
    def stops(self) -> bool:
        """True if the answer ends by itself, False if ``max_tokens`` ends it."""
        return self.max_tokens is None or self.output_tokens <= self.max_tokens

    @property
    def length(self) -> int:
        """The number of output tokens of the whole answer: at least 1."""
        return max(1, self.output_tokens if self.max_tokens is None else min(self.output_tokens, self.max_tokens))


@dataclass(frozen=True, slots=True)
class CallAccepted:
    """The call is in flight; its answer starts with these headers."""

    call_id: int
    request_id: str
    headers: dict[str, str]


@dataclass(frozen=True, slots=True)
class CallRefused:
    """The call was answered with an error."""

    status: int
    headers: dict[str, str]
    body: bytes
    reason: RefusalReason
    retry_after: float | None  # seconds, exact; None: the provider gives none


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The first token of a call was produced."""

    call_id: int
    at: float


@dataclass(frozen=True, slots=True)
class TokensProduced:
    """Further tokens of a streaming call were produced."""

    call_id: int
    at: float
    tokens: int


@dataclass(frozen=True, slots=True)
class CallCompleted:
    """The answer to a call is complete."""

    call_id: int
    at: float
    usage: SimulatedUsage


@dataclass(frozen=True, slots=True)
class CallCut:
    """The provider ended a call early: with an error if `reported`, otherwise by dropping the connection."""

    call_id: int
    at: float
    usage: SimulatedUsage
    reported: bool


CallEvent = FirstToken | TokensProduced | CallCompleted | CallCut
