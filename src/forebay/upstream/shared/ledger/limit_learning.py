"""The limit that the members of a ledger learn together: what each has found out makes one limit. Pure.

Rises add up, as if one estimator had seen all calls. A fall begins a new epoch, and what members report of an earlier
one is dropped, since it comes from calls that were sent before the fall: so a refusal that many see lowers it once.

The same rules are in `redis_exchange.lua`: change both; `tests/integration/test_redis_ledger.py` compares them.
"""

from __future__ import annotations

from forebay.limit import AnswerCounts
from forebay.upstream.shared.ledger.ledger_state import LedgerState
from forebay.upstream.shared.ledger.messages import LimitReply, LimitRequest


def begin_limit(state: LedgerState, asked: LimitRequest | None) -> None:
    """Begin with the limit that a member has."""
    state.limit = 1.0 if asked is None else max(1.0, asked.level)
    state.limit_epoch = 0
    state.limit_answers = AnswerCounts()
    state.silent_until = 0.0


def report_limit(state: LedgerState, asked: LimitRequest) -> None:
    """Take over what a member has learned since its last exchange."""
    if asked.epoch == state.limit_epoch:
        if asked.cut is not None:
            state.limit = min(state.limit, asked.cut)
            state.limit_epoch += 1
            state.limit_answers = AnswerCounts()
        state.limit = max(state.limit, min(state.limit + asked.returned, asked.returns_to)) + asked.raised
        state.limit_answers += asked.answers
    state.limit = max(1.0, min(state.limit, asked.most))
    if asked.silence > 0.0:
        state.silent_until = max(state.silent_until, state.time + asked.silence)


def limit_reply(state: LedgerState, name: str) -> LimitReply:
    """Return the limit for a member."""
    return LimitReply(
        epoch=state.limit_epoch,
        level=state.limit,
        silence=max(0.0, state.silent_until - state.time),
        others=sum(other.slots for other in state.others(name)),
        answers=state.limit_answers,
    )
