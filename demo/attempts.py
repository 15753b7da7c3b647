"""HTTP attempts, counted where they leave: under whatever retries them, be it an SDK or an upstream."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

ClientT = TypeVar("ClientT")


class Counter(Protocol):
    """Who counts."""

    def sent(self) -> None:
        """An attempt leaves."""

    def came(self, status: int) -> None:
        """It was answered so."""


class CountedTransport:
    """An HTTP client's transport that tells of each attempt. What finds no connection is told of as sent."""

    def __init__(self, inner: Any, counter: Counter) -> None:
        self._inner = inner
        self._counter = counter

    async def handle_async_request(self, request: Any) -> Any:
        """The answer to one attempt."""
        self._counter.sent()
        response = await self._inner.handle_async_request(request)
        self._counter.came(response.status_code)
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
    """An asynchronous client of httpx or httpx2, whose attempts are counted from now on, those past its proxies too.

    Event hooks do not see what an upstream tries again: that happens below them.
    """
    http: Any = client
    http._transport = CountedTransport(http._transport, counter)  # noqa: SLF001 - the proxies' mounts have no other way in
    http._mounts = {  # noqa: SLF001
        pattern: None if inner is None else CountedTransport(inner, counter)
        for pattern, inner in http._mounts.items()  # noqa: SLF001
    }
    return client
