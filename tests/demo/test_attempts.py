"""HTTP attempts are counted under whatever repeats them."""

from __future__ import annotations

from typing import Any

import httpx
import httpx2
import pytest

from demo.attempts import counted
from forebay.retry import Retry
from forebay.upstream import Upstream


class Counts:
    """A counter that keeps what it counts."""

    def __init__(self) -> None:
        self.attempts = 0
        self.statuses: list[int] = []

    def sent(self) -> None:
        self.attempts += 1

    def received(self, status: int) -> None:
        self.statuses.append(status)


def flaky(http: Any, *answers: int | None) -> Any:
    """A transport that answers these in turn; None is a connection that fails."""
    left = list(answers)

    def answer(request: Any) -> Any:
        status = left.pop(0)
        if status is None:
            raise http.ConnectError("nobody there", request=request)
        return http.Response(status, json={})

    return http.MockTransport(answer)


@pytest.mark.parametrize("http", [httpx, httpx2], ids=["httpx", "httpx2"])
async def test_what_an_upstream_tries_again_is_counted_each_time(http: Any) -> None:
    counts = Counts()
    client = counted(http.AsyncClient(transport=flaky(http, 503, None, 200)), counts)
    upstream = Upstream("key", provider="openai-compatible", retry=Retry(base_delay=0.001))
    async with upstream.bind(client) as bound:
        assert (await bound.post("http://provider/v1/chat/completions", json={})).status_code == 200
    assert (counts.attempts, counts.statuses) == (3, [503, 200])


@pytest.mark.parametrize("http", [httpx, httpx2], ids=["httpx", "httpx2"])
async def test_attempts_by_way_of_a_proxy_are_counted_and_those_past_it(http: Any) -> None:
    counts = Counts()
    proxied, direct = flaky(http, 200), flaky(http, 200)
    client = counted(http.AsyncClient(transport=direct, mounts={"http://far": proxied}), counts)
    for host in ("far", "near"):
        await client.get(f"http://{host}/")
    await client.aclose()
    assert counts.statuses == [200, 200]
