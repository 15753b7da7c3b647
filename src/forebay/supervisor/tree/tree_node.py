"""TreeNode: a frozen snapshot of a supervision tree."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol, cast

from forebay._json import JsonStruct

if TYPE_CHECKING:
    from forebay.supervisor.worker import WorkerAgent


class TreeNode(JsonStruct, frozen=True, kw_only=True):
    """A supervisor or a worker at one moment, with what is below it; `as_dict` returns it as plain data.

    Attributes:
        name: of the worker; the outermost supervisor is ``"supervisor"``.
        state: of a worker: ``"idle"``, ``"busy"``, ``"overloaded"``, ``"failed"``, ``"starting"`` or ``"leaving"``; of
            the outermost supervisor: ``"new"``, ``"running"`` or ``"closed"``.
        load: of a worker, its slots taken over its slots; of a supervisor, the highest load in it.
        restart: the restart type of a worker; None of the outermost supervisor.
        restarts: how often the worker was started again.
        strategy: of a supervisor, None of any other worker.
        failed: how many workers below a supervisor are FAILED, those below nested ones included; of a worker, 1 if it
            is FAILED.
        children: the workers of a supervisor, in the order in which they start.
    """

    name: str
    state: str
    load: float
    restart: str | None = None
    restarts: int = 0
    strategy: str | None = None
    failed: int = 0
    children: tuple[TreeNode, ...] = ()


class TreeSupervisor(Protocol):
    """A supervisor below another one, as far as the snapshot needs it."""

    def tree(self) -> TreeNode:
        """Return the snapshot of what it supervises."""


def supervisor_node(state: str, load: float, strategy: str, workers: Iterable[WorkerAgent]) -> TreeNode:
    """Return the node of a supervisor, and of everything below it."""
    children = tuple(map(_worker_node, workers))
    failed = sum(child.failed for child in children)
    return TreeNode(name="supervisor", state=state, load=load, strategy=strategy, failed=failed, children=children)


def _worker_node(worker: WorkerAgent) -> TreeNode:
    nested = worker.handler.nested_supervisor
    below = None if nested is None else cast("TreeSupervisor", nested).tree()
    return TreeNode(
        name=worker.name,
        state=_state(worker),
        load=worker.load_factor if below is None else max(worker.load_factor, below.load),
        restart=worker.life.restart.value,
        restarts=worker.restarts,
        strategy=None if below is None else below.strategy,
        failed=worker.failed + (0 if below is None else below.failed),
        children=() if below is None else below.children,
    )


def _state(worker: WorkerAgent) -> str:
    if worker.leaving:
        return "leaving"
    if worker.starting and not worker.failed:
        return "starting"
    return worker.state.value
