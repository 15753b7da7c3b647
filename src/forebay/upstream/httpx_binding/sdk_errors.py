"""Errors in the classes of the caller's SDK: connection errors, and rejections that it passes on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import cache
from types import ModuleType
from typing import Any, Final, NamedTuple

from forebay.errors import Overloaded

_SDKS: Final = ("openai", "anthropic")


class SdkErrors(NamedTuple):
    """The errors of one SDK.

    Attributes:
        base: the base class of rejections: an SDK treats errors of other classes as a broken connection, and retries.
        connection_error: the SDK's error for a connection that failed; None for the transport's own.
        timeout_error: the SDK's error for a timeout, likewise.
    """

    base: type[Exception]
    connection_error: Callable[..., Exception] | None = None
    timeout_error: Callable[..., Exception] | None = None

    def rejection(self, error: Overloaded, request: Any) -> Overloaded:
        """Return a rejection as an error that the SDK passes on unchanged."""
        kind = _overloaded_of(self.base)  # type: ignore[arg-type]  # a class can be hashed, whatever its objects do
        rejection = kind(error.reason, limited_by=error.limited_by, load=error.load, retry_after=error.retry_after)
        rejection.request = request  # type: ignore[attr-defined]  # errors of HTTP clients are expected to have one
        return rejection

    def connection_failure(self, error: Exception, request: Any, *, timeout: bool) -> Exception:
        """Return the error that the SDK raises for a failed connection when it has no retries left."""
        kind = self.timeout_error if timeout else self.connection_error
        if kind is None:
            return error
        failure: Exception = kind(request=request)
        failure.__cause__ = error
        return failure


@cache
def _overloaded_of(base: Any) -> type[Overloaded]:
    """Return a class of errors that are `Overloaded` and of an SDK's base class."""

    def reduce(self: Overloaded) -> Any:
        return Overloaded(
            self.reason, limited_by=self.limited_by, load=self.load, retry_after=self.retry_after
        ).__reduce__()  # the SDK may be missing in another process

    members = {"__doc__": Overloaded.__doc__, "__module__": __name__, "__reduce__": reduce}
    return type("Overloaded", (Overloaded, base), members)


@cache
def sdk_errors_of(name: str) -> SdkErrors:
    """Return the errors of an SDK, by the name of its package, which is imported already.

    The base is the root of its errors: OpenAIError, AnthropicError.
    """
    sdk = sys.modules[name]
    tree = [kind for kind in sdk.APIError.__mro__ if kind not in Exception.__mro__]
    return SdkErrors(base=tree[-1], connection_error=sdk.APIConnectionError, timeout_error=sdk.APITimeoutError)


@cache
def http_errors_of(http: ModuleType) -> SdkErrors:
    """Return the errors of a bare client. The base is not TransportError, on which retry libraries retry."""
    return SdkErrors(base=http.HTTPError)


def find_sdk_errors(http: ModuleType, headers: Mapping[str, str], provider: str) -> SdkErrors:
    """Return the errors for the SDK that made a request: it may use a bare client that is bound."""
    if "x-stainless-lang" not in headers:
        return http_errors_of(http)
    agent = headers.get("user-agent", "").lower()
    for name in (*(sdk for sdk in _SDKS if sdk in agent), "anthropic" if provider == "anthropic" else "openai"):
        if name in sys.modules:
            return sdk_errors_of(name)
    return http_errors_of(http)
