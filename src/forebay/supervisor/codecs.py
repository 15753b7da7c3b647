"""The types of payloads and results that workers declare for their task types, and the codecs of these types."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec

from forebay.adapters import Handler, codec_for, type_name
from forebay.errors import InvalidPayload, InvalidResult, InvalidSetting
from forebay.interfaces import Codec, TypeMismatch
from forebay.task import Task

if TYPE_CHECKING:
    from forebay.supervisor.worker import WorkerAgent


@dataclass(frozen=True, slots=True, kw_only=True)
class _TypeDeclaration:
    """The type of the payloads, or of the results, of one task type."""

    declared: Any = None  # the type, or None
    codec: Codec | None = None  # of that type or, if none is declared, of the framework of the agents


@dataclass(slots=True, kw_only=True)
class _TaskTypeCodecs:
    worker: str  # the first one
    payload: _TypeDeclaration
    result: _TypeDeclaration
    checks: dict[str, Callable[[Task], None]]  # of the handlers, by worker: one of them will get the task


class TaskCodecs:
    """The codecs of a supervisor, by task type.

    Attributes:
        active: whether `fit_payload` may have anything to do. Callers on a hot path check it first.
    """

    def __init__(self) -> None:
        self._entries: dict[str, _TaskTypeCodecs] = {}
        self.active = False

    def declare(self, worker: WorkerAgent, *, payload: Any, result: Any) -> None:
        """Add the types that a worker declares, and have the results of its handler checked.

        The first worker of a task type decides; the others declare the same types, or none.

        Raises:
            InvalidSetting: `payload` or `result` is not a type, or not the one that was declared before.
        """
        own = _TaskTypeCodecs(
            worker=worker.name,
            payload=_declaration(worker, "payload", payload),
            result=_declaration(worker, "result", result),
            checks={},
        )
        entries = {task_type: self._merge(task_type, own) for task_type in worker.task_types}
        self._entries.update(entries)
        if worker.handler.check is not None:
            for entry in entries.values():
                entry.checks[worker.name] = worker.handler.check
        self.active = self.active or any(entry.payload.codec or entry.checks for entry in entries.values())
        if any(entry.result.declared is not None for entry in entries.values()):
            worker.replace_call(self._checked(worker.name, worker.handler))

    def remove_worker(self, worker: WorkerAgent, gone: Iterable[str]) -> None:
        """Forget a worker that was unregistered, and the declarations of the task types that are gone with it."""
        for task_type in worker.task_types:
            if (entry := self._entries.get(task_type)) is not None:
                entry.checks.pop(worker.name, None)
        self.remove_types(gone)

    def remove_types(self, task_types: Iterable[str]) -> None:
        """Forget the declarations of task types that no worker serves any more."""
        for task_type in task_types:
            self._entries.pop(task_type, None)

    def _merge(self, task_type: str, own: _TaskTypeCodecs) -> _TaskTypeCodecs:
        """Return the codecs of a task type after another worker has declared its own."""
        first = self._entries.get(task_type)
        if first is None:
            return replace(own, checks={})
        where = f"worker {first.worker!r}, which serves task type {task_type!r} too"
        return _TaskTypeCodecs(
            worker=first.worker,
            payload=_merge_declarations("payload", first.payload, own.payload, own.worker, where),
            result=_merge_declarations("result", first.result, own.result, own.worker, where),
            checks=first.checks,
        )

    def fit_payload(self, task: Task) -> Task:
        """Return the task with a payload of the declared type, as its handler gets it.

        Raises:
            InvalidPayload: the payload is not of that type.
            UnusableTask: a handler of its type cannot run it.
        """
        # Admission checks that it is a Task, and raises the right error.
        entry = self._entries.get(task.task_type) if isinstance(task, Task) else None
        if entry is None:
            return task
        if entry.payload.codec is not None:
            task = _with_payload(task, _convert(entry.payload.codec.coerce, task, entry.payload))
        for check in entry.checks.values():
            check(task)
        return task

    def dump_payload(self, task: Task) -> Any:
        """Return the payload of a task as plain data; it has the declared type, by `fit_payload`."""
        entry = self._entries.get(task.task_type)
        if entry is None or entry.payload.codec is None:
            return task.payload
        return _convert(entry.payload.codec.dump, task, entry.payload)

    def load_payload(self, task: Task) -> Task:
        """Return the task with a payload made of the stored plain data, as its handler gets it.

        Raises:
            InvalidPayload: the data do not fit the declared type.
        """
        entry = self._entries.get(task.task_type)
        if entry is None or entry.payload.codec is None:
            return task
        return _with_payload(task, _convert(entry.payload.codec.load, task, entry.payload))

    def result_codec(self, task_type: str) -> Codec | None:
        """Return the codec of the results of a task type; None if they are plain data."""
        entry = self._entries.get(task_type)
        return None if entry is None else entry.result.codec

    def _checked(self, worker: str, handler: Handler) -> Any:
        """Return a callable that calls the handler, and raises InvalidResult if the result is of another type."""

        def call(task: Task) -> Any:
            value = handler.call(task)
            return later(task, value) if inspect.isawaitable(value) else fit(task, value)

        async def later(task: Task, value: Any) -> Any:
            return fit(task, await value)

        def fit(task: Task, value: Any) -> Any:
            entry = self._entries.get(task.task_type)  # None: the worker was unregistered, and this run did not stop
            if entry is None:
                return value
            side = entry.result
            if side.declared is None or side.codec is None:
                return value
            try:
                return side.codec.coerce(value)
            except TypeMismatch as mismatch:
                raise InvalidResult(
                    worker_id=worker,
                    task_type=task.task_type,
                    type=type_name(side.declared),
                    path="result" + mismatch.path,
                    why=mismatch.reason,
                ) from None

        return call


def _declaration(worker: WorkerAgent, name: str, declared: Any) -> _TypeDeclaration:
    if declared is None:
        return _TypeDeclaration(codec=worker.handler.codec)
    return _TypeDeclaration(declared=declared, codec=codec_for(declared, owner=f"worker {worker.name!r}", name=name))


def _merge_declarations(
    name: str, first: _TypeDeclaration, own: _TypeDeclaration, worker: str, where: str
) -> _TypeDeclaration:
    """Return the declaration of a task type, `first`, merged with that of another worker, `own`.

    Raises:
        InvalidSetting: `own` declares another type.
    """
    owner = f"worker {worker!r}"
    if own.declared is not None and own.declared != first.declared:
        before = "none was" if first.declared is None else f"{type_name(first.declared)} was"
        expected = f"the type that was declared for {where}; {before}"
        raise InvalidSetting(owner=owner, name=name, value=type_name(own.declared), expected=expected)
    if first.declared is not None or own.codec is None or own.codec is first.codec:
        return first
    if first.codec is not None:
        expected = f"an agent of the same framework as that of {where}"
        raise InvalidSetting(owner=owner, name="handler", value="an agent of another framework", expected=expected)
    return own  # a framework's codec leaves plain data as they are


def _convert(function: Callable[[Any], Any], task: Task, side: _TypeDeclaration) -> Any:
    """Return the payload, converted by a method of a codec.

    Raises:
        InvalidPayload: the method fails.
    """
    try:
        return function(task.payload)
    except TypeMismatch as mismatch:
        path, why = mismatch.path, mismatch.reason
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - a codec may be the user's own
        path, why = "", f"its codec raised {type(error).__name__}"
    kind = "payload of its framework" if side.declared is None else type_name(side.declared)
    raise InvalidPayload(task_id=task.task_id, task_type=task.task_type, type=kind, path="payload" + path, why=why)


def _with_payload(task: Task, payload: Any) -> Task:
    """Return the task with another payload: a copy, because a new Task would reject a deadline that has passed."""
    if payload is task.payload:
        return task
    same = copy(task)
    msgspec.structs.force_setattr(same, "payload", payload)
    return same
