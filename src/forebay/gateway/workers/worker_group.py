"""The workers of one gateway as one of them sees them: their metrics and their readiness as those of one process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from forebay.errors import ForebayError
from forebay.events import log
from forebay.gateway.metrics import metric_definitions as definitions
from forebay.gateway.metrics.metric_snapshot import (
    FamilySnapshot,
    MetricSnapshot,
    SampleSnapshot,
    merge_snapshots,
)
from forebay.gateway.workers.worker_channel import MessageHandler, WorkerChannel

_METRICS, _READINESS = "metrics", "readiness"  # kinds of messages
_METRICS_TIMEOUT: Final = 2.0  # seconds; a scrape has ten by default
_READINESS_TIMEOUT: Final = 0.5  # seconds; a probe of Kubernetes has one by default
_DRAINING: Final = "draining"
_KEEP_INTERVAL: Final = 5.0  # seconds between two writes of what was counted


class Readiness(NamedTuple):
    """The readiness of a gateway: whether it takes calls.

    Attributes:
        problems: why it takes none; empty if it does.
        ready: how many of its workers take calls.
        workers: how many it has.
    """

    problems: Sequence[str]
    ready: int
    workers: int


class WorkerGroup:
    """The workers of one gateway, as one of them sees them.

    What a worker has counted is written to a file before it is shown, and every few seconds. The worker that replaces
    it begins with that, and until then the others read the file, as they do if it does not answer. So no counter goes
    back, and a worker that is killed loses what it has counted in these seconds at most.

    Args:
        channel: to the others; not open yet.
        snapshot: returns the metrics of this process.
        problems: returns why this process takes no calls; empty if it does.
    """

    def __init__(
        self,
        channel: WorkerChannel,
        *,
        snapshot: Callable[[], MetricSnapshot],
        problems: Callable[[], Sequence[str]],
    ) -> None:
        self._channel = channel
        self._snapshot = snapshot
        self._problems = problems
        self._inherited = MetricSnapshot()  # counted by the workers that this one replaces
        self._writing = asyncio.Lock()
        self._keeper: asyncio.Task[None] | None = None
        self._problem = ""  # why the directory cannot be made again, as it was logged

    async def open(self, handlers: Mapping[str, MessageHandler]) -> None:
        """Begin with what the worker has counted that this one replaces, and answer the others.

        Args:
            handlers: of other messages.
        """
        loop = asyncio.get_running_loop()
        if (before := await loop.run_in_executor(None, self._read_counted, self._channel.number)) is not None:
            self._inherited = merge_snapshots([before, _restarts(1)])
        await self._take()
        own: dict[str, MessageHandler] = {_METRICS: self._answer_metrics, _READINESS: self._answer_readiness}
        await self._channel.open({**own, **handlers})
        self._keeper = loop.create_task(self._keep())

    async def close(self) -> None:
        """Note what was counted, and answer no more."""
        await self.stop_keeping()
        await self._take()
        await self._channel.close()

    async def stop_keeping(self) -> None:
        """Write nothing from now on but what is asked for."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            await asyncio.wait([keeper])

    async def _keep(self) -> None:
        """Write what was counted every few seconds, in a directory that is made again if it was removed."""
        while True:
            await asyncio.sleep(_KEEP_INTERVAL)
            try:
                await self._channel.keep()
                await self._take()
                self._problem = ""
            except (ForebayError, OSError) as error:
                if self._problem != str(error):
                    self._problem = str(error)
                    log.error("the other workers of this gateway cannot ask this one: %s", error)
            except Exception:  # noqa: BLE001 - the calls go on, and so do the metrics of the others
                log.exception("what this worker of the gateway has counted is not written, by a bug of the gateway")

    # --- metrics ---

    async def metrics(self) -> MetricSnapshot:
        """Return the metrics of all workers. Of one that does not answer, what it had counted at the last scrape."""
        answers, own = await asyncio.gather(self._channel.ask_others(_METRICS, within=_METRICS_TIMEOUT), self._take())
        found = [msgspec.msgpack.decode(answer, type=MetricSnapshot) for answer in answers.values() if answer]
        silent = [number for number, answer in answers.items() if not answer]
        counted = await asyncio.get_running_loop().run_in_executor(None, self._read_counted_of, silent)
        return merge_snapshots([own, *found, *counted, _silent(len(silent))])

    async def _take(self) -> MetricSnapshot:
        """Return the metrics of this worker, once what it has counted is in its file."""
        async with self._writing:
            taken = merge_snapshots([self._snapshot(), self._inherited])
            await asyncio.get_running_loop().run_in_executor(None, self._write_counted, taken.counted())
        return taken

    async def _answer_metrics(self, _: bytes) -> bytes:
        return msgspec.msgpack.encode(await self._take())

    def _path(self, number: int) -> Path:
        return self._channel.directory / f"{number}.counted"

    def _read_counted(self, number: int) -> MetricSnapshot | None:
        """Return what a worker had counted when it was asked last; None if it has never run."""
        try:
            return msgspec.msgpack.decode(self._path(number).read_bytes(), type=MetricSnapshot)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            log.warning("what worker %d of the gateway has counted cannot be read: %s", number, error)
            return None

    def _read_counted_of(self, numbers: Sequence[int]) -> list[MetricSnapshot]:
        return [counted for number in numbers if (counted := self._read_counted(number)) is not None]

    def _write_counted(self, counted: MetricSnapshot) -> None:
        path = self._path(self._channel.number)
        made = path.with_suffix(".new")
        try:
            made.write_bytes(msgspec.msgpack.encode(counted))
            os.replace(made, path)  # noqa: PTH105 - a reader sees the one or the other
        except OSError as error:
            log.warning("what this worker of the gateway has counted cannot be written: %s", error)

    # --- readiness ---

    async def readiness(self) -> Readiness:
        """Return whether the gateway takes calls. Whichever worker is asked, the answer is the same.

        It does if any worker does: one that drains, or is being replaced, accepts no connections. Any other problem of
        a worker is one of the gateway, since that worker goes on accepting its share of the calls.
        """
        answers = await self._channel.ask_others(_READINESS, within=_READINESS_TIMEOUT)
        of_each = [list(self._problems())]
        of_each += [msgspec.json.decode(answer, type=list[str]) for answer in answers.values() if answer is not None]
        found = dict.fromkeys(problem for problems in of_each for problem in problems if problem != _DRAINING)
        if all(_DRAINING in problems for problems in of_each):
            found[_DRAINING] = None
        ready = sum(not problems for problems in of_each)
        return Readiness(list(found), ready, len(answers) + 1)

    async def _answer_readiness(self, _: bytes) -> bytes:
        return msgspec.json.encode(list(self._problems()))


def _restarts(number: int) -> MetricSnapshot:
    return _single(definitions.WORKER_RESTARTS, SampleSnapshot(definitions.WORKER_RESTARTS.name, {}, float(number)))


def _silent(number: int) -> MetricSnapshot:
    return _single(definitions.WORKERS, SampleSnapshot(definitions.WORKERS.name, {"state": "silent"}, float(number)))


def _single(definition: definitions.MetricDefinition, sample: SampleSnapshot) -> MetricSnapshot:
    name = definition.name.removesuffix("_total")
    return MetricSnapshot([FamilySnapshot(name, definition.kind, definition.text, [sample])])
