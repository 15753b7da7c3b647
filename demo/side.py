"""One side in its own process: ``python -m demo.side ORDERS``.

It reports on standard output and ends when it has nothing more to do, when standard input says ``stop``, or when
standard input ends: then whoever started it is gone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Final

import msgspec

from demo import classic, surge
from demo.meter import Meter
from demo.sample import Kind, Orders

_LAST_MOMENTS: Final = 6.0  # seconds to end in, once nobody listens any more


def main(arguments: list[str]) -> None:
    """Do what the orders say."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    orders = msgspec.json.decode(arguments[0], type=Orders)
    meter = Meter(orders.provider)
    if orders.kind is Kind.CLASSIC:
        _listen(lambda: _die(meter))
        asyncio.run(classic.run(orders, meter))
    else:
        asyncio.run(_forebay(orders, meter))
        meter.end()


async def _forebay(orders: Orders, meter: Meter) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    _listen(lambda: loop.call_soon_threadsafe(stop.set))
    await surge.run(orders, meter, stop)


def _die(meter: Meter) -> None:
    """A process that holds its tasks in memory has nothing to put in order: it ends, and they with it."""
    meter.end()
    os._exit(0)


def _listen(on_stop: Callable[[], object]) -> None:
    """Obey standard input, in a thread: the loop may be too busy."""

    def obey() -> None:
        # Past sys.stdin, whose lock a thread that still reads would hold when the interpreter ends.
        while b"stop" not in (told := os.read(0, 64)) and told:
            pass
        on_stop()
        while os.read(0, 64):
            pass
        on_stop()
        time.sleep(_LAST_MOMENTS)
        os._exit(1)

    threading.Thread(target=obey, name="orders", daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1:])
