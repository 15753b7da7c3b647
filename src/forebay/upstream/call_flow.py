"""The call flow: retry and fallback of one call, decided in one place.

`call_flow` is a generator without I/O. It yields what to do next (`Acquire` a permit, `Send` an attempt, `Release` a
permit, `Sleep`) and is sent the reply, as httpx does for authentication. `CallRunner.run` drives it on an event loop,
and `CallRunner.run_blocking` in a plain thread. Transport, guard, context manager and gateway differ only in how they
send.

A failed attempt (500, a timeout) waits for a backoff. A throttled one (429, 503, 529) waits for the provider's
Retry-After or a backoff, and then for the retry budget. Both waits are outside of the call queue; after them the call
asks for another permit, which may be rejected.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Generator
from typing import Any, Final, TypeAlias, TypeVar, cast

import msgspec

from forebay import clock, context
from forebay.errors import Overloaded
from forebay.interfaces import Outcome
from forebay.quota.prices import is_price_list_loaded
from forebay.retry import RetryPermission, RetryState
from forebay.upstream.accounts.thread_safe_account import ThreadSafeAccount
from forebay.upstream.call_request import AttemptResult, CallOutcome, CallRequest, Permit
from forebay.upstream.core import UpstreamCore
from forebay.upstream.fallbacks.fallback_chain import CallRoute, FallbackChain, make_chain
from forebay.upstream.fallbacks.fallback_routes import FallbackResolver
from forebay.upstream.price_loading import load_prices

RouteT = TypeVar("RouteT", bound=CallRoute)

_CANCELLED: Final = CallOutcome(kind=Outcome.IGNORED, answered=False)  # bytes may have left: all settles as reserved
_ROUNDING: Final = 1.0  # seconds: a Retry-After is in whole ones
_POLL: Final = 0.5  # seconds, on average, between two requests of a throttled call for permission to retry


class Acquire(msgspec.Struct, frozen=True):
    """Wait for a permit. The reply is the `Permit`, or None; a rejection is thrown in as `Overloaded`.

    Attributes:
        account: gives the permit.
        request: the needs of the call.
        sole_account: no other account can serve the call.
        leave: asked now and then, with the seconds that are left to wait; if it returns True the call leaves the queue,
            and the reply is None. None: it waits for its permit.
    """

    account: ThreadSafeAccount
    request: CallRequest
    sole_account: bool
    leave: Callable[[float], bool] | None = None


class Send(msgspec.Struct, frozen=True):
    """Send one attempt. The reply is its `AttemptResult`.

    Attributes:
        route: where to send it.
        permit: held for the attempt; the flow releases it.
    """

    route: Any
    permit: Permit


class Release(msgspec.Struct, frozen=True):
    """Close a permit, which returns the reserved amounts that were not used. There is no reply."""

    account: ThreadSafeAccount
    permit: Permit
    outcome: CallOutcome


class Sleep(msgspec.Struct, frozen=True):
    """Wait `seconds`. There is no reply."""

    seconds: float


Step: TypeAlias = Acquire | Send | Release | Sleep
Flow: TypeAlias = Generator[Step, Any, AttemptResult]
_Backoff: TypeAlias = Generator[Step, Any, Permit | None]


class CallRunner:
    """Runs the calls of one upstream, with its retries and along the routes of its fallbacks.

    Args:
        core: of the upstream.
        resolver: finds the routes of its fallbacks.
    """

    __slots__ = ("core", "resolver")

    def __init__(self, core: UpstreamCore, resolver: FallbackResolver) -> None:
        self.core = core
        self.resolver = resolver

    async def load_prices(self) -> None:
        """Wait until the price list is loaded, if calls may need it; to call before a route is made."""
        if not is_price_list_loaded():
            await load_prices(self.core, may_fall_back=self.resolver.has_fallbacks)

    async def run(
        self, route: RouteT, send: Callable[[RouteT, Permit], Awaitable[AttemptResult]], *, retried: bool = True
    ) -> Any:
        """Make a call on the running event loop, and return its value.

        Args:
            route: of the call's own account.
            send: sends one attempt. It returns failures as results, and raises only what ends the call at once, such as
                a cancellation.
            retried: False makes at most one attempt at each account.

        Raises:
            Overloaded: the call was rejected.
            Exception: the error of the last attempt.
        """
        flow = call_flow(route, self.resolver, retried=retried)
        try:
            step = next(flow)
            while True:
                reply: Any = None
                try:
                    if isinstance(step, Send):
                        reply = await send(step.route, step.permit)
                    elif isinstance(step, Acquire):
                        reply = await step.account.acquire(
                            step.request, sole_account=step.sole_account, leave=step.leave
                        )
                    elif isinstance(step, Release):
                        step.account.settle(step.permit, step.outcome)
                    else:
                        await asyncio.sleep(step.seconds)
                except BaseException as raised:  # noqa: BLE001 - the flow decides
                    error = raised
                else:
                    step = flow.send(reply)
                    continue
                try:
                    step = flow.throw(error)
                finally:
                    del error  # its traceback holds this frame
        except StopIteration as end:
            return _unwrap_result(end.value)

    def run_blocking(
        self, route: RouteT, send: Callable[[RouteT, Permit], AttemptResult], *, retried: bool = True
    ) -> Any:
        """Make a call in a plain thread. See `run`."""
        flow = call_flow(route, self.resolver, retried=retried)
        try:
            step = next(flow)
            while True:
                reply: Any = None
                try:
                    if isinstance(step, Send):
                        reply = send(step.route, step.permit)
                    elif isinstance(step, Acquire):
                        reply = step.account.acquire_blocking(
                            step.request, sole_account=step.sole_account, leave=step.leave
                        )
                    elif isinstance(step, Release):
                        step.account.settle(step.permit, step.outcome)
                    else:
                        threading.Event().wait(step.seconds)
                except BaseException as raised:  # noqa: BLE001 - the flow decides
                    error = raised
                else:
                    step = flow.send(reply)
                    continue
                try:
                    step = flow.throw(error)
                finally:
                    del error  # its traceback holds this frame
        except StopIteration as end:
            return _unwrap_result(end.value)


def call_flow(own: CallRoute, resolver: FallbackResolver, *, retried: bool = True) -> Flow:
    """Return the flow of one call: a generator of its steps that returns the result for its caller.

    The call is tried at its own account first, unless a fallback's load threshold is reached, and then at the accounts
    of its upstream's fallbacks.

    Args:
        own: the call, prepared for its own account.
        resolver: finds the routes of the upstream's fallbacks.
        retried: False makes at most one attempt at each account.

    Raises:
        Overloaded: the call's own account rejected it, and no other served it; or all of them have rejected an earlier
            call of the same run.
    """
    chain = make_chain(own, resolver) if resolver.has_fallbacks else None
    if chain is None:
        return cast("Flow", _attempts(own, None, retried=retried))  # it cannot leave the queue, so there is a result
    return _chain_attempts(chain, retried=retried)


def _chain_attempts(chain: FallbackChain[Any], *, retried: bool) -> Flow:
    """Yield the steps of a call at one account after another, and return the result for its caller."""
    while (route := chain.next()) is not None:
        if (pause := chain.pause(route)) > 0.0:
            yield Sleep(pause)
        try:
            result = yield from _attempts(route, chain, retried=retried)
        except Overloaded as error:
            chain.record_rejection(route, error)
        else:
            if result is not None and chain.record_result(route, result):
                return result
    return chain.conclude()


def _attempts(
    route: CallRoute, chain: FallbackChain[Any] | None, *, retried: bool
) -> Generator[Step, Any, AttemptResult | None]:
    """Yield the steps of a call at one account, and return the result of the last attempt; None if it left the queue.

    Every permit is released, except that of an answer that is still streaming: its reader releases it.
    """
    account, request, retries = route.account, route.call_request, route.account.retries
    request.retried = retried
    permit: Permit | None = yield _acquire(route, chain)
    if retried and permit is not None:  # who calls again and again while nothing is sent must earn no retries
        retries.record_first_attempt()
    retrying: _Retrying | None = None
    while permit is not None:
        try:
            result: AttemptResult = yield Send(route, permit)
        except BaseException:
            if not permit.closed:
                yield Release(account, permit, _CANCELLED)
            raise
        _judge(chain, route, result)
        if retried and (result.streaming or result.outcome.kind is Outcome.SUCCESS):
            throttled_at, failed_at = (None, None) if retrying is None else retrying.withdrawn
            retries.record_accepted(permit.granted_at, throttled_at=throttled_at, failed_at=failed_at)
        if retried and result.retryable:
            retrying = retrying or _Retrying(route, chain)
            permit = yield from retrying.next_permit_in_time(permit, result)
            if permit is not None:
                continue
        elif not result.streaming:
            yield Release(account, permit, result.outcome)
        if result.can_fall_back and chain is None:  # otherwise the chain reports it
            _report_throttled(route)
        return result
    return None


def _acquire(route: CallRoute, chain: FallbackChain[Any] | None) -> Acquire:
    """Return the step that asks for the first permit at an account."""
    leave = None if chain is None else chain.leaves_queue(route)
    return Acquire(route.account, route.call_request, chain is None, leave)


def _judge(chain: FallbackChain[Any] | None, route: CallRoute, result: AttemptResult) -> None:
    """Correct a result where several accounts share the call. See `FallbackChain.judge`."""
    if chain is not None:
        chain.judge(route, result)


def _report_throttled(route: CallRoute) -> None:
    """Report to the run that is under way, if one is, that the provider throttled its call for good."""
    if (error := route.throttled_error()) is not None and (run := context.call_observer()) is not None:
        run.record_rejection(route.account, error)


class _Retrying:
    """The retries of one call at one account.

    Attributes:
        withdrawn: when the latest retry was taken from the budget of throttled calls, and from that of faults; None
            where it was not.
    """

    __slots__ = ("_acquire", "_chain", "_retries", "_route", "_state", "withdrawn")

    def __init__(self, route: CallRoute, chain: FallbackChain[Any] | None) -> None:
        self._route = route
        self._retries = route.account.retries
        self._chain = chain
        self._acquire = Acquire(route.account, route.call_request, chain is None)
        self._state = RetryState(self._retries.retry)
        self.withdrawn: tuple[float | None, float | None] = (None, None)

    def next_permit_in_time(self, permit: Permit, result: AttemptResult) -> _Backoff:
        """Return the permit of the next attempt; None to give up. See `next_permit`.

        A result after which no time was left for another attempt is marked. It is more use to the caller than the
        rejection of a retry for that reason, which says that nothing was started.

        Raises:
            Overloaded: the account rejects the retry for another reason.
        """
        try:
            retry = yield from self.next_permit(permit, result)
        except Overloaded as error:
            if not _is_out_of_time(error, self._route.call_request):
                raise
            retry, self._state.out_of_time = None, True
        if retry is None and self._state.out_of_time:
            self._route.mark_out_of_time(result)
        return retry

    def next_permit(self, permit: Permit, result: AttemptResult) -> _Backoff:
        """Release the permit of an attempt, wait, and return the permit of the next attempt; None to give up.

        A retry is given up at once if its Retry-After is not below the time to the call's deadline and what is left of
        `Retry.max_total_delay`. Only then is the attempt final, and counts for the breaker.

        Raises:
            Overloaded: the account rejects the retry.
        """
        account, request = self._route.account, self._route.call_request
        failed_at = clock.now()
        throttled = not result.uses_attempt
        believed = not account.disbelieves_retry_after(result.outcome)
        delay = self._retries.next_delay(
            self._state, result, now=failed_at, deadline=request.deadline, believed=believed
        )
        if delay is None:
            yield Release(account, permit, result.outcome)
            return None
        if self._chain is not None and self._chain.leaves_failed(self._route, delay):
            if not throttled:
                self._retries.refund_fault(failed_at)
            yield Release(account, permit, result.outcome)
            return None
        account.keep_place(request, failed_at + delay)  # before the release, which may send another call
        retry: Permit | None = None
        try:
            yield Release(account, permit, msgspec.structs.replace(result.outcome, final=False))
            if not (throttled and self._chain is not None and self._chain.skips_retry(self._route)):
                request.retries += 1
                request.failed = request.failed or not throttled
                self.withdrawn = (None, None)
                if throttled and self._waits_for_quota((result.retry_after or 0.0) if believed else 0.0):
                    retry = yield self._acquire  # its quota lets it go no earlier, and there it keeps its place
                else:
                    retry = yield from (self._wait_for_permission if throttled else self._wait)(delay, failed_at)
        except GeneratorExit:  # the call is collected, while any lock may be held: its place is lost by itself
            raise
        except BaseException:
            account.drop_place(request)
            raise
        if retry is None:
            account.drop_place(request)
        return retry

    def _waits_for_quota(self, retry_after: float) -> bool:
        """Return whether a throttled call waits for a quota in the queue, and not for a backoff."""
        request = self._route.call_request
        wanted = max(_ROUNDING, retry_after - _ROUNDING)
        return not request.is_suspect and self._route.account.quota_wait(request) >= wanted

    def _wait(self, delay: float, failed_at: float) -> _Backoff:
        """Wait `delay` seconds, and return a permit. A retry that is not sent goes back to the budget of faults."""
        try:
            yield Sleep(delay)
            permit: Permit = yield self._acquire
        except BaseException:
            self._retries.refund_fault(failed_at)
            raise
        self.withdrawn = (None, failed_at)
        return permit

    def _wait_for_permission(self, delay: float, throttled_at: float) -> _Backoff:
        """Wait until a throttled call (429, 503, 529) may be retried, and return a permit; None if that is too late."""
        permission, now = RetryPermission.DENIED, throttled_at
        try:
            yield Sleep(delay)
            while permission is RetryPermission.DENIED:
                now = clock.now()
                pause = _POLL * (0.5 + self._retries.draw())
                permission = self._retries.request_retry(now, throttled_at)
                if permission is RetryPermission.DENIED:
                    if not self._state.add_delay(pause, time_left=self._route.call_request.deadline - now):
                        return None
                    self._route.account.keep_place(self._route.call_request, now + pause)
                    yield Sleep(pause)
            permit: Permit = yield self._acquire
        except BaseException:
            self._retries.return_unused(permission, now)
            raise
        if permission is RetryPermission.FROM_BUDGET:
            self.withdrawn = (now, None)
        return permit


def _is_out_of_time(error: Overloaded, request: CallRequest) -> bool:
    """Return whether a call was rejected because its deadline has passed, or because it would not be answered by it."""
    return (error.limited_by or "").endswith(":deadline") or request.deadline <= clock.now()


def _unwrap_result(result: AttemptResult) -> Any:
    """Return the value of a call, or raise its error. A fault is reported to the run that is under way."""
    if result.outcome.kind is Outcome.FAULT and (run := context.call_observer()) is not None:
        run.record_upstream_fault()
    if result.error is not None:
        raise result.error
    return result.value
