"""The parts of the messages between a process and a ledger that are about a rate learned from refusals."""

from __future__ import annotations

import msgspec


class SharedRateCheck(msgspec.Struct, frozen=True):
    """A check of a rate that is under way: for a time calls go far faster. See `LearnedRate`.

    Attributes:
        rate: that is checked, in calls a second.
        refused_rate: from which it fell.
        began_ago: seconds since the check began.
        refused_ago: seconds since the last refused call before it was sent.
    """

    rate: float
    refused_rate: float
    began_ago: float
    refused_ago: float


class SharedRate(msgspec.Struct, frozen=True):
    """A rate that was learned from refusals, with what it takes to learn on. It is opaque to a ledger.

    Attributes:
        rate: calls a second of all processes; None if calls are not spaced.
        measured: it is a measurement, not a guess.
        held: the highest rate that was not refused for a whole step; None if there is none.
        learned: the rate after the latest block; None if there is none.
        before: the rate before the first block; None if there is none.
        before_rise: the rate before its latest rise; 0 if that was not refused.
        falls: of a measured rate, one after the other.
        believed: the rate after its first fall; 0 if it has not fallen.
        passes: checks one after the other that spoke against a rate.
        step: by which it rises next, a share of it.
        wait: seconds from a block to the first step.
        refused_ago: seconds since the latest block ended.
        step_ago: seconds since the present step began.
        step_left: seconds until the next step.
        check: that is under way; None for none.
        limits: trials one after the other that found a limit.
        score: of the evidence that refusals are caused by a rate.
        is_disproved: a learned rate was disproved, so that another one needs more evidence.
    """

    rate: float | None = None
    measured: bool = False
    held: float | None = None
    learned: float | None = None
    before: float | None = None
    before_rise: float = 0.0
    falls: int = 0
    believed: float = 0.0
    passes: int = 0
    step: float = 0.0
    wait: float = 0.0
    refused_ago: float = 0.0
    step_ago: float = 0.0
    step_left: float = 0.0
    check: SharedRateCheck | None = None
    limits: int = 0
    score: float = 0.0
    is_disproved: bool = False


class RateRequest(msgspec.Struct, frozen=True):
    """The use that a member makes of the learned rate, and what it has learned of it.

    Attributes:
        epoch: of the rate, as the ledger told it last; -1 if it has not.
        counted: calls that were sent and not refused since the last exchange that was answered; below 0 if more that
            were counted before have been refused.
        demand: calls a second that the member sends, or would send.
        learned: the rate, if the member has learned something of it since then; else None.
        trial: seconds for which the member would try why calls are refused, if no other one does; 0 if it would not.
    """

    epoch: int = -1
    counted: int = 0
    demand: float = 0.0
    learned: SharedRate | None = None
    trial: float = 0.0


class RateReply(msgspec.Struct, frozen=True):
    """The rate that all members have learned.

    Attributes:
        epoch: how often a member has learned something of it; 0 if none has.
        counted: calls of all members that were sent and not refused.
        share: of the rate, for this member.
        learned: the rate; None if there is none.
        age: seconds since it was reported.
        trial: seconds for which another member tries why calls are refused; 0: this one does if it has asked for that.
    """

    epoch: int
    counted: int
    share: float
    learned: SharedRate | None = None
    age: float = 0.0
    trial: float = 0.0
