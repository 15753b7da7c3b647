"""A gateway in another thread, for clients that block or have their own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from forebay.gateway import GatewaySettings
from forebay.gateway.server import Gateway


@contextlib.contextmanager
def run_gateway(settings: GatewaySettings) -> Iterator[Gateway]:
    """Run a gateway on an event loop in another thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="gateway")
    thread.start()
    gateway = Gateway(settings)

    def run(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result()

    try:
        run(gateway.__aenter__())
        try:
            yield gateway
        finally:
            run(gateway.__aexit__(None, None, None))
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
