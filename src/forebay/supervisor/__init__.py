"""The task plane: admits, queues, runs, times out, spills and refills agent runs."""

from forebay.supervisor.drain import DrainReport
from forebay.supervisor.portal import Portal, PortalTicket
from forebay.supervisor.slot import Slot
from forebay.supervisor.spill.dead_letters import DeadLetter, DeadLetters
from forebay.supervisor.statistics import Statistics, WorkerStatistics
from forebay.supervisor.supervisor import BackpressureSupervisor
from forebay.supervisor.ticket import Ticket
from forebay.supervisor.worker import WorkerAgent

__all__ = [
    "BackpressureSupervisor",
    "DeadLetter",
    "DeadLetters",
    "DrainReport",
    "Portal",
    "PortalTicket",
    "Slot",
    "Statistics",
    "Ticket",
    "WorkerAgent",
    "WorkerStatistics",
]
