"""On whose behalf a request is sent: what its headers say of that, and who may say so."""

from __future__ import annotations

import hmac
import math
import re
from collections.abc import Mapping
from typing import Final, NamedTuple

from forebay.errors import ForebayError
from forebay.gateway.settings import Trust
from forebay.task import Priority
from forebay.upstream.call_request import Caller

TOKEN_HEADER: Final = "x-forebay-token"  # noqa: S105 - its name
_PRIORITIES: Final = {priority.name.lower(): priority for priority in Priority}
_NAME: Final = re.compile(r"[^\x00-\x1f\x7f]{1,256}")
_PATIENCE: Final = 60.0  # seconds that a caller is taken to read who does not say how long
_SILENCE: Final = 600.0  # ... that its provider may be silent, as in the SDKs
_GRACE: Final = 5.0  # seconds by which a caller gives up before we do: it knows best
_HINTS: Final = ("x-stainless-read-timeout", "x-stainless-timeout")  # seconds, of every SDK made by Stainless
_LONGEST: Final = 86_400.0
_WAY_BACK: Final = 1.0  # seconds before a caller gives up at which it is told that its turn has not come ...
_WAY_BACK_SHARE: Final = 0.1  # ... at most this share of its time: a word that comes later, it takes for silence


class InvalidHeader(ForebayError, ValueError):
    """The header {header} cannot be meant: it must be {expected}."""

    header: str


class CallerReader:
    """Reads senders off requests.

    Args:
        trust: whose word is taken.
        token: of the gateway, or None.
        tenant_headers: headers of others that name a tenant, lower case.
    """

    def __init__(self, trust: Trust, token: str | None, tenant_headers: tuple[str, ...]) -> None:
        self._trust = trust
        self._token = token
        self._tenant_headers = tuple(header.lower() for header in tenant_headers)

    def is_authorized(self, headers: Mapping[str, str]) -> bool:
        """Whether a caller has the gateway's token, or none is asked for."""
        return self._token is None or self._has_token(headers)

    def _has_token(self, headers: Mapping[str, str]) -> bool:
        given = headers.get(TOKEN_HEADER, "")
        return self._token is not None and hmac.compare_digest(given.encode(), self._token.encode())

    def read(self, headers: Mapping[str, str], *, offset: float, shared_account: bool) -> Caller:
        """The sender of a request.

        Args:
            headers: of the request, by lower-case name.
            offset: what `forebay.clock.now` is ahead of epoch seconds.
            share: whether all callers share the accounts of this target.

        Raises:
            BadHeader: one says what cannot be meant.
        """
        key = "" if shared_account else None
        if not self._trusts(headers):
            return Caller(api_key=key)
        return Caller(
            priority=_priority(headers.get("x-forebay-priority")),
            deadline=_deadline(headers.get("x-forebay-deadline")) + offset,
            tenant=self._tenant(headers),
            task_id=_name("x-forebay-task", headers.get("x-forebay-task")),
            api_key=key,
        )

    def _trusts(self, headers: Mapping[str, str]) -> bool:
        return self._trust == "anyone" or (self._trust == "token" and self._has_token(headers))

    def _tenant(self, headers: Mapping[str, str]) -> str:
        for header in ("x-forebay-tenant", *self._tenant_headers):
            if header in headers:
                return _name(header, headers[header]) or "default"
        return "default"


class ClientTimeouts(NamedTuple):
    """How long a caller reads before it gives up.

    Attributes:
        line: seconds that it may stand in line; what it is told by then still reaches it.
        silence: seconds without a byte after which the provider is given up.
    """

    max_wait: float
    read_timeout: float


def read_client_timeouts(headers: Mapping[str, str]) -> ClientTimeouts:
    """The patience of a caller, as its SDK hints."""
    for hint in _HINTS:
        seconds = _number(headers.get(hint))
        if seconds is not None and seconds > 0:
            seconds = min(seconds, _LONGEST)
            return ClientTimeouts(seconds - min(_WAY_BACK, _WAY_BACK_SHARE * seconds), seconds + _GRACE)
    return ClientTimeouts(_PATIENCE, _SILENCE)


def _priority(text: str | None) -> Priority:
    if text is None:
        return Priority.NORMAL
    priority = _PRIORITIES.get(text.lower())
    if priority is None:
        raise InvalidHeader(header="x-forebay-priority", expected=", ".join(_PRIORITIES))
    return priority


def _deadline(text: str | None) -> float:
    if text is None:
        return math.inf
    seconds = _number(text)
    if seconds is None:
        raise InvalidHeader(header="x-forebay-deadline", expected="epoch seconds, such as 1764064800.5")
    return seconds


def _name(header: str, text: str | None) -> str | None:
    if text is None or not text:
        return None
    if not _NAME.fullmatch(text):
        raise InvalidHeader(header=header, expected="1 to 256 printable characters")
    return text


def _number(text: str | None) -> float | None:
    try:
        number = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None
