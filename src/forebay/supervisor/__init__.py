"""The task plane: admits, queues, runs, times out, spills and refills agent runs.

A task passes through `supervisor` (the public interface), `admission_controller` (admit, spill or reject), `dispatcher`
(queue, select a worker, start), `runs` (run the handler, end the run) and `ticket` (the result). The other parts are
`settings`, `registration` and `codecs` (checked arguments, declared types), `pool`, `tenants`, `worker` and
`worker_selection` (where a task runs), `load` and `start_gate` (how full each resource is, and whether a run may
start), `spill` (the task store), `fan_out`, `slot`, `portal` and `nested_supervisor` (other ways to submit), `room`
(producers that wait), `lifecycle` and `drain` (start and end), `tree` (restarts of workers), `statistics` and
`loop_monitor`. They share the objects in `core`, such as the `ticket_registry`.
"""

from forebay.supervisor.drain import DrainReport
from forebay.supervisor.fan_out import FanOut, FanOutProgress
from forebay.supervisor.portal import Portal, PortalEvents, PortalSlot, PortalTicket
from forebay.supervisor.progress_bar import ProgressBar, progress_bar
from forebay.supervisor.slot import Slot
from forebay.supervisor.spill.dead_letters import DeadLetter, DeadLetters
from forebay.supervisor.statistics import Statistics, TaskTypeStatistics, WorkerStatistics
from forebay.supervisor.supervisor import BackpressureSupervisor
from forebay.supervisor.tenants import Tenant
from forebay.supervisor.ticket import Ticket
from forebay.supervisor.tree.tree_node import TreeNode
from forebay.supervisor.worker import WorkerAgent

__all__ = [
    "BackpressureSupervisor",
    "DeadLetter",
    "DeadLetters",
    "DrainReport",
    "FanOut",
    "FanOutProgress",
    "Portal",
    "PortalEvents",
    "PortalSlot",
    "PortalTicket",
    "ProgressBar",
    "Slot",
    "Statistics",
    "TaskTypeStatistics",
    "Tenant",
    "Ticket",
    "TreeNode",
    "WorkerAgent",
    "WorkerStatistics",
    "progress_bar",
]
