"""Upstream: a shared dependency that can be overloaded, such as a provider's account."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Literal, ParamSpec, TypeVar

from forebay._renamed import renamed_arguments
from forebay._validate import check_instance, check_name, check_tokens, reject
from forebay.breaker import BreakerRules
from forebay.events import Event
from forebay.interfaces import Charge, Reading
from forebay.limit import Limit
from forebay.quota import BilledUsage, Budget, Price, Prices, Quota
from forebay.retry import Retry
from forebay.spend_log import SpendLog
from forebay.task import Deadline, Priority
from forebay.upstream.accounts.spend import UpstreamBudgets
from forebay.upstream.call import UpstreamCall
from forebay.upstream.call_flow import CallRunner
from forebay.upstream.call_request import AttemptResult, CallRequest, Permit
from forebay.upstream.core import UpstreamCore
from forebay.upstream.declared_upstream import DeclaredUpstream
from forebay.upstream.fallbacks.fallback import Fallback, check_fallbacks, check_reachable
from forebay.upstream.fallbacks.fallback_routes import FallbackResolver
from forebay.upstream.guarded_function import guarded
from forebay.upstream.http_call import HttpCall, HttpRequest, HttpResponse
from forebay.upstream.httpx_binding import bind_client
from forebay.upstream.provider_key_limits import ProviderKeyLimits
from forebay.upstream.shared.leases.link import LedgerLink
from forebay.upstream.shared.stores.open_store import open_ledger_store
from forebay.upstream.shared.stores.store import LedgerStore
from forebay.upstream.upstream_events import UpstreamEvents
from forebay.upstream.upstream_settings import UpstreamSettings
from forebay.upstream.upstream_statistics import UpstreamStatistics, snapshot
from forebay.upstream.weak_lru import WeakLRU

P = ParamSpec("P")
T = TypeVar("T")
ClientT = TypeVar("ClientT")

_CACHED = 1_000  # load sources of models that workers declare


class Upstream:
    """A shared dependency. It owns the quotas, the money, the limit, the breaker and the retries of all its users.

    It works without a supervisor, from threads, and from several event loops at once. Calls made inside a task carry
    the task's priority, deadline and tenant, and their wait counts in the load by which the supervisor admits tasks.

    Limits you leave out are learned from rate-limit headers and 429s.

    Args:
        name: its name in readings and messages.
        provider: the provider whose API it is: ``"openai"``, ``"anthropic"``, ``"generic"``...
        models: quotas by pattern of model name, such as ``{"gpt-4o*": [Quota(requests=500, per="minute")]}``. Each
            pattern has an account of its own; so has each model that matches none, and each model if there are no
            patterns. Then `quotas`, `max_concurrent` and a `limit` object hold for all models together, as one account.
        quotas: of a dependency without models, of all models together, or of each model that matches no pattern.
        budget: dollars that all calls together may spend.
        tenant_budget: dollars that each tenant may spend.
        task_budget: dollars that each task may spend.
        max_concurrent: calls in flight at most; None learns how many the provider can take.
        limit: the limit of calls in flight, instead of `max_concurrent`: a `Limit`, such as ``VegasLimit()``, for an
            upstream with a single account (no `models`, one API key); or a callable that makes one for each account,
            such as ``VegasLimit``.
        retry: the retries of failed calls.
        breaker: the rules by which a failing provider is sent no calls for a while.
        fallback: another model or upstream for calls that this one cannot serve; several are tried in order.
        max_wait: seconds of expected wait above which a call is rejected; none waits for more than 1.5 times as long.
        max_start_wait: seconds of expected wait for the next call up to which another run may start; None for a quarter
            of a typical call.
        weights: tenants' shares of turns. A tenant that is not named has the weight that the supervisor of the calling
            task gives it (``tenants=``), or 1.0.
        prices: by model, of those that the price list lacks or has wrong.
        unmetered: what happens to calls that a budget or a quota cannot count, because their body cannot be read:
            ``"reject"``, or ``"allow"``, and they count as one request that is free.
        unpriced: what happens to calls whose price a budget does not know: ``"refuse"``, or ``"warn"``: they count
            as free, and are logged once for each model or reason. While the budget is spent, no
            call passes, whatever its price. None: ``"refuse"``, unless `unmetered` is ``"allow"``.
        spend_log: the file that keeps what calls have cost, such as ``"sqlite:///spend.db"``: budgets go on after a
            restart with what is spent. Several upstreams may share a `SpendLog`. None: a restart begins at zero.
        on_event: called with each `Event` of the upstream, such as a `BudgetAlert`, in a turn of its own of the event
            loop or in a thread: a plain function that does not block. Supervisors whose tasks call the upstream have
            these events too.
        shared: the store that makes quotas, the limit of calls in flight, budgets, the breaker and pauses after a 429
            one for all processes that name it, such as ``"sqlite:///account.db"``; None: they hold for this process
            alone. Learned rates are each process's own.
        key_limits: limits of particular API keys, by key, and the name that stands for each; other keys have `quotas`
            and `max_concurrent`.

    Attributes:
        core: its accounts, money and retries, for those who extend Forebay.
        runner: runs its calls, for those who extend Forebay.
        spend_log: its open spend log, or None.

    Raises:
        InvalidSetting: a setting is invalid.
        InvalidSpendLogUrl: `spend_log` is neither a `SpendLog` nor its URL.
        StoreUnavailable: the spend log cannot be opened; the message says why and what to do.
    """

    @renamed_arguments(longest_wait="max_wait", start_wait="max_start_wait")
    def __init__(  # noqa: PLR0913 - every bound is a setting that a user can see
        self,
        name: str,
        *,
        provider: str = "generic",
        models: Mapping[str, Sequence[Quota]] | None = None,
        quotas: Sequence[Quota] = (),
        budget: Budget | None = None,
        tenant_budget: Budget | None = None,
        task_budget: Budget | None = None,
        max_concurrent: int | None = None,
        limit: Limit | Callable[[], Limit] | None = None,
        retry: Retry | None = None,
        breaker: BreakerRules | None = None,
        fallback: Fallback | Sequence[Fallback] | None = None,
        max_wait: float = 60.0,
        max_start_wait: float | None = None,
        weights: Mapping[str, float] | None = None,
        prices: Mapping[str, Price] | None = None,
        unmetered: Literal["reject", "allow"] = "reject",
        unpriced: Literal["warn", "refuse"] | None = None,
        spend_log: SpendLog | str | None = None,
        on_event: Callable[[Event], object] | None = None,
        shared: str | LedgerStore | None = None,
        key_limits: Mapping[str, ProviderKeyLimits] | None = None,
    ) -> None:
        check_name("Upstream", "name", name)
        owner = f"Upstream {name!r}"
        for setting, given in {"budget": budget, "tenant_budget": tenant_budget, "task_budget": task_budget}.items():
            check_instance(owner, setting, given, Budget, example="Budget(usd=25, per='day')", optional=True)
        check_instance(owner, "retry", retry, Retry, example="Retry(max_attempts=3)", optional=True)
        if retry is not None and retry.on is not Exception:
            expected = "a Retry without `on`: an upstream itself knows which errors of its calls are worth a retry"
            reject(owner, "retry", retry, expected)
        settings = UpstreamSettings(
            name,
            models=models,
            quotas=quotas,
            max_concurrent=max_concurrent,
            limit=limit,
            breaker=breaker,
            max_wait=max_wait,
            max_start_wait=max_start_wait,
            weights=weights,
            unmetered=unmetered,
            unpriced=unpriced,
            key_limits=key_limits,
        )
        link = None if shared is None else LedgerLink(open_ledger_store(owner, shared), name)
        self.name = name
        self.provider = provider
        if on_event is not None and not callable(on_event):
            reject(owner, "on_event", on_event, "a plain function that takes an event, or None")
        events = UpstreamEvents(name, on_event)
        self.spend_log = _open_spend_log(spend_log)
        self.core = UpstreamCore(
            name,
            provider,
            settings=settings,
            budgets=UpstreamBudgets(
                name, budget, tenant_budget, task_budget, spend_log=self.spend_log, on_alert=events.emit, link=link
            ),
            prices=Prices(prices),
            retry=retry or Retry(),
            events=events,
            link=link,
        )
        self.fallbacks = check_fallbacks(self.core, fallback)
        self.runner = CallRunner(self.core, FallbackResolver(self))
        self._declared: WeakLRU[str, DeclaredUpstream] = WeakLRU(_CACHED)

    def __repr__(self) -> str:
        return f"Upstream({self.name!r})"

    # --- calls ---

    def bind(self, client: ClientT) -> ClientT:
        """Return a copy of an SDK client, a LangChain model or an httpx client, whose calls go through this upstream.

        It takes any client of OpenAI's and Anthropic's SDKs and their kin, of LangChain's models over these and what
        ``bind_tools`` and ``with_structured_output`` make of them, of AutoGen's model clients over these, of httpx and
        of httpx2, asynchronous or not. The copy keeps all settings of the client, and shares its connections: closing
        one closes both. Only the upstream retries. A client that is bound already is returned as it is. A stream that
        is not read for half a minute is closed if calls wait for its slot.

        Raises:
            NotBindable: it is another kind of client, or a LangChain model ``with_retry``: the message says what to do.
            AlreadyBound: it is bound to another upstream.
            InvalidSetting: a fallback to another upstream has neither an address nor a key.
        """
        check_reachable(self)
        return bind_client(self.core, self.runner, client)

    def guard(self, function: Callable[P, T]) -> Callable[P, T]:
        """Return a function with each call sent through this upstream; it may be async or not.

        A LangChain tool that is made from a function stays a tool.

        A call is retried when the function raises, as `retry` says, so calling it twice must be harmless. The upstream
        raises ``Overloaded`` where it rejects a call. An ``Overloaded`` of the function itself is passed on, and does
        not count as a fault. An exception that reports an answer, as those of SDKs and HTTP libraries do
        (``status_code``, ``response``, also of the exception that it was raised from), counts as that answer: a 429 or
        503 as throttled, a 400 as the caller's mistake, which is not retried. A timeout counts as a fault only if the
        silence is unusual. Every other exception is a fault.

        To follow a `fallback` to another upstream the function must take a keyword-only parameter ``upstream``: it is
        called with the upstream to use.

        Raises:
            NotGuardable: it is a generator function, a class, not callable, a tool that is not made from a function, or
                one that would lose what it is by that; or, when called, a plain function returns an awaitable.
        """
        return guarded(self, self.runner, function)

    def call(  # noqa: PLR0913 - the facts about a call
        self,
        model: str = "",
        *,
        input_tokens: int = 0,
        output_tokens: int = 0,
        priority: Priority | None = None,
        deadline: Deadline | None = None,
        tenant: str | None = None,
    ) -> UpstreamCall:
        """Return one call, for clients that cannot be bound: ``async with upstream.call("gpt-4o", ...) as call: ...``.

        Entering waits for a permit; in a plain thread use ``with``. Report the usage by ``call.settle(...)``; otherwise
        the expected tokens count as used. It is not retried. With a `fallback`, send it to ``call.upstream`` and
        ``call.model``.

        Args:
            model: the model of the call.
            input_tokens: tokens that it will send.
            output_tokens: tokens that it is expected to receive; for a strict quota the most that it may receive.
            priority: None for that of the task that is running.
            deadline: the time when its answer becomes worthless; None for the task's.
            tenant: the tenant that it is for; None for the task's.

        Raises:
            InvalidSetting: a number of tokens is invalid.
            Overloaded: on entering, if it is rejected.
        """
        sent, received = check_tokens("call", input_tokens, output_tokens)
        charge = Charge(input_tokens=sent, output_tokens=received, tokens=sent + received)

        def request_at(core: UpstreamCore, model: str) -> CallRequest:
            usage = BilledUsage(input_tokens=sent, output_tokens=received)
            price = core.price(model, usage, by_hand=True)
            return core.request(model, charge, price=price, priority=priority, deadline=deadline, tenant=tenant)

        return UpstreamCall(self, self.runner, model, request_at)

    async def send(
        self, request: HttpRequest, transport: Callable[[HttpRequest], Awaitable[HttpResponse]]
    ) -> HttpResponse:
        """Send an HTTP request with a client of your own; retries, fallbacks and metering are the upstream's.

        Args:
            request: the request. Its needs are estimated from its body, as for a bound client.
            transport: sends it once, and returns the answer, whatever its status. It is called again for a retry, and
                with another URL, key and model for a fallback. An exception that it raises is a fault of the provider,
                unless it reports an answer, or is a timeout: see `guard`.

        Returns:
            The answer to the last attempt.

        Raises:
            Overloaded: the call was rejected.
            InvalidSetting: a fallback to another upstream has neither an address nor a key.
            Exception: the exception of `transport` at the last attempt.
        """
        check_reachable(self)

        async def attempt(call: HttpCall, permit: Permit) -> AttemptResult:
            try:
                return call.answered(permit, await transport(call.request))
            except Exception as error:  # noqa: BLE001 - raised by the flow if it is the last attempt
                return call.failed(permit, error)

        await self.runner.load_prices()
        response: HttpResponse = await self.runner.run(HttpCall(self.core, request), attempt)
        return response

    def send_blocking(self, request: HttpRequest, transport: Callable[[HttpRequest], HttpResponse]) -> HttpResponse:
        """Send an HTTP request with a client of your own, in a plain thread. See `send`."""
        check_reachable(self)

        def attempt(call: HttpCall, permit: Permit) -> AttemptResult:
            try:
                return call.answered(permit, transport(call.request))
            except Exception as error:  # noqa: BLE001 - raised by the flow if it is the last attempt
                return call.failed(permit, error)

        response: HttpResponse = self.runner.run_blocking(HttpCall(self.core, request), attempt)
        return response

    # --- load and statistics ---

    def declared(self, model: str = "") -> DeclaredUpstream:
        """Return the load source of a worker that will call `model`, or any model if it is empty."""
        return self._declared.get(model, lambda model: DeclaredUpstream(self.core, self.runner.resolver, model))

    def readings(self) -> tuple[Reading, ...]:
        """Return the load of each account: the expected wait of its next typical call over the longest allowed."""
        return tuple(Reading(account.name, account.load()[0]) for account in self.core.accounts)

    def statistics(self) -> UpstreamStatistics:
        """Return a snapshot of the statistics.

        What all processes have spent of a shared budget is as the store told it last, which is asked again if that was
        more than a second ago. Its first answer is waited for, for a second at most, unless an event loop is running in
        this thread: then ``spent_usd`` is None until it has come.
        """
        return snapshot(self.core)


def _open_spend_log(spend_log: SpendLog | str | None) -> SpendLog | None:
    """Return an open spend log.

    Raises:
        InvalidSpendLogUrl: it is neither a spend log nor the URL of one.
        StoreUnavailable: it cannot be opened.
    """
    if spend_log is None:
        return None
    opened = spend_log if isinstance(spend_log, SpendLog) else SpendLog(spend_log)
    opened.open()
    return opened
