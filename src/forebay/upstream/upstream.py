"""Upstream: one shared dependency that can be overloaded, for everyone who uses it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import ParamSpec, TypeVar

from forebay import clock, context
from forebay._renamed import renamed_arguments
from forebay.breaker import BreakerRules
from forebay.errors import InvalidSetting
from forebay.events import log
from forebay.interfaces import Charge, Reading
from forebay.quota import Budget, Price, Prices, Quota
from forebay.retry import Retry
from forebay.task import Deadline, Priority
from forebay.upstream.account_registry import AccountRegistry, UpstreamBudgets, UpstreamSettings
from forebay.upstream.call import UpstreamCall
from forebay.upstream.call_drivers import CallDriver, UpstreamRetries
from forebay.upstream.call_request import CallRequest
from forebay.upstream.declared_upstream import DeclaredUpstream
from forebay.upstream.exchange import Caller
from forebay.upstream.fallback import Fallback, check_fallbacks, check_reachable
from forebay.upstream.fallback_routes import FallbackResolver
from forebay.upstream.guarded_function import guarded
from forebay.upstream.httpx_binding import bind_client
from forebay.upstream.providers import profile_for
from forebay.upstream.shared_account import SharedAccount
from forebay.upstream.upstream_settings import check_kind
from forebay.upstream.upstream_statistics import UpstreamStatistics, snapshot
from forebay.upstream.weak_lru import WeakLRU

P = ParamSpec("P")
T = TypeVar("T")
ClientT = TypeVar("ClientT")

_KEPT = 1_000  # models for which it is said that workers draw on it
_TOLD = 1_000  # models without a price that are warned of: callers of a gateway may name any


class Upstream:
    """A shared dependency: it owns the quotas, the money, the limit, the breaker and the retries for all its users.

    It works without a supervisor, and from threads and several event loops at once. Calls made inside a task carry the
    task's priority, deadline and tenant, and what they feel presses on the gate that lets tasks in.

    Args:
        name: how it is called in readings and refusals.
        provider: whose rules hold: ``"openai"``, ``"anthropic"``, ``"generic"``...
        models: quotas by pattern of model name, such as ``{"gpt-4o*": [Quota(requests=500, per="minute")]}``. Each
            pattern has an account of its own; so has a model that matches none, learned from headers.
        quotas: those of a dependency without models, or of models that match no pattern.
        budget: dollars that all calls together may spend.
        tenant_budget: dollars that each tenant may spend.
        task_budget: dollars that each task may spend.
        max_concurrent: calls in flight at most; None finds out how many it bears.
        retry: how failed calls are tried again.
        breaker: when it is left alone for a while.
        fallback: where calls go that it cannot serve; several are tried in order.
        longest_wait: seconds that a call may be expected to wait; beyond that it is refused.
        start_wait: seconds that the next call may be expected to wait for another run to begin; None: a quarter of a
            typical call.
        weights: tenants' shares of turns, by tenant; 1.0 where none is given.
        prices: of models that the price list does not know, or knows wrongly, by name.

    Raises:
        InvalidSetting: a setting cannot be meant.
    """

    @renamed_arguments(longest_wait="max_wait", start_wait="max_start_wait")
    def __init__(  # noqa: PLR0913 - every bound is set where a user can see it
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
        retry: Retry | None = None,
        breaker: BreakerRules | None = None,
        fallback: Fallback | Sequence[Fallback] | None = None,
        max_wait: float = 60.0,
        max_start_wait: float | None = None,
        weights: Mapping[str, float] | None = None,
        prices: Mapping[str, Price] | None = None,
    ) -> None:
        if not isinstance(name, str) or not name:
            raise InvalidSetting(owner="Upstream", name="name", value=name, expected="a non-empty string")
        for setting, given in {"budget": budget, "tenant_budget": tenant_budget, "task_budget": task_budget}.items():
            check_kind(f"Upstream {name!r}", setting, given, Budget, "Budget(usd=25, per='day')")
        check_kind(f"Upstream {name!r}", "retry", retry, Retry, "Retry(max_attempts=3)")
        self.name = name
        self.provider = provider
        self.profile = profile_for(provider)
        terms = UpstreamSettings(
            name,
            models=models,
            quotas=quotas,
            max_concurrent=max_concurrent,
            breaker=breaker,
            max_wait=max_wait,
            max_start_wait=max_start_wait,
            weights=weights,
        )
        self.fallbacks = check_fallbacks(self, fallback, terms.model_group)
        self.fallback_resolver = FallbackResolver(self)
        self._foretold: WeakLRU[str, DeclaredUpstream] = WeakLRU(_KEPT)
        self._money = UpstreamBudgets(name, budget, tenant_budget, task_budget)
        self.has_budgets = self._money.has_budgets
        self.accounts = AccountRegistry(terms, self._money, draw=clock.draw)
        self.retry = retry or Retry()
        self._retries = UpstreamRetries(self.retry, draw=clock.draw)
        self.prices = Prices(prices)
        self._unpriced: set[str] = set()
        self._unpriced_calls = 0
        self._unmetered_told = False
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Upstream({self.name!r})"

    # --- calls ---

    def call(  # noqa: PLR0913 - what a call may say of itself
        self,
        model: str = "",
        *,
        input_tokens: int = 0,
        output_tokens: int = 0,
        priority: Priority | None = None,
        deadline: Deadline | None = None,
        tenant: str | None = None,
    ) -> UpstreamCall:
        """One call, for what no transport is bound to: ``async with upstream.call("gpt-4o", ...) as call: ...``.

        Entering waits for a permit; in a plain thread, ``with`` does the same. What it used is told by
        ``call.settle(...)``; if it is not, what was expected counts as used. It is not retried. With a `fallback`,
        ``call.upstream`` and ``call.model`` say where to send it.

        Args:
            model: whose account it is of.
            input_tokens: tokens that it will send.
            output_tokens: tokens that it is expected to receive.
            priority: its rung; by default that of the task that runs here.
            deadline: when its answer becomes worthless; by default the task's.
            tenant: on whose behalf; by default the task's.

        Raises:
            Overloaded: on entering, if it is refused.
        """
        charge = Charge(input_tokens=input_tokens, output_tokens=output_tokens, tokens=input_tokens + output_tokens)

        def ask(upstream: Upstream, model: str) -> CallRequest:
            return upstream.request(model, charge, priority=priority, deadline=deadline, tenant=tenant)

        return UpstreamCall(self, model, ask)

    def guard(self, function: Callable[P, T]) -> Callable[P, T]:
        """Send each call of a function, async or plain, through this upstream.

        It is retried when it raises, as `retry` says: so it must bear being called twice. ``Overloaded`` is raised
        where the upstream refuses. One that the function itself raises is passed on, and is no fault.

        To be sent on to the upstream of a `fallback` it must take a keyword-only parameter ``upstream``: it is called
        with the one that it is to go to.

        Raises:
            NotGuardable: it is a generator function; or, when it is called, a plain function returns an awaitable.
        """
        return guarded(self, function)

    def bind(self, client: ClientT) -> ClientT:
        """A copy of an SDK client, a LangChain model or an httpx client, its calls through this upstream.

        Any client of OpenAI's and Anthropic's SDKs and their kin, of LangChain's models over these, of httpx and of
        httpx2, asynchronous or for plain threads. The copy keeps all that the client was given, and shares its
        connections: closing one closes both. Retries are the upstream's alone. Bound already, it is returned as it is.

        Raises:
            NotBindable: it is none of these; the gateway is the way for it.
            AlreadyBound: it is bound to another upstream.
            InvalidSetting: a fallback to another upstream does not say where that is, or as whom to call it.
        """
        check_reachable(self)
        return bind_client(self, client)

    def request(  # noqa: PLR0913 - what a call may say of itself
        self,
        model: str,
        charge: Charge,
        *,
        free: bool = False,
        priority: Priority | None = None,
        deadline: Deadline | None = None,
        tenant: str | None = None,
    ) -> CallRequest:
        """What a call asks, with what the task that runs here adds to it."""
        running = context.running_task()
        task = None if running is None else running.task
        by = deadline if deadline is not None or running is None else running.deadline
        return CallRequest(
            charge=charge,
            usd=self._expected(model, charge) if self.has_budgets and not free else 0.0,
            priority=priority if priority is not None else (Priority.NORMAL if task is None else task.priority),
            deadline=math.inf if by is None else clock.now() + by.remaining(),
            tenant=tenant if tenant is not None else ("default" if task is None else task.tenant),
            task_id=None if task is None else task.task_id,
            model=model,
            free=free,
        )

    def request_for(self, sender: Caller, model: str, charge: Charge, *, free: bool = False) -> CallRequest:
        """What a call asks that is made on behalf of somebody elsewhere."""
        return CallRequest(
            charge=charge,
            usd=self._expected(model, charge) if self.has_budgets and not free else 0.0,
            priority=sender.priority,
            deadline=sender.deadline,
            tenant=sender.tenant,
            task_id=sender.task_id,
            model=model,
            free=free,
        )

    def cost(self, model: str, charge: Charge, *, cached_tokens: int = 0) -> float:
        """What a call costs; 0.0 for a model whose price is not known.

        Args:
            model: what it is for.
            charge: what it uses.
            cached_tokens: of its input, those that came from the provider's cache.
        """
        return self._usd(model, charge, cached_tokens) or 0.0

    def _expected(self, model: str, charge: Charge) -> float:
        """What a call is expected to cost. One whose price is not known is counted, and its model warned of once."""
        usd = self._usd(model, charge)
        if usd is None and model:
            with self._lock:
                self._unpriced_calls += 1
                new = model not in self._unpriced and len(self._unpriced) < _TOLD
                if new:
                    self._unpriced.add(model)
            if new:
                told = "no price is known for model %r: its calls count as free; give %r prices=, or its target prices"
                log.warning(told, model, self)
        return usd or 0.0

    def _usd(self, model: str, charge: Charge, cached_tokens: int = 0) -> float | None:
        if not self.has_budgets:
            return 0.0
        return self.prices.usd(self.provider, model, charge.input_tokens, charge.output_tokens, cached_tokens)

    def warn_unmetered(self) -> None:
        """Say once that a WebSocket is neither paced nor counted."""
        with self._lock:
            told, self._unmetered_told = self._unmetered_told, True
        if not told:
            log.warning(
                "what goes over a WebSocket is not paced, counted or paid for by %r: call the model over HTTP, where"
                " answers stream too, or hold a permit by upstream.call(model, ...) for each answer and settle its use",
                self,
            )

    def driver(self, desk: SharedAccount, hurries: Callable[[], bool] | None = None) -> CallDriver:
        """What tries calls of one account, under the retries of this upstream. `hurries`: see `CallDriver`."""
        return CallDriver(desk, self._retries, hurries)

    def declared(self, model: str = "") -> DeclaredUpstream:
        """What a worker is said to draw on whose calls will be for `model`, or for any if that is not said."""
        return self._foretold.get(model, lambda model: DeclaredUpstream(self, model))

    # --- what can be read ---

    def readings(self) -> tuple[Reading, ...]:
        """One reading an account: the expected wait of its next typical call over the longest allowed."""
        return tuple(Reading(desk.name, desk.load()[0]) for desk in self.accounts)

    def statistics(self) -> UpstreamStatistics:
        """A snapshot."""
        return snapshot(self.name, self.accounts, self._money, unpriced=self._unpriced_calls)
