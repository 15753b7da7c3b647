"""fakeredis as a server: Redis in Python, in a thread of this process, for the tests and the processes they start."""

from __future__ import annotations

import functools
import threading


@functools.cache
def shared_fakeredis() -> str:
    """Return the URL of the one fakeredis of this process, which runs until it ends."""
    from fakeredis import TcpFakeServer  # noqa: PLC0415 - slow to import

    server = TcpFakeServer(("127.0.0.1", 0), server_type="redis")
    threading.Thread(target=server.serve_forever, name="fakeredis", daemon=True).start()
    return f"redis://127.0.0.1:{server.server_address[1]}/0"
