"""The listening socket of all workers of a gateway, as one of them accepts from it: its share of the connections."""

from __future__ import annotations

import asyncio
import socket
from typing import Final, Protocol

from forebay.events import log
from forebay.gateway.workers.connection_counts import ConnectionCounts, most_to_accept

_PATIENCE: Final = 0.002  # seconds for which a connection is left to workers with fewer: many times what one needs
_SILENT_AFTER: Final = 50  # connections that a worker lets wait so long, without a sign of life
_ACCEPTED_AT_ONCE: Final = 128  # before the event loop gets its turn
_PAUSE: Final = 1.0  # seconds until a worker that cannot accept tries again, as asyncio has it


class ConnectionServer(Protocol):
    """A server that makes the protocols of connections, and counts these."""

    @property
    def open_connections(self) -> int:
        """The number of open connections, with those whose protocol was made and that are not connected yet."""

    @property
    def is_full(self) -> bool:
        """True if it rejects another connection."""

    def __call__(self) -> asyncio.Protocol:
        """Make the protocol of a connection."""


class WorkerListener:
    """The socket on which all workers of a gateway listen, as one of them accepts from it.

    A worker leaves a connection to another one that has markedly fewer. After 2 ms it takes the connection itself if it
    is still there. After fifty such connections it waits no more for a worker that has shown no sign of life meanwhile,
    until it does. Only a worker that runs takes a connection, so none is lost with one that hangs.

    Args:
        listening: the socket, which does not block.
        counts: of the connections of all workers.
        number: of this worker.
        patience: seconds for which a connection is left to others.
    """

    def __init__(
        self, listening: socket.socket, counts: ConnectionCounts, number: int, *, patience: float = _PATIENCE
    ) -> None:
        self._listening = listening
        self._counts = counts
        self._number = number
        self._patience = patience
        self._server: ConnectionServer | None = None
        self._is_withdrawn = False
        self._is_paused = False
        self._is_waiting = False
        self._timer: asyncio.TimerHandle | None = None  # while it is paused or waits
        self._left_to: dict[int, int] = {}  # workers for which it waits, and their turns when it began to
        self._let_wait: dict[int, tuple[int, int]] = {}  # turns of others, and connections that they let wait since
        self._connecting: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        """The port on which it listens."""
        port: int = self._listening.getsockname()[1]
        return port

    def open(self, server: ConnectionServer) -> None:
        """Accept connections from now on."""
        self._server = server
        self.publish()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._counts.waker(self._number), self._woken)
        loop.add_reader(self._listening.fileno(), self._accept)

    def publish(self) -> None:
        """Let the other workers know how many connections this one has."""
        if self._server is None or self._is_withdrawn or self._is_paused:
            self._counts.withdraw(self._number)
        else:
            self._counts.publish(self._number, self._server.open_connections)

    def withdraw(self) -> None:
        """Leave connections to the other workers from now on, as long as any of them accepts connections."""
        self._is_withdrawn = True
        self.publish()

    async def close(self) -> None:
        """Accept no more, but take what has connected by then unless another worker does: the system would reset it."""
        if self._server is None:
            return
        self.withdraw()
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._counts.waker(self._number))
        self._stop_accepting()
        while not self._others() and self._take():
            pass
        self._stop_accepting()
        self._server = None
        self._listening.close()
        if self._connecting:
            await asyncio.wait(self._connecting)

    def _accept(self) -> None:
        """Accept connections while it is the turn of this worker."""
        self.publish()
        if not self._is_its_turn():
            self._wait()
            return
        for _ in range(_ACCEPTED_AT_ONCE):
            if not (self._take() and self._is_its_turn()):
                return

    def _take(self) -> bool:
        """Accept a connection; return whether there was one."""
        assert self._server is not None  # noqa: S101 - open
        try:
            connection, _ = self._listening.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return False
        except OSError as error:
            self._pause(error)
            return False
        connection.setblocking(False)
        connecting = asyncio.get_running_loop().create_task(_connect(connection, self._server()))
        self._connecting.add(connecting)
        connecting.add_done_callback(self._connecting.discard)
        self.publish()
        if others := self._others():
            self._counts.wake(most_to_accept([self._server.open_connections, *others.values()]), others)
        return True

    def _go_on(self) -> None:
        """Accept again."""
        self._stop_accepting()
        self._is_waiting = self._is_paused = False
        self._counts.end_wait(self._number)
        self.publish()
        asyncio.get_running_loop().add_reader(self._listening.fileno(), self._accept)

    def _stop_accepting(self) -> None:
        asyncio.get_running_loop().remove_reader(self._listening.fileno())
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- whose turn it is ---

    def _others(self) -> dict[int, int]:
        """Return the open connections of the other workers that accept any, by number, without those that hang."""
        others = self._counts.others(self._number)
        for number, (turns, times) in self._let_wait.items():
            if times >= _SILENT_AFTER and self._counts.turns(number) == turns:
                others.pop(number, None)
        return others

    def _is_its_turn(self) -> bool:
        others = self._others().values()
        if not others or self._server is None:
            return True
        open_ = self._server.open_connections
        if self._server.is_full:  # and so are those that have as many
            return not self._is_withdrawn and open_ <= min(others)
        return not self._is_withdrawn and open_ <= most_to_accept([open_, *others])

    # --- while it is the turn of others ---

    def _wait(self) -> None:
        """Leave a connection to workers that have fewer."""
        self._stop_accepting()
        own = None if self._is_withdrawn or self._server is None else self._server.open_connections
        others = self._counts.others(self._number)
        self._left_to = {
            number: self._counts.turns(number) for number, open_ in others.items() if own is None or open_ < own
        }
        self._is_waiting = True
        self._timer = asyncio.get_running_loop().call_later(self._patience, self._lose_patience)
        self._counts.wait(self._number)
        if self._is_its_turn():  # another one has accepted since it looked
            self._go_on()

    def _woken(self) -> None:
        self._counts.clear_waker(self._number)
        self.publish()
        if self._is_waiting and self._is_its_turn():
            self._go_on()

    def _lose_patience(self) -> None:
        """Accept the connection that was left to others, if they have not."""
        self._go_on()
        if not self._take():
            return
        for number, turns in self._left_to.items():
            before, times = self._let_wait.get(number, (turns, 0))
            lives = self._counts.turns(number) != turns
            self._let_wait[number] = (turns, 0 if lives else 1 + times * (before == turns))

    # --- while it cannot ---

    def _pause(self, error: OSError) -> None:
        """Leave connections to others for a while: the process cannot accept one."""
        log.error("worker %d of the gateway accepts no connections for a second: %s", self._number, error.strerror)
        self._stop_accepting()
        self._is_paused = True
        self.publish()
        self._timer = asyncio.get_running_loop().call_later(_PAUSE, self._go_on)


async def _connect(connection: socket.socket, protocol: asyncio.Protocol) -> None:
    """Let a protocol serve a connection that was accepted."""
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio does not, for such a socket
        await asyncio.get_running_loop().connect_accepted_socket(lambda: protocol, connection)
    except OSError as error:  # it has gone
        connection.close()
        protocol.connection_lost(error)
