"""Exceptions of SDKs and HTTP libraries, read without importing these: the answer that caused one, or a timeout."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple, TypeGuard

import msgspec

from forebay.errors import Overloaded
from forebay.upstream.providers import Headers

_JUDGED: Final = "forebay_judged"
_MOST: Final = 16  # exceptions that are looked at
_STATUSES: Final = range(400, 600)
_STATUS_NAMES: Final = ("status_code", "http_status", "status", "code")
_TIMEOUTS: Final = frozenset(  # by name: TimeoutError is the base of few
    {
        *("TimeoutException", "APITimeoutError", "Timeout", "ServerTimeoutError", "DeadlineExceeded"),
        *("ReadTimeout", "WriteTimeout", "ReadTimeoutError"),
    }
)
_NOT_CONNECTED: Final = frozenset(
    {
        *("ConnectTimeout", "ConnectTimeoutError", "ConnectionTimeoutError", "PoolTimeout", "ConnectError"),
        *("NewConnectionError", "ClientConnectorError"),
    }
)


class ErrorAnswer(NamedTuple):
    """The answer with an error status that an exception reports.

    Attributes:
        status: from 400 to 599.
        headers: by lower-case name; empty if the exception does not carry them.
        body: empty if the exception does not carry it.
    """

    status: int
    headers: Headers
    body: bytes


def find_error_answer(error: BaseException) -> ErrorAnswer | None:
    """Return the answer that an exception, or one that it was raised from, reports; None if there is none.

    Frameworks raise errors of their own from those of SDKs, some with the status alone: what the first exception with a
    status lacks is taken from further ones with the same status.
    """
    found: ErrorAnswer | None = None
    for each in _chain(error):
        answer = _reported_by(each)
        if found is None:
            found = answer
        elif answer is not None and answer.status == found.status:
            found = found._replace(headers=found.headers or answer.headers, body=found.body or answer.body)
        if found is not None and found.headers and found.body:
            break
    return found


def _reported_by(error: BaseException) -> ErrorAnswer | None:
    """Return the answer that this exception itself reports."""
    response = _attribute(error, "response")
    if isinstance(response, Mapping) and isinstance(found := response.get("ResponseMetadata"), Mapping):  # botocore
        status = found.get("HTTPStatusCode")
        if _is_error_status(status):
            return ErrorAnswer(int(status), _headers(found.get("HTTPHeaders")), _body(response.get("Error")))
    for holder in (error, response):
        for name in _STATUS_NAMES:
            if _is_error_status(status := _attribute(holder, name)):
                headers = _headers(_attribute(response, "headers")) or _headers(_attribute(error, "headers"))
                body = _body(_attribute(error, "body")) or _body(_attribute(response, "content"))
                return ErrorAnswer(int(status), headers, body)
    return None


def mark_judged(holder: Any) -> None:
    """Mark an exception, or the extensions of an answer: the upstream of a bound client has judged and retried it."""
    if isinstance(holder, dict):
        holder[_JUDGED] = True
    else:
        setattr(holder, _JUDGED, True)


def is_judged(error: BaseException) -> bool:
    """Return whether an exception is the end of a call that another upstream has judged, retried or rejected.

    The first of its causes tells that is marked, is a rejection, or reports an answer or a failed connection itself.
    """
    for each in _chain(error):
        response = _attribute(each, "response")
        extensions = _attribute(response, "extensions")
        marked = isinstance(extensions, Mapping) and _JUDGED in extensions
        if marked or isinstance(each, Overloaded) or _attribute(each, _JUDGED) is True:
            return True
        if isinstance(each, OSError) or response is not None:
            return False
    return False


def is_timeout(error: BaseException) -> bool:
    """Return whether an exception says that its caller stopped waiting for an answer.

    A connection that could not be made in time does not count: that is the fault of the provider, or of the way to it.
    """
    found = False
    for each in _chain(error):
        names = {base.__name__ for base in type(each).__mro__}
        if not _NOT_CONNECTED.isdisjoint(names):
            return False
        if isinstance(each, TimeoutError):
            if each.errno is not None:  # the operating system gave up, not the caller
                return False
            found = True
        found = found or not _TIMEOUTS.isdisjoint(names)
    return found


def never_connected(error: BaseException) -> bool:
    """Return whether an exception says that no connection was made, so that no request can have been sent.

    Args:
        error: raised by what sends one request, and does nothing else.
    """
    while True:
        names = {base.__name__ for base in type(error).__mro__}
        if isinstance(error, ConnectionRefusedError | socket.gaierror) or not _NOT_CONNECTED.isdisjoint(names):
            return True
        if error.__cause__ is None:
            return False
        error = error.__cause__


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception, those that it was raised from, and those of a group."""
    found, left = [error], _MOST
    while found and left:
        each = found.pop(0)
        left -= 1
        yield each
        if isinstance(each, BaseExceptionGroup):
            found += each.exceptions[:_MOST]
        origin = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
        if origin is not None:
            found.append(origin)


def _attribute(holder: Any, name: str) -> Any:
    try:
        return getattr(holder, name, None)
    except Exception:  # noqa: BLE001 - a property of a library, such as the content of an answer that was not read
        return None


def _is_error_status(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value in _STATUSES


def _headers(given: Any) -> Headers:
    try:
        return Headers({str(name).lower(): str(value) for name, value in given.items()})
    except Exception:  # noqa: BLE001 - not headers
        return Headers({})


def _body(given: Any) -> bytes:
    if isinstance(given, bytes):
        return given
    if isinstance(given, str):
        return given.encode("utf-8", "replace")
    try:
        return msgspec.json.encode(given) if given is not None else b""
    except Exception:  # noqa: BLE001 - of a kind that is not JSON
        return b""
