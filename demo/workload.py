"""The tasks of the surge, their priorities and lengths. The same seed gives the same surge."""

from __future__ import annotations

import random
from typing import Any, Final

import msgspec

from forebay.simulation.provider.traffic import Traffic
from forebay.task import Priority

STEPS: Final = ("research", "summarize", "act")
MIX: Final = {Priority.CRITICAL: 2, Priority.HIGH: 13, Priority.NORMAL: 60, Priority.LOW: 25}  # per cent

_SUBJECTS: Final = ("supplier", "shipment", "invoice", "contract", "complaint", "outage", "vendor", "regulation")
_QUESTIONS: Final = (
    "why is it late",
    "what has changed since last month",
    "what is the risk",
    "who has to be informed",
    "what does it cost us",
    "how do the others handle it",
)


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One task of the surge: three calls, whose answers have these lengths in tokens."""

    task_id: str
    topic: str
    priority: Priority
    lengths: tuple[int, ...]

    def payload(self) -> dict[str, Any]:
        """Return the input of the agent's graph."""
        return {"task_id": self.task_id, "topic": self.topic, "lengths": list(self.lengths)}


def surge(tasks: int, seed: int) -> list[Job]:
    """Return `tasks` jobs of mixed priority, with answers as long as in the Azure conversation trace."""
    rng = random.Random(f"{seed}/surge")  # noqa: S311 - arrivals, not secrets
    traffic = Traffic.conversation()
    priorities = rng.choices(list(MIX), weights=list(MIX.values()), k=tasks)
    return [
        Job(
            task_id=f"{seed}-{number:05d}",
            topic=f"{rng.choice(_SUBJECTS)} {rng.randrange(1000, 10_000)}: {rng.choice(_QUESTIONS)}?",
            priority=priority,
            lengths=tuple(traffic.lengths(rng)[1] for _ in STEPS),
        )
        for number, priority in enumerate(priorities)
    ]
