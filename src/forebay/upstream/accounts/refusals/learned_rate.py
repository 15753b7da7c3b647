"""A rate that no header tells, learned from what was accepted between refusals."""

from __future__ import annotations

import math
from collections import deque
from typing import Final, NamedTuple

from forebay.upstream.accounts.refusals.refusal_pause import Block
from forebay.upstream.shared.ledger.rate_messages import SharedRate, SharedRateCheck

_MARGIN: Final = 0.98  # of the measured rate, so that the provider's bucket gains a little
_MIN_COUNT: Final = 10  # calls accepted between two blocks from which their rate is a measurement ...
_GOOD_COUNT: Final = 20  # ... and from which older blocks add nothing
_MEMORY: Final = 130.0  # seconds for which a block is remembered: a rate per minute shows in two of its windows
_MAX_BLOCKS: Final = 16  # that are remembered
_IDLE: Final = 5.0  # seconds without a call after which earlier blocks measure nothing: the bucket may have been full
_RECENT: Final = 5.0  # seconds; the rate before a first block is taken over one to two times as long
_FASTEST_LASTS: Final = 60.0  # seconds for which the highest rate of accepted calls is remembered
_FIRST_SHARE: Final = 0.5  # of that rate, while no measurement is known
_AT_ONCE: Final = 10.0  # seconds; blocks nearer to each other show that the rate is far too high ...
_FAR: Final = 0.5  # ... if fewer calls than this share of what the rate allows were accepted between them
_MAX_FALL: Final = 4.0  # times that the rate falls then, at most
_FALL: Final = 0.9  # of the rate is left where nothing better is known
_FIRST_STEP: Final = 0.02  # by which the rate rises first; each step without a refusal doubles the next ...
_MAX_STEP: Final = 0.5  # ... up to this
_UNKNOWN_STEP: Final = 0.25  # ... by which it rises each second while no measurement is known
_STEP_SECONDS: Final = 5.0  # that a step lasts at least ...
_FAST_STEP_SECONDS: Final = 2.0  # ... above this many times the rate that was learned
_FAST_FROM: Final = 1.5
_FIRST_WAIT: Final = 10.0  # seconds from a block to the first step; a refused step doubles it ...
_MAX_WAIT: Final = 60.0  # ... up to this
_CALLS_PER_REFUSAL: Final = 200  # that are sent before a step may be refused again ...
_MAX_COUNTED: Final = 2  # ... and refusals that count: those of a trial or a pause are not the price of the step
_MIN_RATE: Final = 1 / 60  # calls a second
_MIN_RESUMED: Final = 1.0  # calls a second with which an account begins again at least
_LONGEST_WAIT: Final = 600.0  # seconds, however slow the rate is
_CERTAIN: Final = 1.5  # times the measured rate, up to which the rate before shows that the measurement is good
_QUOTA_CALLS: Final = 10  # refused calls that a known quota explains ...
_QUOTA_SHARE: Final = 0.02  # ... and this share of the accepted ones, from which no rate is learned
_TOLERATED: Final = 0.01  # share of calls refused that does not lower a measured rate
_SHORT_BLOCK: Final = 1.0  # seconds
_PENALTY_COST: Final = 30.0  # times as long as a refused step has blocked the account, until the next one
_LATE: Final = 0.05  # seconds by which a call may be late without delaying the next one
_USED: Final = 0.8  # of the rate that must be used for it to rise
_FALLS: Final = 24  # in a row, without a rise by a fifth, that show that no rate is the cause ...
_DEEP: Final = 12  # ... of which a deep one after a long block counts as so many: what was measured was no rate
_DOUBTED: Final = 0.78  # of a rate that was believed: once it has fallen to that, without a rise, it is checked
_MAX_CHECKED: Final = 8.0  # seconds of a block: after a longer one a check would cost too much
_FASTER: Final = 8.0  # times the rate, with which calls go in a check ...
_CHECK_SECONDS: Final = 60.0  # ... for so long at most: a window of a minute refuses by then
_MIN_CHECKED: Final = 7  # calls accepted in a check ...
_MORE: Final = 1.1  # ... and times the rate that was refused, from which it speaks against a rate ...
_LESS: Final = 0.8  # ... and times that, below which it confirms one
_PASSES: Final = 2  # checks in a row that speak against a rate and disprove it
_LONG_AGO: Final = 1e9  # seconds: as good as never
_SAME_BLOCK: Final = 0.5  # seconds between the ends of blocks that are one
_STALE: Final = 600.0  # seconds without a refusal for a rate, after which the rate is forgotten


class _Mark(NamedTuple):
    """The calls accepted until a moment, as far as known: one that is refused later is taken off."""

    at: float  # of a block's end, when the first call was sent that was accepted
    accepted: int
    counted_at: float  # all calls sent before were counted

    def without(self, sent_at: float) -> _Mark:
        """Return the mark without a call sent at `sent_at`, if that was counted."""
        return self._replace(accepted=self.accepted - 1) if sent_at < self.counted_at else self


class _Check(NamedTuple):
    """A check of a rate that fell though it had not risen: for a time calls go far faster."""

    rate: float  # that is checked
    refused_rate: float  # from which it fell
    start: _Mark
    refused_at: float  # when the last refused call before it was sent


class LearnedRate:
    """The rate at which calls are sent to a provider that refuses faster ones. At first there is none.

    When a provider stops refusing for a rate, its bucket is nearly empty, or its window has just begun. So the calls
    that it accepted between two such moments, over the time, are the rate, whatever the size of the bucket. Calls are
    spaced evenly at slightly less, and the rate rises by small steps that grow until a call is refused again.

    Attributes:
        rate: calls a second; infinity while none is known.
        measured: the rate is a measurement, not a guess.
        share: of the rate with which calls are sent here: other processes send the others.
        version: changes whenever something is learned, or another step begins.
    """

    __slots__ = (
        "_adopted_at",
        "_before",
        "_before_rise",
        "_believed",
        "_blocks",
        "_check",
        "_count",
        "_earlier_mark",
        "_falls",
        "_fastest",
        "_fastest_at",
        "_held",
        "_learned",
        "_learned_count",
        "_mark",
        "_next_at",
        "_next_step_at",
        "_others",
        "_passes",
        "_refusals",
        "_refused_at",
        "_sent_at",
        "_sent_in_step",
        "_step",
        "_step_start",
        "_wait",
        "measured",
        "rate",
        "share",
        "version",
    )

    def __init__(self) -> None:
        self.rate = math.inf
        self.measured = False
        self.share = 1.0
        self.version = 0
        self._others = 0  # calls of other processes that are counted
        self._held = math.inf  # the highest rate that was not refused for a whole step, since the latest block
        self._learned = math.inf  # the rate after the latest block, before it rose
        self._before = math.inf  # the rate before the first block
        self._before_rise = 0.0  # the rate before its latest rise, until the raised rate has been corrected
        self._falls = 0  # of a measured rate, since it last rose
        self._believed = 0.0  # the rate after its first fall or its latest check; 0 if it has not fallen since it rose
        self._check: _Check | None = None  # that is under way
        self._passes = 0  # checks one after the other that spoke against a rate
        self._count = 0  # calls sent and not refused
        self._mark = self._earlier_mark = _Mark(-math.inf, 0, -math.inf)
        self._fastest, self._fastest_at = 0.0, -math.inf  # the highest rate of calls accepted in the last minute
        self._blocks: deque[_Mark] = deque(maxlen=_MAX_BLOCKS)
        self._refusals = self._learned_count = 0  # calls refused since the rate was learned, and accepted before
        self._refused_at = -math.inf  # when the latest block ended
        self._adopted_at = -math.inf  # when the block ended from which another process has learned latest
        self._sent_at = -math.inf  # when the latest call was sent
        self._next_at = -math.inf  # when the next call may be sent
        self._step = _FIRST_STEP
        self._step_start = -math.inf
        self._next_step_at = -math.inf
        self._sent_in_step = 0
        self._wait = _FIRST_WAIT

    @property
    def known(self) -> bool:
        """True if calls are spaced."""
        return self.rate < math.inf

    @property
    def _interval(self) -> float:
        """Seconds between two calls that are sent here."""
        return 1.0 / (self.rate * self.share)

    @property
    def own_count(self) -> int:
        """Calls of this process that were sent and not refused."""
        return self._count - self._others

    @property
    def rising(self) -> bool:
        """True if the rate has risen since it was learned."""
        return self.measured and self.rate > self._learned

    def is_disproved(self) -> bool:
        """Return whether refusals go on however far the rate falls.

        Calls that are sent no faster than was measured are hardly ever refused for their rate. Where they are, again
        and again, or where far faster ones are not, the cause is another one: small servers behind a load balancer, or
        a capacity that comes and goes.
        """
        return self._falls >= _FALLS or self._passes >= _PASSES

    def forget(self) -> None:
        """Space calls no more: no rate is the cause of the refusals."""
        self._falls = self._passes = 0
        self._believed, self._check = 0.0, None
        self.version += self.known
        self.rate = self._held = self._learned = math.inf
        self.measured = False
        self._next_at = -math.inf

    def recent(self, now: float) -> float:
        """Return the most calls a second that were accepted in the last minute; the learned rate if that is higher."""
        fastest = max(self._fastest, self._accepted_since(self._earlier_mark, now))
        return max(fastest, self.rate) if self.known else fastest

    def _accepted_since(self, mark: _Mark, now: float) -> float:
        return (self._count - mark.accepted) / max(_RECENT, now - mark.at)

    def wait(self, now: float, ahead: int = 0) -> float:
        """Return the seconds until a call may be sent, after `ahead` others."""
        if not self.known:
            return 0.0
        own = max(0.0, self._next_at - now)
        rate = self.rate * self.share
        if self.measured or not ahead:
            return own + ahead / rate
        growth = math.log1p(_UNKNOWN_STEP)  # a second: a guess is low at first, and must not reject calls
        return own + math.log1p(growth * ahead / rate) / growth

    def record_sent(self, now: float, *, blocked: bool) -> None:
        """Note that a call is sent; `blocked`: calls are refused at present."""
        self._count += 1
        if now > self._sent_at + _IDLE and not blocked:
            self._blocks.clear()
        self._sent_at = now
        if now >= self._mark.at + _RECENT and not blocked:
            accepted = self._accepted_since(self._earlier_mark, now)
            if accepted > self._fastest or now > self._fastest_at + _FASTEST_LASTS:
                self._fastest, self._fastest_at = accepted, now
            self._earlier_mark, self._mark = self._mark, _Mark(now, self._count, now)
        if self.rate < math.inf:
            self._sent_in_step += 1
            self._next_at = max(self._next_at, now - _LATE) + self._interval
            if now >= self._next_step_at and not blocked:
                self._rise(now)

    def record_others(self, now: float, count: int) -> None:
        """Note that other processes have sent `count` calls that were not refused; below 0: that so many were."""
        self._count += count
        self._others += count
        if count > 0:
            self._sent_at = now
            self._sent_in_step += count

    def export(self, now: float) -> SharedRate:
        """Return what has been learned, for the other processes of the account."""
        check = self._check
        return SharedRate(
            rate=_finite(self.rate),
            measured=self.measured,
            held=_finite(self._held),
            learned=_finite(self._learned),
            before=_finite(self._before),
            before_rise=self._before_rise,
            falls=self._falls,
            believed=self._believed,
            passes=self._passes,
            step=self._step,
            wait=self._wait,
            refused_ago=min(_LONG_AGO, now - self._refused_at),
            step_ago=min(_LONG_AGO, now - self._step_start),
            step_left=max(-_LONG_AGO, self._next_step_at - now),
            check=None
            if check is None
            else SharedRateCheck(
                check.rate, check.refused_rate, now - check.start.at, min(_LONG_AGO, now - check.refused_at)
            ),
        )

    def adopt(self, now: float, shared: SharedRate, *, age: float) -> None:
        """Take over what another process has learned `age` seconds ago."""
        then, count, was_known = now - age, self._count, self.known
        self.rate, self.measured = _infinite(shared.rate), shared.measured
        self._held, self._learned = _infinite(shared.held), _infinite(shared.learned)
        self._before, self._before_rise = _infinite(shared.before), shared.before_rise
        self._falls, self._believed, self._passes = shared.falls, shared.believed, shared.passes
        self._step, self._wait = shared.step, shared.wait
        self._step_start, self._next_step_at = then - shared.step_ago, then + shared.step_left
        self._sent_in_step = round(self.rate * (now - self._step_start)) if self.known else 0
        self._check = None
        if shared.check is not None:
            at, refused_at = then - shared.check.began_ago, then - shared.check.refused_ago
            start = _Mark(at, count, now)
            self._check = _Check(shared.check.rate, shared.check.refused_rate, start, refused_at)
        refused_at = then - shared.refused_ago
        if refused_at > self._refused_at + _SAME_BLOCK:  # the calls of all were counted until then
            self._refused_at = self._adopted_at = refused_at
            self._blocks.append(_Mark(refused_at, count, now))
            self._refusals, self._learned_count = 0, count
        self._next_at = (
            now + self._interval if self.known and not was_known else min(self._next_at, now + self._interval)
        )
        if not self.known:
            self._next_at = -math.inf

    def record_refused(self, sent_at: float) -> None:
        """Note that a call was refused, for whatever reason, or not sent: it was not accepted.

        The marks set since it was sent counted it. Without their correction a burst that is refused after a mark makes
        the rate from that mark on far too low, or negative.
        """
        self._count -= 1
        self._mark = self._mark.without(sent_at)
        self._earlier_mark = self._earlier_mark.without(sent_at)
        for index in range(len(self._blocks) - 1, -1, -1):
            if self._blocks[index].counted_at <= sent_at:
                break
            self._blocks[index] = self._blocks[index].without(sent_at)
        if self._check is not None:
            self._check = self._check._replace(start=self._check.start.without(sent_at))

    def learn(self, now: float, block: Block, *, guess: bool) -> None:
        """Learn from a block whose cause is a rate, and that is over.

        Args:
            now: the time.
            block: the row of refusals.
            guess: make a guess if there is no measurement; False if a known quota explains the refusals.
        """
        if block.refused <= self._adopted_at:
            return  # its calls were sent before it was known what another process has learned from them
        while self._blocks and self._blocks[0].at < now - _MEMORY:
            self._blocks.popleft()
        count, refused_rate, learned = self._count, self.rate, self._learned
        self._blocks.append(_Mark(block.ended, count, now))
        self._refusals += block.refusals
        if not (guess or self.known) and self._refusals <= _QUOTA_CALLS + _QUOTA_SHARE * count:
            return  # the quota limits the calls well enough: no other process uses the key
        if self._check is not None:
            self._end_check(now, block, self._check)
            return
        if self._is_tolerated(block):
            self._refused_at, self._next_at = now, now + self._interval
            if self.rising:
                self._before_rise, self.rate = self._learned, self._held
                self._learned = self.rate
                self._begin_wait(now, block, certain=True)
            return
        fallen, long = self.measured and guess and not self.rising, not self._is_short(block)
        if not self._correct(block, guess=guess):
            return
        if fallen:
            self._falls += _DEEP if long and self.rate < _FALL * refused_rate else 1
        self._refused_at, self._learned = now, self.rate
        self._refusals, self._learned_count = 0, count
        near = refused_rate if self._is_short(block) else learned
        certain = self.rate <= self._before_rise or near <= _CERTAIN * self.rate
        self._before_rise = 0.0
        self._begin_wait(now, block, certain=self.measured and certain)
        if fallen:
            self._doubt(now, block, refused_rate)
        else:
            self._believed = 0.0

    def _doubt(self, now: float, block: Block, refused_rate: float) -> None:
        """Begin a check if the rate has fallen far, though it had not risen. The first fall is a better measurement."""
        if not self._believed:
            self._believed = self.rate
        elif self.rate <= _DOUBTED * self._believed and _seconds(block) <= _MAX_CHECKED:
            self._begin_check(now, block, refused_rate)

    def _begin_check(self, now: float, block: Block, refused_rate: float) -> None:
        """Send calls far faster until one is refused, to see whether slower ones have helped.

        If the cause is no rate, each fall makes the next measurement lower, because fewer calls are sent and as many
        are refused. Only faster ones can show that.
        """
        self._check = _Check(self.rate, refused_rate, _Mark(block.ended, self._count, now), block.refused)
        self.rate *= _FASTER
        self._next_at = now + self._interval
        self._begin_step(now, _CHECK_SECONDS)

    def _end_check(self, now: float, block: Block, check: _Check) -> None:
        """Judge the calls accepted in a check, and go on with their rate, or with the one that was checked.

        A window accepts no more than its rate from the end of a block to that of the next, and a bucket from the last
        refusal before to the first one after: so the longer time counts.
        """
        accepted = self._count - check.start.accepted - 1
        measured = accepted / max(block.ended - check.start.at, block.began - check.refused_at)
        rate = check.rate
        if accepted >= _MIN_CHECKED and measured > _MORE * check.refused_rate:
            rate = measured
            self._passes += 1
        elif accepted >= _MIN_CHECKED:
            rate = max(rate, min(_MARGIN * measured, check.refused_rate))
        if accepted < _MIN_CHECKED or measured < _LESS * check.refused_rate:
            self._falls = self._passes = 0
        self._believe(rate)
        self._refused_at = now
        self._refusals, self._learned_count = 0, self._count
        self._begin_wait(now, block, certain=True)

    def _believe(self, rate: float) -> None:
        """End a check with a rate."""
        self._check = None
        self.rate = self._held = self._learned = self._believed = rate

    def _correct(self, block: Block, *, guess: bool) -> bool:
        """Set the rate by the calls accepted until the end of a block; return False if they do not tell it."""
        if (guess or self.known) and self._is_far_too_fast():
            last = self._blocks[-2]
            accepted = (self._count - last.accepted + 2) / (block.ended - last.at)
            least = max(self.rate / _MAX_FALL, self._before_rise) if self.known else 0.0
            self.rate = self._held = min(_FALL * self.rate, max(accepted, least))
        elif (measured := self._measure(self._count - 1, block.refused)) is not None:
            if self._held < self.rate and self._is_short(block):
                measured = max(measured, self._held)  # a small bucket was full while the rate was lower
            measured *= _MARGIN
            if self.measured:
                measured = min(self.rate, max(measured, self._learned / 2))
            self.rate = self._held = measured
            self.measured = True
        elif self.known:
            self.rate = self._held = _MARGIN * self._held if self._held < self.rate else _FALL * self.rate
        elif guess and (before := self._rate_before(block)) is not None:
            self._before, self.rate = before, _FIRST_SHARE * before
        else:
            return False
        self.rate = max(_MIN_RATE, self.rate)
        return True

    def resume(self, now: float, block: Block) -> None:
        """Begin again at the rate before a block whose cause is not a rate: meanwhile all slots may have become free.

        Nothing else is learned, and the spacing is dropped after a few seconds without a refusal.
        """
        if not self.known and (before := self._rate_before(block)) is not None:
            self.rate = self._before = self._learned = max(_MIN_RESUMED, before)
            self._refused_at = now
            self._begin_wait(now, block, certain=False)

    def _rate_before(self, block: Block) -> float | None:
        """Return the rate of the calls accepted in the seconds before a block; None if too little is known."""
        mark = self._earlier_mark
        if not -math.inf < mark.at < block.began:
            return None
        return (self._count - mark.accepted) / (block.began - mark.at)

    def _is_short(self, block: Block) -> bool:
        """Return whether a block was about as short as it takes a bucket to gain the next call."""
        return _seconds(block) <= max(_SHORT_BLOCK, 3.0 / self.rate)

    def _is_tolerated(self, block: Block) -> bool:
        """Return whether refusals are so rare that the measured rate need not fall."""
        calls = self._count - self._learned_count
        return self.measured and self._is_short(block) and self._refusals <= _TOLERATED * calls

    def _measure(self, count: int, refused: float) -> float | None:
        """Return the rate of the calls accepted since an earlier block; None if they are too few.

        The exact end of a block is not known, only the last call that was refused: a rate that is slightly too high is
        refused once more, and then measured better.
        """
        for earlier in list(self._blocks)[-2::-1]:
            accepted, seconds = count - earlier.accepted, refused - earlier.at
            if accepted >= _GOOD_COUNT and seconds > 0.0:
                return accepted / seconds
        if len(self._blocks) > 1 and accepted >= _MIN_COUNT and seconds > 0.0:
            return accepted / seconds
        return None

    def _is_far_too_fast(self) -> bool:
        """Return whether far fewer calls than the rate allows were accepted since the block before."""
        if len(self._blocks) <= 1:
            return False
        last, latest = self._blocks[-2], self._blocks[-1]
        seconds = latest.at - last.at
        return 0.0 < seconds < _AT_ONCE and latest.accepted - last.accepted < min(
            _MIN_COUNT, _FAR * self.rate * seconds - 2
        )

    def _begin_wait(self, now: float, block: Block, *, certain: bool) -> None:
        """Wait for a time until the rate rises, longer if it had just begun to, or if the block lasted long."""
        self._next_at = now + self._interval
        if not self.measured:
            self._step = _UNKNOWN_STEP
            self._begin_step(now, 1.0)
            return
        self._step = _FIRST_STEP
        if not certain:
            self._wait = _FIRST_WAIT
            self._begin_step(now, _FIRST_WAIT)
            return
        self._wait = min(_MAX_WAIT, 2 * self._wait)
        calls = _CALLS_PER_REFUSAL * min(_MAX_COUNTED, block.refusals)
        wait = max(self._wait, calls / self.rate, _PENALTY_COST * _seconds(block))
        self._begin_step(now, min(_LONGEST_WAIT, wait))

    def _begin_step(self, now: float, seconds: float) -> None:
        self._step_start, self._next_step_at, self._sent_in_step = now, now + seconds, 0
        self.version += 1

    def _rise(self, now: float) -> None:
        """Raise the rate if it was used, and forget it if it is out of date."""
        used = self._sent_in_step >= _USED * self.rate * (now - self._step_start)
        if now > self._refused_at + _STALE or (not self.measured and self.rate > 2 * self._before):
            self.forget()
            return
        if self._check is not None:
            if used:
                self.forget()
                return
            self._believe(self._check.rate)
        if used:
            self._held = self.rate
            self.rate *= 1.0 + self._step
            if self.measured:
                self._step = min(_MAX_STEP, 2 * self._step)
            if self.rate > 1.2 * self._learned:
                self._wait, self._falls, self._believed = _FIRST_WAIT, 0, 0.0
        seconds = _STEP_SECONDS if self.rate < _FAST_FROM * self._learned else _FAST_STEP_SECONDS
        self._begin_step(now, max(seconds, _MIN_COUNT / self.rate) if self.measured else 1.0)


def _finite(rate: float) -> float | None:
    return None if rate == math.inf else rate


def _infinite(rate: float | None) -> float:
    return math.inf if rate is None else rate


def _seconds(block: Block) -> float:
    """Return how long a block is known to have lasted: 0 if its first trial call was accepted."""
    return block.ended - block.began if block.refused > block.began else 0.0
