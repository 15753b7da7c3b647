"""A count of HTTP attempts, taken below whatever retries them, be it an SDK or an upstream."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

ClientT = TypeVar("ClientT")


class Counter(Protocol):
    """An object that counts HTTP attempts."""

    def sent(self) -> None:
        """Count an attempt that is sent."""

    def received(self, status: int) -> None:
        """Count the status of its response."""


class CountedTransport:
    """A transport of an HTTP client that reports each attempt; one that finds no connection counts as sent."""

    def __init__(self, inner: Any, counter: Counter) -> None:
        self._inner = inner
        self._counter = counter

    async def handle_async_request(self, request: Any) -> Any:
        """Send one attempt and return its response."""
        self._counter.sent()
        response = await self._inner.handle_async_request(request)
        self._counter.received(response.status_code)
        return response

    async def aclose(self) -> None:
        """Close its connections."""
        await self._inner.aclose()

    async def __aenter__(self) -> Any:
        await self._inner.__aenter__()
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self._inner.__aexit__(*raised)


def counted(client: ClientT, counter: Counter) -> ClientT:
    """Count the attempts of an asynchronous client of httpx or httpx2 from now on, and return the client.

    Its proxies' transports are counted too. Event hooks do not see the retries of an upstream: these happen below them.
    """
    http: Any = client
    http._transport = CountedTransport(http._transport, counter)  # noqa: SLF001 - the proxies' mounts have no other way in
    http._mounts = {  # noqa: SLF001
        pattern: None if inner is None else CountedTransport(inner, counter)
        for pattern, inner in http._mounts.items()  # noqa: SLF001
    }
    return client
