"""The caller of a request: priority, deadline, tenant and task, read from its headers."""

from __future__ import annotations

import hmac
import math
import re
from collections.abc import Mapping
from typing import Final

from forebay.errors import ForebayError
from forebay.gateway.callers.issued_keys import PRIORITIES, IssuedKey
from forebay.gateway.settings import Trust
from forebay.task import DEFAULT_TENANT, Priority
from forebay.upstream.call_request import Caller
from forebay.upstream.providers import find_other_credential

TOKEN_HEADER: Final = "x-forebay-token"  # noqa: S105 - its name
_NAME: Final = re.compile(r"[^\x00-\x1f\x7f]{1,256}")


class InvalidHeader(ForebayError, ValueError):
    """The header {header} is invalid: it must be {expected}."""

    header: str


def check_one_credential(headers: Mapping[str, str], path: str, provider: str) -> None:
    """Check that a call has one API key, if it is not known which of several its provider reads.

    Raises:
        InvalidHeader: it has two.
    """
    if name := find_other_credential(headers, path, provider=provider):
        raise InvalidHeader(header=name, expected="the same API key as in the other header, or left out")


class CallerReader:
    """A reader of callers from the headers of requests.

    Args:
        trust: whose headers are trusted.
        token: of the gateway, or None.
        tenant_headers: further headers that name a tenant.
    """

    def __init__(self, trust: Trust, token: str | None, tenant_headers: tuple[str, ...]) -> None:
        self._trust = trust
        self._token = token
        self._tenant_headers = tuple(header.lower() for header in tenant_headers)

    def is_authorized(self, headers: Mapping[str, str]) -> bool:
        """Return whether a caller presents the gateway's token, or none is needed."""
        return self._token is None or self._has_token(headers)

    def _has_token(self, headers: Mapping[str, str]) -> bool:
        presented = headers.get(TOKEN_HEADER, "")
        return self._token is not None and hmac.compare_digest(presented.encode(), self._token.encode())

    def read(self, headers: Mapping[str, str], *, offset: float, shared_account: bool) -> Caller:
        """Return the caller of a request.

        Args:
            headers: of the request, by lower-case name.
            offset: seconds to add to epoch seconds for the time of `forebay.clock.now`.
            shared_account: whether callers with different API keys share the accounts of this target.

        Raises:
            InvalidHeader: a header is invalid.
        """
        key = "" if shared_account else None
        if not self._trusts(headers):
            return Caller(api_key=key)
        return Caller(
            priority=_priority(headers.get("x-forebay-priority")),
            deadline=_deadline(headers.get("x-forebay-deadline")) + offset,
            tenant=self._tenant(headers) or DEFAULT_TENANT,
            task_id=_name("x-forebay-task", headers.get("x-forebay-task")),
            api_key=key,
        )

    def read_with_key(
        self, headers: Mapping[str, str], key: IssuedKey, *, offset: float, shared_account: bool
    ) -> Caller:
        """Return the caller of a request that was made with an issued key: the key says whom its headers may name.

        Priorities beyond the best one of the key count as that. Tasks are those of this key alone.

        Args:
            headers: see `read`.
            key: of the caller.
            offset: see `read`.
            shared_account: see `read`.

        Raises:
            InvalidHeader: a header is invalid.
        """
        asked, task = headers.get("x-forebay-priority"), _name("x-forebay-task", headers.get("x-forebay-task"))
        return Caller(
            priority=key.default_priority if asked is None else max(_priority(asked), key.best_priority),
            deadline=_deadline(headers.get("x-forebay-deadline")) + offset,
            tenant=(key.sets_tenant and self._tenant(headers)) or key.tenant_name,
            task_id=None if task is None else f"{key.name}:{task}",
            api_key="" if shared_account else None,
            key_name=key.name,
        )

    def names_priority(self, headers: Mapping[str, str]) -> bool:
        """Return whether a trusted header says the priority of a call."""
        return "x-forebay-priority" in headers and self._trusts(headers)

    def _trusts(self, headers: Mapping[str, str]) -> bool:
        return self._trust == "anyone" or (self._trust == "token" and self._has_token(headers))

    def _tenant(self, headers: Mapping[str, str]) -> str | None:
        """Return the tenant that the headers name, or None."""
        for header in ("x-forebay-tenant", *self._tenant_headers):
            if header in headers:
                return _name(header, headers[header])
        return None


def _priority(text: str | None) -> Priority:
    if text is None:
        return Priority.NORMAL
    priority = PRIORITIES.get(text.lower())
    if priority is None:
        raise InvalidHeader(header="x-forebay-priority", expected=", ".join(PRIORITIES))
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
