"""Worker processes that listen as those of a gateway do: ``python -m tests.support.worker_program COUNT [PATIENCE]``.

It prints the port once all are ready. A worker leaves connections to others for PATIENCE seconds. It writes its process
id to each connection that it accepts, as a line, and keeps the connection open.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable

from forebay.gateway.address import Address
from forebay.gateway.workers.worker_listener import WorkerListener
from forebay.gateway.workers.worker_processes import WorkerProcesses


class ProcessServer:
    """A server of a worker."""

    is_full = False

    def __init__(self) -> None:
        self.open_connections = 0

    def __call__(self) -> asyncio.Protocol:
        self.open_connections += 1
        return ProcessConnection()


class ProcessConnection(asyncio.Protocol):
    """A connection that is told which process has accepted it."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(b"%d\n" % os.getpid())


def serve(listener: WorkerListener, _: int, lifeline: int, accepts: Callable[[], object]) -> int:
    """Serve until a signal, or until the parent has gone."""

    async def run() -> None:
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, stopped.set)
        loop.add_reader(lifeline, stopped.set)
        if len(sys.argv) > 2:
            listener._patience = float(sys.argv[2])
        listener.open(ProcessServer())
        accepts()
        await stopped.wait()
        await listener.close()

    asyncio.run(run())
    return 0


if __name__ == "__main__":
    processes = WorkerProcesses(
        Address("127.0.0.1", 0),
        int(sys.argv[1]),
        serve,
        lambda listening: print(listening.port, flush=True),
        reload=lambda: 0,
        effect_of_hang_up=lambda: "none",
    )
    sys.exit(processes.run())
