"""The record of one request: what the headers of its answer and its line in the access log say."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

from forebay import clock
from forebay._text import header_value
from forebay.gateway.error_responses import ApiProtocol
from forebay.interfaces import Charge
from forebay.quota import BilledUsage
from forebay.upstream.call_request import Caller
from forebay.upstream.exchange import OUT_OF_TIME

REQUEST_ID: Final = "x-request-id"
ANTHROPIC_REQUEST_ID: Final = "request-id"
_VALID_ID: Final = re.compile(r"[!-~]{1,128}")
_QUERY: Final = re.compile(r"\?|%3[Ff]")  # an escaped one too: what follows may be a key
_MAX_PATH: Final = 200  # characters
_MAX_KNOWN_PATH: Final = 100  # characters of one that is remembered: callers choose them
_MAX_NAME: Final = 200  # characters of a name in a header

CallResult: TypeAlias = Literal[
    "answered",
    "provider_error",
    "rejected",
    "invalid",
    "unreachable",
    "broke_off",
    "caller_left",
    "shut_down",
    "bug",
]
"""The end of a request.

``answered``: by its provider, below 400; ``provider_error``: by its provider, with an error; ``rejected``: by a limit;
``invalid``: by a check of the gateway; ``unreachable``: its provider gave no answer; ``broke_off``: its answer was cut
short by the provider; ``caller_left``: its caller disconnected first; ``shut_down``: the gateway stopped; ``bug``: the
gateway failed.
"""


class CallRecord:
    """The record of one request, which those who serve it fill in.

    Args:
        method: such as ``"POST"``.
        path: as it was received. The query is not kept: it may hold an API key.
        headers: of the request, by lower-case name.

    Attributes:
        request_id: of the caller if it sent a valid one, else made here.
        provider_request_id: of the provider's answer; empty if it has none.
        method: such as ``"POST"``.
        path: without the query.
        tenant: whose call it is; empty if that was not read.
        key_name: the name of the issued key with which the call was made; empty if there is none.
        asked_target: the target that the call was for; empty if there is none.
        asked_model: the model that the call was for.
        target: that served it last, which may be that of a fallback.
        model: that served it last.
        account: that it used last.
        attempts: that were sent.
        waited: seconds in which it was held here, in queues and between attempts.
        first_output_at: when the first of a stream's output came, in the clock's seconds; None if none came.
        usage: of all its attempts; None if none is known.
        usd: dollars that its known usage costs; None if no price is known for it.
        limited_by: what rejected it; empty if nothing did.
        result: how it ended.
        out_of_time: its latest attempt failed, and no time was left for another one.
    """

    __slots__ = (
        "_arrived_at", "_ended_at", "_waits_since", "account", "asked_model", "asked_target", "attempts",
        "first_output_at", "key_name", "limited_by", "method", "model", "out_of_time", "path", "provider_request_id",
        "request_id",
        "result", "target", "tenant", "usage", "usd", "waited",
    )  # fmt: skip

    def __init__(self, method: str, path: str, headers: Mapping[str, str]) -> None:
        given = headers.get(REQUEST_ID)
        self.request_id = given if given is not None and _VALID_ID.fullmatch(given) else clock.new_id()
        self.provider_request_id = ""
        self.method = method
        self.path = _known_path(path) if len(path) <= _MAX_KNOWN_PATH else _shown_path(path)
        self.tenant = self.key_name = ""
        self.asked_target = self.asked_model = self.target = self.model = self.account = ""
        self.attempts = 0
        self.waited = 0.0
        self.first_output_at: float | None = None
        self.usage: BilledUsage | None = None
        self.usd: float | None = None
        self.limited_by = ""
        self.result: CallResult = "invalid"
        self.out_of_time = False
        self._arrived_at = clock.now()
        self._ended_at: float | None = None
        self._waits_since: float | None = None

    @property
    def duration(self) -> float:
        """The seconds from the arrival of the request to its end, or until now."""
        ended_at = self._ended_at
        return (clock.now() if ended_at is None else ended_at) - self._arrived_at

    @property
    def first_output(self) -> float | None:
        """The seconds from the arrival of the request to the first output of a stream; None if there was none."""
        return None if self.first_output_at is None else self.first_output_at - self._arrived_at

    @property
    def used(self) -> Charge | None:
        """The requests and tokens that it has used: None if they are not known, no request if it was not sent."""
        if not self.attempts:
            return Charge(requests=0)
        usage = self.usage
        if usage is None:
            return None
        sent, received = usage.input_tokens, usage.output_tokens
        return Charge(requests=1, input_tokens=sent, output_tokens=received, tokens=sent + received)

    def begin(self, caller: Caller, target: str, model: str, account: str) -> None:
        """Note whose call it is and where it goes; from now on it waits for its first attempt."""
        self.tenant = caller.tenant
        self.asked_target = self.target = target
        self.asked_model = self.model = model
        self.account = account
        self._waits_since = clock.now()

    def begin_attempt(self, target: str, model: str, account: str) -> None:
        """Note that an attempt is sent there."""
        self._end_wait()
        self.attempts += 1
        self.out_of_time = False
        self.target, self.model, self.account = target, model, account

    def note_answer(self, headers: Mapping[str, str]) -> None:
        """Note the head of a provider's answer."""
        self.provider_request_id = headers.get(REQUEST_ID) or headers.get(ANTHROPIC_REQUEST_ID, "")

    def end_attempt(self) -> None:
        """Note that an attempt has ended, or that its answer begins to stream."""
        self._waits_since = clock.now()

    def reject(self, limited_by: str) -> None:
        """Note that a limit has rejected it."""
        self.limited_by = limited_by
        self.result = "rejected"

    def end(self) -> None:
        """Note that the request has ended."""
        self._ended_at = clock.now()
        self._end_wait()

    def end_waiting(self) -> None:
        """Note that the call does not wait any more: its answer begins, or it was rejected."""
        self._end_wait()

    def add_usage(self, usage: BilledUsage, usd: float | None) -> None:
        """Add the usage of one attempt, and its dollars if a price is known."""
        if self.usage is None:
            self.usage, self.usd = usage, usd
            return
        self.usage = BilledUsage(
            input_tokens=self.usage.input_tokens + usage.input_tokens,
            output_tokens=self.usage.output_tokens + usage.output_tokens,
        )
        self.usd = None if self.usd is None or usd is None else self.usd + usd

    def headers(self) -> list[tuple[str, str]]:
        """Return the headers for the call's answer, apart from the request id.

        Dollars are among them only if the usage is known before the body is sent: not for streams.
        """
        if not self.asked_target:
            return []
        headers = [
            ("x-forebay-waited", f"{self.waited:.3f}"),
            ("x-forebay-attempts", f"{self.attempts}"),
            ("x-forebay-account", _header(self.account)),
        ]
        if self.target != self.asked_target:
            headers.append(("x-forebay-target", self.target))
        if self.model != self.asked_model:
            headers.append(("x-forebay-model", _header(self.model)))
        if self.out_of_time:
            headers.append(OUT_OF_TIME)
        if self.usd is not None:
            headers.append(("x-forebay-cost-usd", format_usd(self.usd)))
        return headers

    def request_ids(self, protocol: ApiProtocol) -> list[tuple[str, str]]:
        """Return the headers with the request id, for an answer that has none: those that the SDKs read."""
        names = (REQUEST_ID, ANTHROPIC_REQUEST_ID) if protocol == "anthropic" else (REQUEST_ID,)
        return [(name, self.request_id) for name in names]

    def _end_wait(self) -> None:
        if self._waits_since is not None:
            self.waited += clock.now() - self._waits_since
            self._waits_since = None


def _shown_path(path: str) -> str:
    """Return a path as it is logged, without what may be a key."""
    return _QUERY.split(path, maxsplit=1)[0][:_MAX_PATH] if path.startswith("/") else ""  # a URL may hold more


_known_path: Final = functools.lru_cache(256)(_shown_path)  # calls go to a few paths


@functools.lru_cache(maxsize=1024)  # calls have a few accounts and models
def _header(name: str) -> str:
    """Return a name as the value of a header: the model is its caller's to choose."""
    return header_value(name[:_MAX_NAME])


def format_usd(usd: float) -> str:
    """Return dollars as text, to a billionth: a short call costs less than a cent."""
    return f"{usd:.9f}".rstrip("0").rstrip(".") or "0"
