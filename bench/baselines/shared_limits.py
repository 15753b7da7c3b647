"""Admissions of token-throttle and of hardcap, whose limits processes share. It runs in an environment that has both.

As a program, it takes `token_throttle` or `hardcap`, the URL of the store, and the seconds. An admission is reserved
and settled, as the library does it: two round trips of each.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable

import redis.asyncio
from hardcap.config import BudgetPolicy, RateLimit, Tenant, TenantBudget
from hardcap.ledger import BudgetLedger
from token_throttle import (
    BackendLockContentionError,
    PerModelConfig,
    Quota,
    RateLimiter,
    RedisBackendBuilder,
    SqliteBackendBuilder,
    UsageQuotas,
)

from bench.accounts.paced_process import count_calls

AMOUNT = 1_000_000_000  # requests a minute: never short
CALLERS = 16


def token_throttle(url: str) -> Callable[[], Awaitable[object]]:
    """Return a call under its rate limiter."""
    if url.startswith("redis"):
        backend = RedisBackendBuilder(redis.asyncio.Redis.from_url(url), key_prefix="bench")
    else:
        backend = SqliteBackendBuilder(url.removeprefix("sqlite:///"), key_prefix="bench")
    quotas = UsageQuotas([Quota(metric="requests", limit=AMOUNT, per_seconds=60)])
    limiter = RateLimiter(PerModelConfig(quotas=quotas), backend=backend)

    async def call() -> None:
        while True:
            try:
                async with limiter.reserve({"requests": 1}, model="m") as handle:
                    handle.set_actual_usage({"requests": 1})
            except BackendLockContentionError:  # its lock was not free in time: other processes have it
                continue
            return

    return call


def hardcap(url: str) -> Callable[[], Awaitable[object]]:
    """Return a call under its ledger: a rate and a budget of tokens."""
    tenant = Tenant(
        "t",
        [],
        budget=TenantBudget(total=10**12),
        rate_limit=RateLimit(algorithm="token_bucket", requests=AMOUNT, per_s=60.0),
    )
    ledger = BudgetLedger(redis.asyncio.Redis.from_url(url), BudgetPolicy())

    async def call() -> None:
        admission = await ledger.admit(tenant, 10, 10)
        assert admission.ok
        await ledger.settle(tenant, admission, 10, 10)

    return call


if __name__ == "__main__":
    measured = token_throttle if sys.argv[1] == "token_throttle" else hardcap
    asyncio.run(count_calls(float(sys.argv[3]), CALLERS, measured(sys.argv[2])))
