"""A process that calls a `CountingProvider` as often as an account lets it, which it shares with other processes.

Its arguments: the URL of the store, the port of the provider, the model, and the number of callers. It says that it is
ready, begins at the first line of its standard input, and ends when that does, after the calls that it has sent.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Final

from forebay import Budget, Overloaded, Price, Quota, Upstream

QUOTA: Final = Quota(requests=2_400, per="minute")
BUDGET: Final = Budget(usd=1e9)
CENTS, THOUSANDS = "cents", "thousands-*"  # models whose bills are told apart in one sum
PRICES: Final = {CENTS: Price(input=0, output=1e4), THOUSANDS: Price(input=0, output=1e9)}
ESTIMATE: Final = 40  # tokens


def shared_upstream(url: str) -> Upstream:
    """Return the upstream, as each process has it."""
    return Upstream("account", quotas=[QUOTA], budget=BUDGET, prices=PRICES, shared=url)


async def call_for_nothing(upstream: Upstream) -> None:
    """Make a call that is not sent."""
    async with upstream.call(CENTS) as call:
        call.settle(input_tokens=0, output_tokens=0)


class Callers:
    """Callers that call one after the other, each on a connection of its own."""

    def __init__(self, upstream: Upstream, port: int, model: str) -> None:
        self._upstream = upstream
        self._port = port
        self._model = model
        self._waiting: set[asyncio.Task[None]] = set()
        self._is_ending = False

    async def run(self, callers: int, end: asyncio.Event) -> None:
        """Call until `end`."""
        tasks = [asyncio.create_task(self._call_often()) for _ in range(callers)]
        await end.wait()
        self._is_ending = True
        for task in self._waiting:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _call_often(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        own = asyncio.current_task()
        assert own is not None
        while not self._is_ending:
            self._waiting.add(own)
            try:
                async with self._upstream.call(self._model, output_tokens=ESTIMATE) as call:
                    self._waiting.discard(own)
                    writer.write(f"{self._model}\n".encode())
                    call.settle(input_tokens=0, output_tokens=int(await reader.readline()))
            except Overloaded as error:
                await asyncio.sleep(min(error.retry_after or 0.1, 0.5))
            self._waiting.discard(own)
        writer.close()


async def main(url: str, port: str, model: str, callers: str) -> None:
    """Run the callers until standard input ends."""
    end = asyncio.Event()
    standard_input = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(standard_input), sys.stdin.buffer
    )
    upstream = shared_upstream(url)
    await call_for_nothing(upstream)  # the ledger is open now, and this process is one of its members
    print("ready", flush=True)
    await standard_input.readline()
    run = asyncio.create_task(Callers(upstream, int(port), model).run(int(callers), end))
    await standard_input.read()
    end.set()
    await run


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
