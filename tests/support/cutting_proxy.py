"""A proxy before a Redis server, which cuts the connection at a given command, delays answers, or passes nothing on."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Literal, Self

HOST: Final = "127.0.0.1"
# Each new connection sends these; INFO is also how a store reads the clock of its server, every now and then.
SETS_UP: Final = frozenset({"HELLO", "AUTH", "CLIENT", "SELECT", "READONLY", "INFO"})
STREAMS: Final = frozenset({"PSYNC", "SYNC", "SUBSCRIBE", "SSUBSCRIBE", "PSUBSCRIBE", "MONITOR"})

Side = Literal["request", "answer"]  # what is lost


class _Resp:
    """The boundaries of the values in a stream of the Redis protocol (RESP2 and RESP3), as its bytes arrive."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Add what has arrived."""
        self._buffer += data

    def next(self) -> bytes | None:
        """Return the bytes of the next whole value, None if it has not arrived yet."""
        end = self._end(0)
        return None if end is None else self._take(end)

    def rest(self) -> bytes:
        """Return all bytes that are left."""
        return self._take(len(self._buffer))

    def _take(self, end: int) -> bytes:
        value = bytes(self._buffer[:end])
        del self._buffer[:end]
        return value

    def _end(self, start: int) -> int | None:
        """Return where the value that begins at `start` ends."""
        line = self._buffer.find(b"\r\n", start)
        if line < 0:
            return None
        kind, head = bytes(self._buffer[start : start + 1]), bytes(self._buffer[start + 1 : line])
        end: int | None = line + 2
        assert end is not None
        if kind in (b"$", b"=", b"!"):
            length = int(head)
            end += 0 if length < 0 else length + 2
            return end if end <= len(self._buffer) else None
        if kind in (b"*", b"~", b">", b"%", b"|"):
            parts = max(int(head), 0) * (2 if kind in (b"%", b"|") else 1) + (kind == b"|")
            for _ in range(parts):
                if end is None:
                    return None
                end = self._end(end)
        return end


def _words(command: bytes) -> list[bytes]:
    """Return the arguments of a command."""
    words, at = [], command.index(b"\r\n") + 2
    while at < len(command):
        line = command.index(b"\r\n", at)
        length = int(command[at + 1 : line])
        words.append(command[line + 2 : line + 2 + length])
        at = line + 4 + length
    return words


@dataclass(eq=False)
class _Connection:
    """A client's connection, and the one to the server that was opened for it."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    streams: bool = False  # a replica's, or a subscription: the server sends without being asked
    unanswered: int = 0  # commands
    left: int | None = None  # answers until it is cut
    lost: Side = "request"

    def abort(self) -> None:
        self.client.transport.abort()
        self.server.transport.abort()

    def close(self) -> None:
        """Close it when all that was written has been sent."""
        self.client.close()
        self.server.close()


class CuttingProxy:
    """A proxy before the server on `port`, in a thread of its own.

    Commands are numbered from 1, over all connections, in the order in which they arrive; those that only set up a
    connection have no number. A cut is exact: all commands before it have been executed and answered. In a pipeline
    that is cut, the answers to the commands before the cut arrive.

    Attributes:
        port: where clients connect.
        commands: the numbered commands since the last `cut_at` or `forget`, each by its name.
    """

    def __init__(self, port: int) -> None:
        self.port = 0
        self.commands: list[str] = []
        self._having = b""
        self._target = port
        self._cut: tuple[int, Side] | None = None
        self._delay = self._lag = 0.0
        self._refusing = self._then_refuse = False
        self._passes: asyncio.Event
        self._connections: set[_Connection] = set()
        self._has_cut = threading.Event()
        self._loop: asyncio.AbstractEventLoop
        self._closing: asyncio.Event
        self._ready = threading.Event()
        self._errors: list[Exception] = []
        self._thread = threading.Thread(target=self._main, name="cutting proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._do(self._closing.set)
        self._thread.join(10)
        assert not self._thread.is_alive()
        if self._errors and error is None:
            raise ExceptionGroup("errors of the proxy", self._errors)

    # --- what tests do ---

    def cut_at(self, number: int, lost: Side, *, having: bytes = b"", then_refuse: bool = False) -> None:
        """Forget the commands so far, and cut the connection of the `number`-th from now, once.

        Args:
            number: of the command; the next is 1.
            having: what a command must contain to be numbered, such as a task id: a heartbeat sends others.
            lost: "request": it does not reach the server; "answer": the server executes it, and the client cannot know.
            then_refuse: `refuse` clients from then on.
        """
        self._do(lambda: self._plan(number, lost, having=having, then_refuse=then_refuse))

    def forget(self) -> None:
        """Forget the commands so far, and a cut that has not happened."""
        self._do(lambda: self._plan(None, "request"))

    @property
    def has_cut(self) -> bool:
        """Return whether the planned cut has happened."""
        return self._has_cut.is_set()

    def wait_for_cut(self, within: float = 30.0) -> None:
        """Return when the planned cut has happened."""
        assert self.cuts(within), f"no cut: the commands were {self.commands}"

    def cuts(self, within: float) -> bool:
        """Return whether the planned cut has happened, once it has, or after `within` seconds."""
        return self._has_cut.wait(within)

    def cut(self) -> None:
        """Cut all connections now. What has not been passed on is lost, though its server may have ended."""
        self._do(self._cut_all)

    def refuse(self) -> None:
        """Cut all connections, and each new one at once, until `accept`."""
        self._do(lambda: self._refuse(refusing=True))

    def accept(self) -> None:
        """Let clients connect again."""
        self._do(lambda: self._refuse(refusing=False))

    def hold(self) -> None:
        """Pass on nothing, in either direction, until `go_on`; connections stay open, and new ones are accepted."""
        self._do(self._passes.clear)

    def go_on(self) -> None:
        """Pass on what was held, and all that follows."""
        self._do(self._passes.set)

    def delay(self, seconds: float) -> None:
        """Deliver each answer so much later."""
        self._do(lambda: setattr(self, "_delay", seconds))

    def lag(self, seconds: float) -> None:
        """Deliver to replicas so much later what their master sends."""
        self._do(lambda: setattr(self, "_lag", seconds))

    # --- the thread ---

    def _do(self, change: Callable[[], object]) -> None:
        """Run `change` in the thread of the proxy, and wait for it."""
        done = threading.Event()

        def run() -> None:
            change()
            done.set()

        self._loop.call_soon_threadsafe(run)
        assert done.wait(10)

    def _main(self) -> None:
        with asyncio.Runner() as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._closing, self._passes = asyncio.Event(), asyncio.Event()
        self._passes.set()
        async with await asyncio.start_server(self._connect, HOST, 0) as server:
            self.port = server.sockets[0].getsockname()[1]
            self._ready.set()
            await self._closing.wait()
            server.close()
            self._refuse(refusing=True)

    def _plan(self, number: int | None, lost: Side, *, having: bytes = b"", then_refuse: bool = False) -> None:
        self.commands.clear()
        self._having = having
        self._then_refuse = then_refuse
        self._has_cut.clear()
        self._cut = None if number is None else (number, lost)

    def _cut_all(self) -> None:
        for connection in list(self._connections):
            connection.abort()

    def _refuse(self, *, refusing: bool) -> None:
        self._refusing = refusing
        if refusing:
            self._cut_all()

    async def _connect(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        if self._refusing:
            client.transport.abort()
            return
        try:
            answers, server = await asyncio.open_connection(HOST, self._target)
        except OSError:  # the server is dead: so is this
            client.transport.abort()
            return
        connection = _Connection(client, server)
        if self._refusing:
            connection.abort()
            return
        self._connections.add(connection)
        work = [asyncio.ensure_future(self._requests(reader, connection))]
        work.append(asyncio.ensure_future(self._answers(answers, connection)))
        try:
            await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
        finally:
            connection.close()
            self._connections.discard(connection)
            for each in work:
                each.cancel()
            ended = await asyncio.gather(*work, return_exceptions=True)
            self._errors += [error for error in ended if isinstance(error, Exception)]

    async def _requests(self, reader: asyncio.StreamReader, connection: _Connection) -> None:
        """Pass commands on, up to the cut."""
        resp = _Resp()
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(2**16):
                resp.feed(data)
                await self._passes.wait()
                while not connection.streams and (command := resp.next()) is not None:
                    if not self._pass(command, connection):
                        await asyncio.Event().wait()  # until the answers before the cut have arrived
                if connection.streams:
                    connection.server.write(resp.rest())
                await connection.server.drain()

    def _pass(self, command: bytes, connection: _Connection) -> bool:
        """Pass one command on, unless it is cut. Return False if nothing may follow it on this connection."""
        name = _words(command)[0].decode().upper()
        is_cut = False
        if name not in SETS_UP and self._having in command:
            self.commands.append(name)
            is_cut = self._cut is not None and self._cut[0] == len(self.commands)
        if is_cut:
            assert self._cut is not None
            connection.lost = self._cut[1]
            connection.left = connection.unanswered + (connection.lost == "answer")
            self._cut = None
            if connection.left == 0:
                self._finish_cut(connection)
            if connection.lost == "request":
                return False
        if name in STREAMS:
            connection.streams = True
        else:
            connection.unanswered += 1
        connection.server.write(command)
        return not is_cut

    def _finish_cut(self, connection: _Connection) -> None:
        connection.close()
        if self._then_refuse:
            self._refuse(refusing=True)
        self._has_cut.set()

    async def _answers(self, reader: asyncio.StreamReader, connection: _Connection) -> None:
        """Pass answers on, each after the delay, up to the cut, or all if the server closes the connection."""
        late: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        sender = asyncio.ensure_future(self._send_late(late, connection.client))
        resp = _Resp()
        try:
            with contextlib.suppress(ConnectionError):
                while data := await reader.read(2**16):
                    resp.feed(data)
                    while not connection.streams and (answer := resp.next()) is not None:
                        self._count(answer, connection)
                        if connection.left != 0 or connection.lost == "request":
                            late.put_nowait((self._loop.time() + self._delay, answer))
                        if connection.left == 0:
                            await late.join()
                            self._finish_cut(connection)
                            return
                    if connection.streams:
                        late.put_nowait((self._loop.time() + self._lag, resp.rest()))
                if not connection.client.is_closing():  # the server has closed it, and nobody has cut it
                    await late.join()
        finally:
            sender.cancel()

    @staticmethod
    def _count(answer: bytes, connection: _Connection) -> None:
        """Count an answer, unless it is pushed: nobody has asked for it."""
        if answer[:1] != b">":
            connection.unanswered -= 1
            if connection.left is not None:
                connection.left -= 1

    async def _send_late(self, late: asyncio.Queue[tuple[float, bytes]], client: asyncio.StreamWriter) -> None:
        while True:
            due, data = await late.get()
            await asyncio.sleep(max(due - self._loop.time(), 0.0))
            await self._passes.wait()
            client.write(data)
            late.task_done()
