"""The accounts that one call tries: when a throttled call goes to the next one instead of waiting for a retry."""

from __future__ import annotations

import pytest

from forebay import Fallback, Upstream
from forebay.upstream.accounts.thread_safe_account import ThreadSafeAccount
from forebay.upstream.call_request import CallRequest
from forebay.upstream.core import UpstreamCore
from forebay.upstream.fallbacks.fallback_chain import PlainRoute, make_chain


def request_at(_: UpstreamCore, model: str) -> CallRequest:
    return CallRequest(model=model)


@pytest.mark.parametrize(
    ("own", "other", "skips"),
    [(0.6, 0.1, True), (0.6, 0.59, True), (0.6, 0.6, False), (0.6, 0.9, False), (0.4, 0.1, False)],
)
def test_a_throttled_call_skips_its_retry_if_the_next_account_is_less_loaded(
    own: float,
    other: float,
    skips: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spare = Upstream("spare")
    llm = Upstream("llm", fallback=Fallback(to=spare, load_threshold=0.5))
    route = PlainRoute(llm, llm.core.accounts.account("m"), CallRequest(model="m"), request_at)
    loads = {"upstream:llm:m": 0.0, "upstream:spare:m": 0.0}
    monkeypatch.setattr(ThreadSafeAccount, "load_for", lambda self, _=None: loads[self.name])
    chain = make_chain(route, llm.runner.resolver)
    assert chain is not None
    assert chain.next() is route
    loads |= {"upstream:llm:m": own, "upstream:spare:m": other}
    assert chain.skips_retry(route) is skips
