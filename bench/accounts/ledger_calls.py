"""Admissions of Forebay on a shared account: one by one through the store, or from what this process leases.

As a program, it takes `round_trip`, `leased` or `calls`, the URL of the store, and the seconds.

Calls end as they are admitted, and each is settled: `leased` measures a decision and its settlement, for a request that
is made once, and `calls` also what makes the request and holds the permit. The processor's time includes that of the
thread which exchanges with the store. The loop that counts takes about 0.2 microseconds.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import uuid
from collections.abc import Callable

from bench.accounts.paced_process import count_blocking_calls, count_calls
from forebay import Quota, Upstream
from forebay.interfaces import Charge, Outcome
from forebay.upstream.call_request import CallOutcome
from forebay.upstream.shared.ledger.messages import ExchangeRequest, LedgerTerms, QuotaRequest, QuotaTerms
from forebay.upstream.shared.stores.open_store import open_ledger_store

AMOUNT = 1_000_000_000  # requests a minute: never short
CALLERS = 16


def admit_by_round_trip(url: str) -> Callable[[], None]:
    """Return what asks the store for one request, and reports the one before as used."""
    store, member = open_ledger_store("bench", url), uuid.uuid4().hex
    terms = LedgerTerms(quotas=(QuotaTerms("requests", float(AMOUNT), 60.0),))
    numbers = itertools.count(1)

    def admit() -> None:
        number = next(numbers)
        (reply,) = store.exchange(
            [
                ExchangeRequest(
                    ledger="bench",
                    member=member,
                    sequence=number,
                    answered=number - 1,
                    epoch="",
                    terms=terms,
                    quotas=(QuotaRequest(used=0.0 if number == 1 else 1.0, needed=1.0, wanted=1.0),),
                )
            ]
        )
        assert reply.quotas[0].held >= 1.0

    return admit


def main(kind: str, url: str, seconds: float) -> None:
    """Measure one kind."""
    if kind == "round_trip":
        count_blocking_calls(seconds, admit_by_round_trip(url))
        return
    upstream = Upstream("bench", quotas=[Quota(requests=AMOUNT, per="minute")], shared=url)

    async def call() -> None:
        async with upstream.call():
            pass

    account = upstream.core.accounts.account("")
    request = upstream.core.request("", Charge(requests=1))
    outcome = CallOutcome(kind=Outcome.SUCCESS)

    async def admit() -> None:
        account.settle(await account.acquire(request), outcome)

    asyncio.run(count_calls(seconds, CALLERS, admit if kind == "leased" else call))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
