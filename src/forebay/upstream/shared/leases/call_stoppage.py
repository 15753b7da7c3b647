"""The interface of a stoppage of calls that several processes can share."""

from __future__ import annotations

from typing import Protocol

from forebay.upstream.shared.ledger.stoppage_messages import StoppageReply, StoppageRequest


class CallStoppage(Protocol):
    """A rule that stops the calls of an account for a time, then sends probes, and lets calls through again.

    It decides by what this process has seen, and takes over what others have.

    Attributes:
        changes: how often it has stopped calls, or let them through again.
        passes: probes that have succeeded.
    """

    changes: int
    passes: int

    def is_stopping(self, now: float) -> bool:
        """Return whether calls are stopped: no call is sent, or only probes are."""

    def is_probing(self, now: float) -> bool:
        """Return whether calls are stopped, and a call that is sent now is a probe."""

    def probes(self, now: float) -> int:
        """Return the probes of this process in flight."""

    def has_faults_to_tell(self) -> bool:
        """Return whether calls have failed, and that was not described yet."""

    def is_quiet(self, now: float) -> bool:
        """Return whether calls are let through, and no calls are to be described yet."""

    def describe(self, now: float) -> StoppageRequest:
        """Return its state, without the parts that depend on what was reported before, and the calls it has counted."""

    def adopt(self, now: float, reply: StoppageReply) -> None:
        """Take over a state that is not its own."""

    def refresh(self, now: float, reply: StoppageReply, *, passes: int, alone: bool) -> None:
        """Take over what others have added to the state that all have.

        Args:
            now: the time.
            reply: of the ledger.
            passes: own ones that it does not have yet.
            alone: no other process shares the account now.
        """

    def note_elsewhere(self, now: float, until: float, reply: StoppageReply) -> None:
        """Take the probes of other processes into account, until `until`, and the calls that they have made."""
