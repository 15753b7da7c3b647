"""A provider that counts: which process called when, and what it has billed."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from forebay import clock

_ANSWER_TIME: Final = 0.02  # seconds
_MOST_TOKENS: Final = 30


@dataclass
class CountingProvider:
    """The counters of a provider. A call is billed when it arrives.

    Attributes:
        port: on which it listens.
        times: when calls arrived, by the monotonic clock, by model.
        tokens: what each of them was billed, by model.
    """

    port: int = 0
    times: dict[str, list[float]] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)

    @property
    def arrivals(self) -> list[float]:
        """Return when calls arrived, in order."""
        return sorted(time for times in list(self.times.values()) for time in list(times))

    def count(self, model: str) -> int:
        """Return the calls of a model."""
        return len(self.times.get(model, ()))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer each line, which is the model of a call, by a number of tokens."""
        draws = random.Random(self.port)
        try:
            while line := await reader.readline():
                model = line.decode().strip()
                tokens = draws.randint(1, _MOST_TOKENS)
                self.times.setdefault(model, []).append(clock.monotonic())
                self.tokens.setdefault(model, []).append(tokens)
                await asyncio.sleep(_ANSWER_TIME)
                writer.write(b"%d\n" % tokens)
        except ConnectionError:  # a process was killed
            pass
        finally:
            writer.close()


@contextmanager
def counting_provider() -> Iterator[CountingProvider]:
    """Run a provider in a thread."""
    provider = CountingProvider()
    started = threading.Event()
    end: list[Callable[[], object]] = []

    async def run() -> None:
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        end.append(lambda: loop.call_soon_threadsafe(ended.set))
        server = await asyncio.start_server(provider.serve, "127.0.0.1", 0)
        provider.port = server.sockets[0].getsockname()[1]
        started.set()
        await ended.wait()
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    assert started.wait(30.0)
    try:
        yield provider
    finally:
        end[0]()
        thread.join(10.0)
