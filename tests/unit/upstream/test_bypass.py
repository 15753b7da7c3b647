"""Head-of-queue bypass, compared with a queue without bypass: no call may be sent later than there."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

from forebay.breaker import UPSTREAM_RULES, Breaker
from forebay.interfaces import Charge, Outcome
from forebay.limit import FixedLimit, Grant
from forebay.quota import Quota, RateLimiter
from forebay.quota.observed import ObservedLimit
from forebay.task import Priority
from forebay.upstream.account import Account
from forebay.upstream.bypass import LOOK_AHEAD
from forebay.upstream.call_request import Admitted, CallOutcome, CallRequest, Permit, Queued, Rejected

UNITS = ("requests", "input_tokens", "output_tokens")
SUCCESS = CallOutcome(kind=Outcome.SUCCESS)


class Rule(NamedTuple):
    """A quota of `amount` per minute: in windows of which the first ends at `turns`, or refilled continuously."""

    unit: str
    amount: int
    turns: float | None


class Job(NamedTuple):
    """A call that arrives at `comes` and lasts `lasts` seconds: it reserves `takes`, and uses `uses`."""

    comes: float
    lasts: float
    takes: tuple[int, int, int]
    uses: tuple[int, int, int]

    def charge(self, amounts: tuple[int, int, int]) -> Charge:
        return Charge(**dict(zip(UNITS, amounts, strict=True)))


# --- the model: a queue without bypass ---


class Pool:
    """The rest of one quota, as `Rule` says; nothing is returned to a window that has ended."""

    def __init__(self, rule: Rule) -> None:
        self.rule, self.left, self.at, self.turns, self.turn = rule, float(rule.amount), 0.0, rule.turns, 0

    def pass_to(self, now: float) -> None:
        if self.turns is None:
            self.left = min(self.rule.amount, self.left + (now - self.at) * self.rule.amount / 60.0)
        while self.turns is not None and self.turns <= now:
            self.turns, self.left, self.turn = self.turns + 60.0, float(self.rule.amount), self.turn + 1
        self.at = now

    def there_at(self, amount: float) -> float:
        if amount <= self.left + 1e-6 or not amount:
            return self.at
        return self.at + (amount - self.left) * 60.0 / self.rule.amount if self.turns is None else self.turns

    def take(self, amount: float) -> int:
        self.left -= amount
        return self.turn

    def give_back(self, amount: float, turn: int) -> None:
        if turn == self.turn:
            self.left = min(self.rule.amount, self.left + amount)


def served_in_order(jobs: list[Job], slots: int, rules: list[Rule]) -> list[float]:
    """Return when each call is sent if all are sent in the order in which they came."""
    pools = [Pool(rule) for rule in rules]
    places = [UNITS.index(rule.unit) for rule in rules]
    ends: list[tuple[float, int, list[int]]] = []
    coming, queue = deque(enumerate(jobs)), deque[int]()
    sent = [math.inf] * len(jobs)
    now = 0.0
    while coming or queue:
        for pool in pools:
            pool.pass_to(now)
        while ends and ends[0][0] <= now:
            _, one, turns = heapq.heappop(ends)
            for pool, place, turn in zip(pools, places, turns, strict=True):
                pool.give_back(jobs[one].takes[place] - jobs[one].uses[place], turn)
        while coming and coming[0][1].comes <= now:
            queue.append(coming.popleft()[0])
        ready = math.inf
        while queue and len(ends) < slots:
            wanted = jobs[queue[0]].takes
            ready = max(pool.there_at(wanted[place]) for pool, place in zip(pools, places, strict=True))
            if ready > now:
                break
            turns = [pool.take(wanted[place]) for pool, place in zip(pools, places, strict=True)]
            sent[queue[0]], ready = now, math.inf
            heapq.heappush(ends, (now + jobs[queue[0]].lasts, queue.popleft(), turns))
        now = min(ready, ends[0][0] if ends else math.inf, coming[0][1].comes if coming else math.inf)
    return sent


# --- the account ---


class NumberedWaiter:
    """Records the decision and the time to wake at."""

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.decision: Admitted | Rejected | None = None
        self.looks_at = math.inf

    def resolve(self, decision: Admitted | Rejected) -> bool:
        self.decision = decision
        return True

    def wake_at(self, when: float) -> bool:
        self.looks_at = when
        return True


class BypassCountingAccount(Account):
    """An account that lets only `passes` calls overtake, and keeps the calls that the last of them overtook."""

    passes = 1_000_000_000
    passed: Sequence[NumberedWaiter] = ()

    def _bypass_head(self, now: float) -> float:
        if not self.passes:
            return math.inf
        row = list(self.queue.in_order())
        seconds = super()._bypass_head(now)
        if not seconds:
            self.passes -= 1
            passed = itertools.takewhile(lambda waiting: waiting.is_queued, row)
            self.passed = [waiting.waiter for waiting in passed if isinstance(waiting.waiter, NumberedWaiter)]
        return seconds


def account_of(slots: int, rules: list[Rule], usd: float = math.inf) -> BypassCountingAccount:
    quotas = RateLimiter(Quota(**{rule.unit: rule.amount}, per="minute") for rule in rules if rule.turns is None)
    for rule in rules:
        if rule.turns is not None:  # as if learned from headers
            observed = quotas._observed[rule.unit] = ObservedLimit(rule.amount, 60.0, 0.0, rule.amount)
            observed.bucket.window_end, observed.bucket.window_delay = rule.turns, 0.0
    return BypassCountingAccount(
        "upstream:test",
        limit=FixedLimit(slots),
        quotas=quotas,
        breaker=Breaker(UPSTREAM_RULES, draw=lambda: 0.5),
        budgets=lambda _: () if usd == math.inf else (ConstantBudget(usd),),
        max_wait=1e9,
        draw=lambda: 0.5,
    )


class ConstantBudget:
    """A budget of which nothing is ever spent."""

    name = "the budget"

    def __init__(self, usd: float) -> None:
        self.usd = usd

    def can_afford(self, usd: float, priority: Priority) -> bool:
        return usd <= self.usd / (1 + priority)

    def reserve(self, usd: float) -> ConstantBudget:
        del usd
        return self

    def settle(self, usd: float) -> None:
        """Do nothing."""

    def rejection(self, usd: float) -> Rejected:
        return Rejected(f"{usd} is too much", "budget", 0.0, None)


class Run:
    """An account and all its events in the order of time: ends first, then arrivals."""

    def __init__(self, jobs: list[Job], slots: int, rules: list[Rule], passes: int = 1_000_000_000) -> None:
        self.account = account_of(slots, rules)
        self.account.passes = passes
        self.jobs = jobs
        self.waiting: dict[int, NumberedWaiter] = {}
        self.ends: list[tuple[float, int, Permit]] = []
        self.sent = [math.inf] * len(jobs)

    def served(self) -> list[float]:
        """Return when each call is sent."""
        coming = deque(enumerate(self.jobs))
        now = 0.0
        while coming or self.waiting:
            while self.ends and self.ends[0][0] <= now:
                _, number, permit = heapq.heappop(self.ends)
                job = self.jobs[number]
                self.account.settle(now, permit, CallOutcome(kind=Outcome.SUCCESS, used=job.charge(job.uses)))
            self.look(now)
            while coming and coming[0][1].comes <= now:
                self.come(now, *coming.popleft())
            looks = [caller.looks_at for caller in self.waiting.values() if caller.looks_at > now]
            now = min(
                [*looks, *([self.ends[0][0]] if self.ends else []), *([coming[0][1].comes] if coming else [])],
                default=math.inf,
            )
            assert now < math.inf or not (coming or self.waiting), "a call waits, and nothing will wake it"
        return self.sent

    def come(self, now: float, number: int, job: Job) -> None:
        request = CallRequest(charge=job.charge(job.takes))
        decision = self.account.try_acquire(now, request)
        if isinstance(decision, Admitted):
            self.send(now, number, decision.permit)
            return
        assert isinstance(decision, Queued), decision
        self.waiting[number] = NumberedWaiter(number)
        self.account.enqueue(now, request, self.waiting[number])
        self.look(now)

    def look(self, now: float) -> None:
        self.account.serve_queue(now)
        for number, caller in list(self.waiting.items()):
            if caller.decision is not None:
                assert isinstance(caller.decision, Admitted)
                self.send(now, number, caller.decision.permit)
                del self.waiting[number]

    def send(self, now: float, number: int, permit: Permit) -> None:
        self.sent[number] = now
        heapq.heappush(self.ends, (now + self.jobs[number].lasts, number, permit))


@st.composite
def jobs_of(draw: st.DrawFn, rules: list[Rule]) -> list[Job]:
    most = {rule.unit: rule.amount for rule in rules}
    jobs = []
    for comes in sorted(draw(st.lists(st.integers(0, 40), min_size=3, max_size=24))):
        takes, uses = [], []
        for unit in UNITS:
            amount = draw(st.sampled_from([0, 1, most.get(unit, 9) // 10, most.get(unit, 9) // 2, most.get(unit, 9)]))
            takes.append(amount)
            uses.append(draw(st.integers(0, amount)))
        lasts = draw(st.integers(1, 90))
        jobs.append(Job(float(comes), float(lasts), (takes[0], takes[1], takes[2]), (uses[0], uses[1], uses[2])))
    return jobs


# Amounts that refill without rounding: otherwise a call could be sent here just before a window ends, and at its end in
# the model.
RULES = st.lists(
    st.builds(Rule, st.sampled_from(UNITS), st.sampled_from([15, 30, 60]), st.sampled_from([None, None, 7.0, 50.0])),
    min_size=1,
    max_size=3,
    unique_by=lambda rule: rule.unit,
)
TEXT, VECTOR = (1, 10, 50), (1, 10, 0)  # a chat, and an embedding, which has no output tokens
TWO = [Rule("input_tokens", 60, None), Rule("output_tokens", 60, None)]


class Case(NamedTuple):
    """Calls that come to an account with `slots` slots and the quotas of `rules`."""

    rules: list[Rule]
    slots: int
    jobs: list[Job]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rules = draw(RULES)
    return Case(rules, draw(st.sampled_from([1, 2, 3, 5, 40])), draw(jobs_of(rules)))


# The tenth waits long compared with the others: nearly all calls behind it are promoted by one priority, one by one.
LASTS = (6, 1, 1, 1, 1, 1, 1, 2, 4, 21, *[1] * 14)
COMES = (*[0] * 19, 5, 5, 5, 12, 14)
MOVED_UP = Case(
    [Rule("requests", 6, None)],
    1,
    [Job(comes, lasts, (0, 0, 0), (0, 0, 0)) for comes, lasts in zip(COMES, LASTS, strict=True)],
)

# A call overtakes in one window and ends in the next, and returns nothing there. Otherwise the fourth would be sent and
# end earlier, and what it returns would be lost to the eleventh, because the quota would be full by then.
TURNED = Case(
    [Rule("requests", 6, 7.0), Rule("input_tokens", 6, 7.0), Rule("output_tokens", 6, 50.0)],
    40,
    [
        Job(0.0, lasts, takes, uses)
        for lasts, takes, uses in (
            (35, (0, 0, 1), (0, 0, 1)), (1, (0, 0, 0), (0, 0, 0)), (28, (0, 1, 6), (0, 0, 0)),
            (65, (0, 6, 1), (0, 0, 0)), (15, (6, 3, 0), (0, 0, 0)), *[(1, (0, 0, 0), (0, 0, 0))] * 4,
            (2, (1, 6, 0), (0, 0, 0)), (1, (0, 1, 0), (0, 0, 0)), (1, (0, 0, 0), (0, 0, 0)), (16, (0, 0, 1), (0, 0, 0)),
        )
    ],
)  # fmt: skip


@given(cases())
@example(MOVED_UP)
def test_no_call_is_sent_later_than_in_a_queue_without_bypass(case: Case) -> None:
    rules, slots, jobs = case.rules, case.slots, [job._replace(uses=job.takes) for job in case.jobs]
    alone = served_in_order(jobs, slots, rules)
    for number, (passing, waiting) in enumerate(zip(Run(jobs, slots, rules).served(), alone, strict=True)):
        assert passing <= waiting + 1e-3, f"call {number} is sent at {passing}, and without bypass at {waiting}"


@given(cases())
@example(MOVED_UP)
@example(TURNED)
def test_no_overtaken_call_is_sent_later_whatever_calls_in_flight_return(case: Case) -> None:
    rules, slots, jobs = case
    before, passes = Run(jobs, slots, rules, passes=0).served(), 0
    assert before == pytest.approx(served_in_order(jobs, slots, rules), abs=1e-3)
    while True:
        run = Run(jobs, slots, rules, passes=passes + 1)
        after = run.served()
        if run.account.passes:
            return
        for caller in run.account.passed:
            one = caller.number
            assert after[one] <= before[one] + 1e-3, (
                f"bypass {passes}: call {one} at {after[one]}, not at {before[one]}"
            )
        before, passes = after, passes + 1


def make_account(*rules: Rule, slots: int = 9, usd: float = math.inf) -> Account:
    return account_of(slots, list(rules) or TWO, usd)


def come(account: Account, takes: tuple[int, int, int], now: float = 0.0, **how: object) -> NumberedWaiter:
    """Let a call arrive, and return its waiter, with the decision if there is one."""
    caller = NumberedWaiter()
    request = CallRequest(charge=Charge(**dict(zip(UNITS, takes, strict=True))), **how)  # type: ignore[arg-type]
    decision = account.try_acquire(now, request)
    if isinstance(decision, Queued):
        account.enqueue(now, request, caller)
        account.serve_queue(now)
    else:
        caller.decision = decision
    return caller


def is_sent(caller: NumberedWaiter) -> bool:
    return isinstance(caller.decision, Admitted)


def test_a_call_that_uses_other_quotas_overtakes_a_head_blocked_on_its_own() -> None:
    account = make_account()
    assert is_sent(come(account, TEXT))
    head = come(account, TEXT)
    assert is_sent(come(account, VECTOR))
    account.serve_queue(39.9)
    assert head.decision is None
    account.serve_queue(40.0)  # 50 of 60 per minute, of which 10 were left
    assert is_sent(head)


def test_a_small_call_does_not_overtake_if_it_uses_the_quota_that_the_head_waits_for() -> None:
    account = make_account()
    come(account, TEXT)
    assert not is_sent(come(account, TEXT))
    assert not is_sent(come(account, (1, 1, 1)))


def test_quota_that_refills_before_the_head_can_go_may_be_used_meanwhile() -> None:
    account = make_account()
    first = come(account, TEXT)
    assert isinstance(first.decision, Admitted)
    account.settle(0.0, first.decision.permit, SUCCESS)  # so no call in flight can bring the head forward
    assert not is_sent(come(account, (1, 20, 50)))  # in 40 s, when there are 40 more input tokens
    assert is_sent(come(account, (1, 50, 0)))
    assert not is_sent(come(account, (1, 50, 0)))


def test_quota_that_a_call_in_flight_may_return_is_kept_for_the_head() -> None:
    account = make_account()
    come(account, TEXT)  # it may end without any output
    assert not is_sent(come(account, (1, 20, 50)))
    assert is_sent(come(account, (1, 30, 0)))
    assert not is_sent(come(account, (1, 1, 0)))


def test_quota_is_kept_for_the_calls_in_between() -> None:
    account = make_account()
    come(account, TEXT)
    come(account, TEXT)
    come(account, (1, 30, 50))
    assert is_sent(come(account, (1, 10, 0)))
    assert not is_sent(come(account, (1, 10, 0)))  # the head needs 10 of the 40 input tokens that are left, the next 30


def test_the_rest_of_a_window_may_be_used_before_it_ends() -> None:
    account = make_account(Rule("input_tokens", 60, 30.0))
    first = come(account, (1, 40, 0))
    assert isinstance(first.decision, Admitted)
    account.settle(0.0, first.decision.permit, SUCCESS)
    head = come(account, (1, 50, 0))
    assert is_sent(come(account, (1, 15, 0)))
    assert not is_sent(come(account, (1, 15, 0)))  # that much is not left
    account.serve_queue(30.0)
    assert is_sent(head)


def test_the_queue_is_served_again_when_a_call_may_overtake() -> None:
    account = make_account()
    for takes in ((1, 60, 0), (0, 0, 60)):
        permit = come(account, takes)
        assert isinstance(permit.decision, Admitted)
        account.settle(0.0, permit.decision.permit, SUCCESS)
    head = come(account, (1, 0, 60))
    later = come(account, (1, 15, 0))
    assert not is_sent(later)
    assert head.looks_at == 15.0
    account.serve_queue(15.0)
    assert is_sent(later)
    assert not is_sent(head)


def test_a_slot_is_kept_for_each_overtaken_call() -> None:
    account = make_account(slots=4)
    come(account, TEXT)
    head = come(account, TEXT)
    assert is_sent(come(account, (0, 0, 0)))
    come(account, TEXT)
    assert not is_sent(come(account, (0, 0, 0)))  # it may run for longer than the two ahead of it wait for tokens
    account.serve_queue(40.0)
    assert is_sent(head)


class Growing(FixedLimit):
    """A limit that grows by one for each accepted call, as an adaptive limit does."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.more = 0

    def limit(self, now: float) -> int:
        return super().limit(now) + self.more

    def accepted(self, now: float, grant: Grant) -> None:
        super().accepted(now, grant)
        self.more += 1


def test_the_queue_is_served_again_when_an_accepted_call_raises_the_limit() -> None:
    account = make_account()
    account.limit = Growing(2)
    come(account, TEXT)
    head, other = come(account, TEXT), come(account, VECTOR)
    assert other.decision is None  # the only slot is the head's
    assert head.looks_at == 1.0  # a call counts as accepted so long after it was sent
    account.serve_queue(1.0)
    assert is_sent(other)


def test_money_is_kept_for_each_overtaken_call_by_the_share_of_the_lowest_priority() -> None:
    account = make_account(usd=13.5)
    come(account, TEXT, usd=1.0)
    come(account, TEXT, usd=2.0)  # a NORMAL call may use a third of the budget
    assert is_sent(come(account, VECTOR, usd=2.5))  # nothing of it is spent
    assert not is_sent(come(account, VECTOR, usd=2.6))
    assert not is_sent(come(account, VECTOR, usd=0.1))  # the calls ahead of it need 2.6


def test_only_the_first_calls_of_the_queue_are_considered() -> None:
    account = make_account(Rule("output_tokens", 60, None), slots=99)
    come(account, TEXT)
    for _ in range(LOOK_AHEAD - 1):
        come(account, TEXT)
    assert is_sent(come(account, VECTOR))
    come(account, TEXT)
    assert not is_sent(come(account, VECTOR))


def test_a_call_that_overtakes_does_not_change_the_turns_of_tenants() -> None:
    account = make_account()
    come(account, TEXT)
    head = come(account, TEXT, tenant="a")
    for _ in range(5):
        come(account, TEXT, tenant="a")
    assert is_sent(come(account, (1, 0, 0), tenant="a"))
    other = come(account, TEXT, tenant="b")
    account.serve_queue(40.0)
    account.serve_queue(100.0)
    assert is_sent(head)
    assert is_sent(other)  # second after the head, not behind all that were ahead of the call that overtook


def test_no_call_overtakes_while_the_breaker_is_not_closed() -> None:
    account = make_account()
    come(account, TEXT)
    come(account, TEXT)
    account.breaker.trip(0.0)
    assert account.breaker.retry_after(0.0)
    when = account.breaker.retry_after(0.0) or 0.0
    assert account.breaker.ready(when + 0.1)
    caller = come(account, VECTOR, now=when + 0.1)
    assert not is_sent(caller)
