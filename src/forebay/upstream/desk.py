"""The desk: where calls get their permits and give them back, from any event loop and any thread."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Iterable, Sequence

from forebay import clock, context
from forebay.errors import Overloaded
from forebay.quota import Level
from forebay.task import Priority
from forebay.typing import Charge, Notice
from forebay.upstream.account import Account
from forebay.upstream.ask import Ask, Ended, Go, No, Permit
from forebay.upstream.experience import Experience
from forebay.upstream.waiting import LoopWaiter, ThreadWaiter, Waiter, Waiting

_GAIN = 0.05  # weight of the newest call in what a typical one asks
_START_SHARE = 0.25  # of a typical call: how long the next may be expected to wait for another run to begin


class Desk:
    """One account, its lock, and those who want to know how full it is. It is the account's `Source`.

    Args:
        account: what decides.
        upstream: whose account it is, for messages.
        start_wait: seconds that the next call may be expected to wait for a run to begin; None: a quarter of a typical
            call.
    """

    def __init__(self, account: Account, *, upstream: str, start_wait: float | None) -> None:
        self.name = account.name
        self.account = account
        self._upstream = upstream
        self._start_wait = start_wait
        self._lock = threading.RLock()  # a waiter that is told something may look at once
        self._typical = Ask()
        self._held: dict[object, int] = {}
        self._urgent: set[object] = set()  # of those, whose next run is CRITICAL: it may start where others may not
        self.experience = Experience()
        self.sent_on = 0  # calls that another account has served
        self._relief: dict[object, Callable[[], None]] = {}

    # --- permits ---

    async def enter(self, ask: Ask, *, alone: bool = True) -> Permit:
        """Wait for a permit, at most until the call's deadline.

        Args:
            ask: what the call asks.
            alone: whether no other account could serve it: the run that is under way meets this one, and its refusal.

        Raises:
            Overloaded: it will not be had in time; ``retry_after`` says when it could.
        """
        asked = self._ask(ask, lambda: LoopWaiter(self._look), alone=alone)
        if isinstance(asked, Permit):
            return asked
        waiting, waiter = asked
        assert isinstance(waiter, LoopWaiter)  # noqa: S101 - made above
        try:
            answer = await waiter.wait()
        except asyncio.CancelledError:
            self._abandon(waiting)
            raise
        if isinstance(answer, No):
            raise self._refusal(answer, alone=alone)
        return answer.permit

    def enter_blocking(self, ask: Ask, *, alone: bool = True) -> Permit:
        """As `enter`, in a plain thread."""
        asked = self._ask(ask, lambda: ThreadWaiter(self._look), alone=alone)
        if isinstance(asked, Permit):
            return asked
        waiting, waiter = asked
        assert isinstance(waiter, ThreadWaiter)  # noqa: S101 - made above
        try:
            answer = waiter.wait()
        except BaseException:  # a KeyboardInterrupt, say
            self._abandon(waiting)
            raise
        if isinstance(answer, No):
            raise self._refusal(answer, alone=alone)
        return answer.permit

    def _ask(self, ask: Ask, make: Callable[[], Waiter], *, alone: bool) -> Permit | tuple[Waiting, Waiter]:
        if alone and (run := context.drawing()) is not None:
            self._meet(run)
        now = clock.now()
        with self._lock:  # check and take are one step: no await in here
            if not ask.free:
                self._learn(ask)
            answer = self.account.admit(now, ask)
            if isinstance(answer, Go):
                return answer.permit
            if isinstance(answer, No):
                raise self._refusal(answer, alone=alone)
            waiter = make()
            waiting = self.account.join(now, ask, waiter)
            self.account.pump(now)
        return waiting, waiter

    def _abandon(self, waiting: Waiting) -> None:
        now = clock.now()
        with self._lock:
            self.account.leave(waiting)
            if isinstance(given := waiting.waiter.given, Go):  # in the very moment
                self.account.never_sent(now, given.permit)
        self._look()

    def _look(self) -> None:
        now = clock.now()
        with self._lock:
            self.account.pump(now)
            relieved = self._relieved(now)
        for callback in relieved:
            callback()

    def levels(self) -> list[Level]:
        """What each of its quotas has left."""
        with self._lock:
            return self.account.quotas.levels(clock.now())

    def _refusal(self, answer: No, *, alone: bool) -> Overloaded:
        with self._lock:
            self.account.tally.refused += 1
        error = Overloaded(
            f"{self._upstream}: {answer.reason}",
            binding=f"{self.name}:{answer.binding}",
            load=answer.load,
            retry_after=answer.retry_after,
        )
        if alone and (run := context.drawing()) is not None:
            run.refused(self, error)
        return error

    def _meet(self, run: context.Drawing) -> None:
        run.meet(self)
        if run.refusals and (error := run.refusals.get(self)) is not None:
            raise error

    def listens(self) -> bool:
        """Whether what the headers of a success say of the quotas may matter; else they need not be read."""
        return self.account.quotas.listens(clock.now())  # one number is read: no lock

    def began(self, permit: Permit, notices: Sequence[Notice] = ()) -> None:
        """Its answer has begun, and its headers say this of the quotas."""
        now = clock.now()
        with self._lock:
            self.account.began(now, permit, notices)
            self.account.pump(now)
            relieved = self._relieved(now) if self._held else ()
        for callback in relieved:
            callback()

    def stop(self, seconds: float) -> None:
        """Its provider says that its money is spent: nobody goes for a while, and nobody waits for it."""
        now = clock.now()
        with self._lock:
            self.account.stop(now, seconds)
            self.account.refuse_all(now)

    def settle(self, permit: Permit, ended: Ended) -> None:
        """Close a permit."""
        now = clock.now()
        with self._lock:
            self.account.settle(now, permit, ended)
            if ended.foreseen is not None and ended.used is not None:
                self.experience.observe(ended.foreseen, ended.used)
            self.account.pump(now)
            relieved = self._relieved(now) if self._held else ()
        for callback in relieved:
            callback()

    # --- what the task plane feels ---

    @property
    def parts(self) -> Sequence[Desk]:
        """See `forebay.typing.Source`."""
        return (self,)

    def load_for(self, ask: Ask | None = None) -> float:
        """How long this call (None: a typical one) would wait if it came now, over the longest wait allowed.

        1.0 or more if it would be refused. Runs that have not called yet do not count.
        """
        with self._lock:
            return self.account.load_for(clock.now(), self._typical if ask is None else ask)

    def load(self, rung: Priority = Priority.NORMAL) -> tuple[float, str]:
        """See `forebay.typing.Source`."""
        with self._lock:
            return self.account.load(clock.now(), self._typical, rung)

    def room(self, rung: Priority, load: float) -> tuple[float, float]:
        """See `forebay.typing.Source`. While it is shut, what is known is when it opens, and no more."""
        now = clock.now()
        with self._lock:
            no = self.account.shut(now, self._typical.usd, rung)
            if no is None:
                return self.account.room(now, self._typical, load)
        return (math.inf if no.retry_after is None else no.retry_after), 0.0

    def may_start(self, rung: Priority) -> bool:
        """See `forebay.typing.Source`."""
        with self._lock:
            return self._may_start(clock.now(), rung)

    def _may_start(self, now: float, rung: Priority) -> bool:
        if self._is_shut(now, rung):
            return False
        allowed = guess = self.account.service.typical_or_guess
        if rung is not Priority.CRITICAL:
            allowed = _START_SHARE * allowed if self._start_wait is None else self._start_wait
        begun = self.account.coming - sum(self._held.values())  # what is held back must not hold itself back
        # A better one waits for NORMAL calls too, which it would overtake: their runs have begun, and are to end.
        ask = Ask(charge=self._typical.charge, priority=rung) if rung is Priority.LOW else self._typical
        return self.account.expected_wait(now, ask, others=begun, guess=guess)[0] <= allowed

    def typical(self) -> float:
        """See `forebay.typing.Source`."""
        return self.account.service.typical_or_guess

    def shuts_out(self, rung: Priority) -> bool:
        """See `forebay.typing.Source`."""
        now = clock.now()
        with self._lock:
            return self.account.line.ahead(rung) > 0 or self._is_shut(now, rung)

    def _is_shut(self, now: float, rung: Priority) -> bool:
        """Whether runs are to wait, for no call is let through. For a budget that never comes back they need not."""
        no = self.account.shut(now, self._typical.usd, rung)
        return no is not None and (no.binding != "budget" or no.retry_after is not None)

    def hold_back(self, who: object, runs: int, rung: Priority = Priority.NORMAL) -> None:
        """See `forebay.typing.Source`."""
        with self._lock:
            self._urgent.discard(who)
            if runs and rung is Priority.CRITICAL:
                self._urgent.add(who)
            self.account.coming += runs - self._held.get(who, 0)
            if runs:
                self._held[who] = runs
            else:
                self._held.pop(who, None)

    def coming(self, runs: int) -> None:
        """See `forebay.typing.Source`."""
        with self._lock:
            self.account.coming += runs

    def on_relief(self, who: object, callback: Callable[[], None]) -> None:
        """See `forebay.typing.Source`."""
        with self._lock:
            self._relief[who] = callback

    def forget(self, who: object) -> None:
        """See `forebay.typing.Source`."""
        with self._lock:
            self._relief.pop(who, None)
        self.hold_back(who, 0)

    def _relieved(self, now: float) -> list[Callable[[], None]]:
        if self._may_start(now, Priority.NORMAL):
            told: Iterable[object] = self._held
        else:
            told = self._urgent if self._urgent and self._may_start(now, Priority.CRITICAL) else ()
        return [self._relief[who] for who in told if who in self._relief]

    def _learn(self, ask: Ask) -> None:
        """What a typical call asks, as a moving mean."""
        usd = self._typical.usd
        self._typical.usd = usd + _GAIN * (ask.usd - usd) if usd else ask.usd
        old, new = self._typical.charge, ask.charge
        self._typical.charge = Charge(
            requests=1,
            input_tokens=_mean(old.input_tokens, new.input_tokens),
            output_tokens=_mean(old.output_tokens, new.output_tokens),
            tokens=_mean(old.tokens, new.tokens),
        )


def _mean(old: int, new: int) -> int:
    return round(old + _GAIN * (new - old)) if old else new
