"""Errors as the caller's SDK knows them: what it raises by itself, and refusals that it lets through."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import cache
from types import ModuleType
from typing import Any, Final, NamedTuple

from forebay.errors import Overloaded

_SDKS: Final = ("openai", "anthropic")


class SdkErrors(NamedTuple):
    """How errors look to whoever made the call.

    Attributes:
        base: of which a refusal is a subclass too. What an SDK does not know as its own it takes for a broken
            connection, and calls again.
        failed: the SDK's error for a connection that failed, or None where the transport's own is expected.
        timed_out: the SDK's error for a timeout, likewise.
    """

    base: type[Exception]
    connection_error: Callable[..., Exception] | None = None
    timeout_error: Callable[..., Exception] | None = None

    def rejection(self, error: Overloaded, request: Any) -> Overloaded:
        """The refusal, as an exception that the SDK lets through as it is."""
        kind = _refused(self.base)  # type: ignore[arg-type]  # a class can be hashed, whatever its objects do
        refused = kind(error.reason, limited_by=error.limited_by, load=error.load, retry_after=error.retry_after)
        refused.request = request  # type: ignore[attr-defined]  # errors of HTTP clients are expected to have one
        return refused

    def connection_failure(self, error: Exception, request: Any, *, timeout: bool) -> Exception:
        """What the SDK makes of a connection's failure once it has no retries left."""
        kind = self.timeout_error if timeout else self.connection_error
        if kind is None:
            return error
        failure: Exception = kind(request=request)
        failure.__cause__ = error
        return failure


@cache
def _refused(base: Any) -> type[Overloaded]:
    def reduce(self: Overloaded) -> Any:
        return Overloaded(
            self.reason, limited_by=self.limited_by, load=self.load, retry_after=self.retry_after
        ).__reduce__()  # in another process that SDK may be missing

    members = {"__doc__": Overloaded.__doc__, "__module__": __name__, "__reduce__": reduce}
    return type("Overloaded", (Overloaded, base), members)


@cache
def sdk_errors_of(name: str) -> SdkErrors:
    """The dress of an SDK, by the name of its package, which is imported already.

    Its base error is the root of its tree: OpenAIError, AnthropicError.
    """
    sdk = sys.modules[name]
    tree = [kind for kind in sdk.APIError.__mro__ if kind not in Exception.__mro__]
    return SdkErrors(base=tree[-1], connection_error=sdk.APIConnectionError, timeout_error=sdk.APITimeoutError)


@cache
def http_errors_of(http: ModuleType) -> SdkErrors:
    """That of a bare client. Not a TransportError: helpers retry those, and so would undo the refusal."""
    return SdkErrors(base=http.HTTPError)


def find_sdk_errors(http: ModuleType, headers: Mapping[str, str], provider: str) -> SdkErrors:
    """The dress for whoever made this request: an SDK may have been given a bare client that is bound."""
    if "x-stainless-lang" not in headers:
        return http_errors_of(http)
    agent = headers.get("user-agent", "").lower()
    for name in (*(sdk for sdk in _SDKS if sdk in agent), "anthropic" if provider == "anthropic" else "openai"):
        if name in sys.modules:
            return sdk_errors_of(name)
    return http_errors_of(http)
