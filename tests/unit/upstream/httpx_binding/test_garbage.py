"""Random replies of a provider: callers get them, an error of their library or a rejection, and no call hangs."""

from __future__ import annotations

import asyncio
import math
from types import ModuleType
from typing import Any, Final

import httpx
import httpx2
import hypothesis.strategies as st
import pytest
from hypothesis import given
from tests.unit.upstream.httpx_binding.wire import NOTHING, REQUEST, STREAM, URL, Reply, Script, left

from forebay import Overloaded
from forebay.quota import Budget, Price, Quota
from forebay.simulation import simulate
from forebay.upstream import Upstream

CALLS = 6  # while the provider sends garbage
RECOVERY = 3_700.0  # seconds: over an hour, the longest pause after a reached spend cap

NUMBERS: Final = ["", "-5", "0", "1", "0.5", "NaN", "inf", "1e999", "9" * 40, "abc", "\xff", "5, 7", "-0"]
MOMENTS: Final = ["1999-01-01T00:00:00Z", "2999-13-99T99:99:99Z", "6m0s", "-3s", "1ms", "Wed, 21 Oct 2015 07:28:00 GMT"]
NAMES: Final = [
    "retry-after",
    "retry-after-ms",
    "x-should-retry",
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests",
    "x-ratelimit-limit-tokens",
    "x-ratelimit-remaining-tokens",
    "x-ratelimit-reset-tokens",
    "date",
]
BODIES: Final[list[bytes]] = [
    b"",
    b"\xff\xfe\x00",
    b"<html>Bad gateway</html>",
    b"[" * 5000,
    b"null",
    b"[]",
    b'"text"',
    b'{"usage": null}',
    b'{"usage": {"prompt_tokens": -7, "completion_tokens": "many"}}',
    b'{"usage": {"prompt_tokens": 1e400, "completion_tokens": NaN}}',
    b'{"usage": {"prompt_tokens": 1.5, "completion_tokens": true}}',
    b'{"usage": {"prompt_tokens": 5, "completion_tokens": 5, "prompt_tokens_details": []}}',
    b'{"error": null}',
    b'{"error": {"message": ["rate"], "code": {}, "type": 7}}',
    b'{"error": {"code": "rate_limit_exceeded", "message": "tokens per min"}}',
    b"data: {\n\n",
    b"data: [DONE]\n\n",
    b'data: {"usage": {"completion_tokens": -1}, "choices": {}}\n\n',
    b'event: error\ndata: {"error": "overloaded"}\n\n',
    b"data: " + b"x" * 5000,
    *STREAM,
]
KINDS: Final = ["application/json", "text/event-stream", "text/event-stream; charset=\xff", "", "image/png"]

headers = st.dictionaries(st.sampled_from(NAMES), st.sampled_from([*NUMBERS, *MOMENTS]), max_size=5)
pieces = st.lists(st.sampled_from(BODIES), max_size=4)
BREAKS: Final = ["no", "in the middle", "before"]


@st.composite
def replies(draw: st.DrawFn) -> tuple[Reply, str]:
    """Return a reply, and where it breaks off."""
    values = draw(headers)
    values["content-type"] = draw(st.sampled_from(KINDS))
    if draw(st.booleans()):
        values["content-encoding"] = draw(st.sampled_from(["gzip", "deflate", "none of these"]))
    status = draw(st.sampled_from([200, 200, 204, 301, 400, 401, 402, 408, 413, 429, 429, 500, 503, 529, 599]))
    wire: Any = {name.encode(): value.encode("latin-1") for name, value in values.items()}
    return Reply(status=status, body=list(draw(pieces)), headers=wire), draw(st.sampled_from(BREAKS))


def upstream() -> Upstream:
    return Upstream(
        "key",
        provider="openai",
        models={"gpt-4o": [Quota(requests=60, per="minute"), Quota(tokens=50_000, per="minute")]},
        budget=Budget(usd=1e9),
        prices={"gpt-4o": Price(input=1.0, output=1.0)},
    )


async def call(client: Any, http: ModuleType) -> str:
    """Make a call and return its end; raise any unexpected exception."""
    try:
        response = await client.post(URL, json={**REQUEST, "stream": True})
    except Overloaded:
        return "rejected"
    except (http.HTTPError, http.StreamError):
        return "failed"
    return str(response.status_code)


def check(up: Upstream) -> None:
    """Check that no ended call holds anything, and that the numbers of the account are plausible."""
    assert left(up) == NOTHING
    spent = up.statistics().spent_usd
    assert spent is not None
    assert 0.0 <= spent < math.inf
    for shared in up.core.accounts:
        account = shared.account
        assert 0.0 <= account.durations.typical < 600.0
        assert 0.1 <= shared.token_estimates.input_ratio <= 10.0
        for level in account.quotas.levels(asyncio.get_running_loop().time()):
            assert level.amount >= 1
            assert -level.amount <= level.remaining <= level.amount


@pytest.mark.parametrize("http", [httpx, httpx2], ids=lambda http: http.__name__)
@given(script_of=st.lists(replies(), min_size=1, max_size=CALLS))
def test_after_any_replies_no_call_hangs_and_a_recovered_provider_serves(
    http: ModuleType, script_of: list[tuple[Reply, str]]
) -> None:
    async def main() -> None:
        up = upstream()
        script = Script(http)
        script.replies = []
        for reply, breaks in script_of:
            broken = http.ReadError("cut")
            if breaks == "before":
                script.replies.append(broken)
            else:
                script.replies.append(reply)
                if breaks == "in the middle":
                    reply.body.append(broken)
        client = script.client(up)
        for _ in range(CALLS):
            await call(client, http)
            check(up)
        script.replies = [Reply.stream()]
        await asyncio.sleep(RECOVERY)
        for _ in range(5):  # a breaker may need two probes, and rejects other calls meanwhile
            end = await call(client, http)
            await asyncio.sleep(5.0)
        assert end == "200"
        check(up)

    simulate(main)
