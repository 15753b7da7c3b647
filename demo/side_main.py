"""The process of one side: ``python -m demo.side_main INSTRUCTIONS``.

It reports on standard output. It ends when it has nothing more to do, when standard input says ``stop``, or when
standard input ends because the parent process is gone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

import msgspec

from demo import classic_side, forebay_side, semaphore_side
from demo.meter import Meter
from demo.sample import Instructions, Side

_LAST_MOMENTS: Final = 6.0  # seconds to end in, once the parent process is gone
_IN_MEMORY: Final[dict[Side, Callable[[Instructions, Meter], Coroutine[Any, Any, None]]]] = {
    Side.CLASSIC: classic_side.run,
    Side.SEMAPHORE: semaphore_side.run,
}


def main(arguments: list[str]) -> None:
    """Run the side that the instructions name."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    instructions = msgspec.json.decode(arguments[0], type=Instructions)
    meter = Meter(instructions.provider)
    if run := _IN_MEMORY.get(instructions.side):
        _listen(lambda: _exit_at_once(meter))
        asyncio.run(run(instructions, meter))
    else:
        asyncio.run(_forebay(instructions, meter))
    meter.end()


async def _forebay(instructions: Instructions, meter: Meter) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    _listen(lambda: loop.call_soon_threadsafe(stop.set))
    await forebay_side.run(instructions, meter, stop)


def _exit_at_once(meter: Meter) -> None:
    """End the process: it holds its tasks in memory, so nothing can be put in order, and they are lost."""
    meter.end()
    os._exit(0)


def _listen(on_stop: Callable[[], object]) -> None:
    """Obey standard input in a thread, for the event loop may be too busy."""

    def obey() -> None:
        # Not sys.stdin: a thread that still reads would hold its lock when the interpreter ends.
        while b"stop" not in (read := os.read(0, 64)) and read:
            pass
        on_stop()
        while os.read(0, 64):
            pass
        on_stop()
        time.sleep(_LAST_MOMENTS)
        os._exit(1)

    threading.Thread(target=obey, name="instructions", daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1:])
