"""A saga that this process drives: its lease, and the entries that are written ahead of its steps."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from forebay import clock
from forebay.errors import SagaTaken, StoreUnavailable
from forebay.events import log
from forebay.saga.records import Entry, LogWrite, SagaHistory, SagaState, StoredSaga, decode_entries, encode_entry

if TYPE_CHECKING:
    from forebay.saga.log import SagaLog

_LINGER = 8  # turns of the event loop in which the end of a step waits for the start of the next, to be written with it
_FIRST_DELAY, _MAX_DELAY = 0.05, 1.0  # seconds between two attempts to write


class HeldSaga:
    """The history of a saga under the lease of this process, which alone adds to it.

    An entry counts here at once, and is written in the order of the others. What must not happen before it is on
    disk awaits `write`.

    Args:
        log: where it is written.
        stored: the saga, as it was taken.
        lease: seconds that the lease lasts unless renewed.
        on_state: called with the saga once the log has another state of it.

    Attributes:
        stored: as it was taken.
        history: of the saga, what is not written yet included.
    """

    def __init__(self, log: SagaLog, stored: StoredSaga, *, lease: float, on_state: Callable[[HeldSaga], None]) -> None:
        self.stored = stored
        self.history = SagaHistory(stored.header.saga_id, decode_entries(stored.header.saga_id, stored.entries))
        self._log = log
        self._lease = lease
        self._on_state = on_state
        self._state = stored.header.state  # in the log
        self._until = clock.now() + stored.until - clock.wall_time()
        self._written = len(stored.entries)  # acknowledged by the log
        self._pending: list[Entry] = []
        self._waiters: deque[tuple[int, asyncio.Future[None]]] = deque()  # for so many entries to be written
        self._writer: asyncio.Task[None] | None = None
        self._linger: asyncio.Handle | None = None
        self._error: SagaTaken | StoreUnavailable | None = None  # why nothing is written any more

    @property
    def saga_id(self) -> str:
        """The id of the saga."""
        return self.history.saga_id

    @property
    def fence(self) -> str:
        """The fence of the lease."""
        return self.stored.holder

    @property
    def ended(self) -> bool:
        """True once nothing is written any more: the saga has ended here, or the lease is lost."""
        return self._error is not None or self.history.state not in (SagaState.RUNNING, SagaState.COMPENSATING)

    def note(self, entry: Entry) -> None:
        """Add an entry that need not be on disk before the saga goes on: it is before any later one."""
        self._add(entry)
        self._write_later()

    async def write(self, entry: Entry) -> None:
        """Add an entry, and wait until it and those before it are acknowledged by the log.

        Raises:
            SagaTaken: another process has the saga.
            StoreUnavailable: the log could not be written until the lease had expired.
        """
        if self._error is None:
            self._add(entry)
        await self.flush()

    async def flush(self) -> None:
        """Wait until all entries so far are acknowledged; it raises what `write` raises."""
        if self._error is not None:
            raise self._error
        if self._written == self.history.count:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append((self.history.count, future))
        self._begin_writing()
        await future

    def _add(self, entry: Entry) -> None:
        self.history.add(entry)
        self._pending.append(entry)

    def _write_later(self) -> None:
        if self._writer is None and self._linger is None and self._error is None and self._pending:
            self._linger = asyncio.get_running_loop().call_soon(self._wait_a_turn, _LINGER)

    def _wait_a_turn(self, left: int) -> None:
        if left:  # turns, because their length grows with the load and that of a timer does not
            self._linger = asyncio.get_running_loop().call_soon(self._wait_a_turn, left - 1)
        else:
            self._begin_writing()

    def _begin_writing(self) -> None:
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        if self._writer is None and self._error is None and self._pending:
            self._writer = asyncio.ensure_future(self._write_pending())
            self._writer.add_done_callback(self._writer_ended)

    def _writer_ended(self, _: asyncio.Task[None]) -> None:
        """Go on with what was added meanwhile, or is left because somebody has cancelled the writer."""
        self._writer = None
        if self._waiters:
            self._begin_writing()
        else:  # the ends of steps
            self._write_later()

    async def _write_pending(self) -> None:
        """Write what is pending. Whatever that raises, no later attempt would fare better: nothing is written then."""
        try:
            await self._write_entries()
        except (SagaTaken, StoreUnavailable) as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001 - of the log, or of an entry that cannot be encoded
            log.error("the log of saga %r could not be written", self.saga_id, exc_info=error)
            self._fail(
                StoreUnavailable(
                    where=f"saga {self.saga_id!r}",
                    why=f"it raised {type(error).__name__}",
                    advice="Its saga goes on once its lease has expired.",
                )
            )

    async def _write_entries(self) -> None:
        batch = len(self._pending)
        entries = [encode_entry(each, writer=self.fence) for each in self._pending]
        why = self.history.why or self.history.error
        write = LogWrite(self._written, entries, self.history.state, why)
        await self._write_batch(write)
        if write.state is not self._state:
            self._state = write.state
            self._on_state(self)
        del self._pending[:batch]
        self._written += batch
        while self._waiters and self._waiters[0][0] <= self._written:
            _, future = self._waiters.popleft()
            if not future.done():
                future.set_result(None)

    async def _write_batch(self, write: LogWrite) -> None:
        delay = _FIRST_DELAY
        while True:
            try:
                written = await self._log.append(self.saga_id, write, fence=self.fence, now=clock.wall_time())
            except StoreUnavailable:
                if clock.now() + delay >= self._until:
                    raise
                await asyncio.sleep(delay)
                delay = min(2 * delay, _MAX_DELAY)
            else:
                if not written:
                    raise SagaTaken(saga_id=self.saga_id)
                return

    def _fail(self, error: SagaTaken | StoreUnavailable) -> None:
        self._error = error
        waiters, self._waiters = self._waiters, deque()
        for _, future in waiters:
            if not future.done():
                future.set_exception(error)

    # --- the lease ---

    def extended(self, until: float) -> None:
        """Record that the lease lasts until `until`, by `clock.now`."""
        self._until = until

    def lose(self) -> None:
        """Record that another process has the saga."""
        if self._error is None:
            self._fail(SagaTaken(saga_id=self.saga_id))

    async def check_lease(self) -> None:
        """Check that this process still has the saga, before something that has an effect.

        A process may have been paused for longer than its lease. Then the log says who has the saga.

        Raises:
            SagaTaken: another process has it.
            StoreUnavailable: the log cannot be asked.
        """
        if self._error is not None:
            raise self._error
        if clock.now() < self._until:
            return
        until = clock.now() + self._lease
        if await self._log.renew({self.saga_id: self.fence}, until=clock.wall_time() + self._lease):
            self.lose()
            raise SagaTaken(saga_id=self.saga_id)
        self.extended(until)

    async def release(self) -> None:
        """Give the saga back, for another process or for later, once what is pending is written."""
        await self.flush()
        await self._log.release(self.saga_id, fence=self.fence)
        self.lose()
