"""A call to a simulated provider, and what can become of it."""

from __future__ import annotations

from dataclasses import dataclass

from forebay.errors import ForebayError
from forebay.simulation.provider.billing import BilledUsage
from forebay.simulation.provider.fault_plan import RefusalReason
from forebay.simulation.provider.provider_config import Dialect


class InvalidSimulatedCall(ForebayError, ValueError):
    """Tokens are counted from 0, bounded from 1: not {input_tokens} in, {output_tokens} out, {max_tokens} at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedCall:
    """One call as it reaches the provider.

    `input_tokens` is what the provider counts, `output_tokens` what the model will have said when it stops by itself;
    ``max_tokens`` cuts that short. A call that does not `stream` is told only its first token and its end.

    Raises:
        InvalidCall: fewer than no tokens.
    """

    model: str
    input_tokens: int
    output_tokens: int
    max_tokens: int | None = None
    stream: bool = False
    key: str = ""  # the API key
    run: str | None = None  # whose account of tokens it goes to, see `ProviderModel.bills`
    dialect: Dialect | None = None  # in which to answer, if not the provider's own

    def __post_init__(self) -> None:
        if min(self.input_tokens, self.output_tokens) < 0 or (self.max_tokens is not None and self.max_tokens < 1):
            facts = {"input_tokens": self.input_tokens, "output_tokens": self.output_tokens}
            raise InvalidSimulatedCall(**facts, max_tokens=self.max_tokens)

    @property
    def stops(self) -> bool:
        """The answer ends by itself, not at its bound."""
        return self.max_tokens is None or self.output_tokens <= self.max_tokens

    @property
    def length(self) -> int:
        """Output tokens that will be made: at least 1."""
        return max(1, self.output_tokens if self.max_tokens is None else min(self.output_tokens, self.max_tokens))


@dataclass(frozen=True, slots=True)
class CallAccepted:
    """The call is in flight; its answer will begin with these headers."""

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
    retry_after: float | None  # seconds, as exactly as the provider knows; None: it does not say


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The first token of a call is there."""

    call_id: int
    at: float


@dataclass(frozen=True, slots=True)
class TokensProduced:
    """So many further tokens of a streaming call are there."""

    call_id: int
    at: float
    tokens: int


@dataclass(frozen=True, slots=True)
class CallCompleted:
    """A call has been answered whole."""

    call_id: int
    at: float
    usage: BilledUsage


@dataclass(frozen=True, slots=True)
class CallCut:
    """A call was ended by the provider: `reported` as an error, or the connection just dropped."""

    call_id: int
    at: float
    usage: BilledUsage
    reported: bool


CallEvent = FirstToken | TokensProduced | CallCompleted | CallCut
