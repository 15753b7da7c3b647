"""The state that all calls of one upstream share: provider profile, accounts, money and retries."""

from __future__ import annotations

import math
import threading

from forebay import clock, context
from forebay.events import log
from forebay.interfaces import Charge
from forebay.quota import Prices
from forebay.retry import Retry
from forebay.task import Deadline, Priority
from forebay.upstream.accounts.account_registry import AccountRegistry
from forebay.upstream.accounts.spend import UpstreamBudgets
from forebay.upstream.call_request import Caller, CallRequest
from forebay.upstream.providers import profile_for
from forebay.upstream.upstream_settings import UpstreamSettings

_WARNED = 1_000  # unpriced models that are warned about: the callers of a gateway can name any model


class UpstreamCore:
    """The shared state of one upstream. `Upstream` is its public face.

    Args:
        name: the upstream's name, in readings and messages.
        provider: the provider whose API it is.
        settings: limits of its accounts.
        budgets: dollars that its calls may spend.
        prices: of its models.
        retry: of its calls.

    Attributes:
        profile: how the provider's API works.
        accounts: the accounts, by API key and model group.
    """

    def __init__(  # noqa: PLR0913 - the parts of an upstream
        self,
        name: str,
        provider: str,
        *,
        settings: UpstreamSettings,
        budgets: UpstreamBudgets,
        prices: Prices,
        retry: Retry,
    ) -> None:
        self.name = name
        self.provider = provider
        self.profile = profile_for(provider)
        self.settings = settings
        self.budgets = budgets
        self.prices = prices
        self.retry = retry
        self.accounts = AccountRegistry(settings, budgets, retry, draw=clock.draw)
        self.unpriced_calls = 0
        self._unpriced_models: set[str] = set()
        self._websocket_warned = False
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Upstream({self.name!r})"

    def request(  # noqa: PLR0913 - the facts about a call
        self,
        model: str,
        charge: Charge,
        *,
        free: bool = False,
        priority: Priority | None = None,
        deadline: Deadline | None = None,
        tenant: str | None = None,
    ) -> CallRequest:
        """Return the request of a call made here. Arguments left out come from the running task, if there is one.

        Args:
            model: the model of the call.
            charge: the requests and tokens that the call is expected to use.
            free: the call costs no money.
            priority: None for the task's, or NORMAL.
            deadline: None for the task's, or none.
            tenant: None for the task's, or ``"default"``.
        """
        running = context.running_task()
        task = None if running is None else running.task
        by = deadline if deadline is not None or running is None else running.deadline
        caller = Caller(
            priority=priority if priority is not None else (Priority.NORMAL if task is None else task.priority),
            deadline=math.inf if by is None else clock.now() + by.remaining(),
            tenant=tenant if tenant is not None else ("default" if task is None else task.tenant),
            task_id=None if task is None else task.task_id,
        )
        return self.request_for(caller, model, charge, free=free)

    def request_for(self, caller: Caller, model: str, charge: Charge, *, free: bool = False) -> CallRequest:
        """Return the request of a call that is made for a caller."""
        return CallRequest(
            charge=charge,
            usd=self._expected_cost(model, charge) if self.budgets.has_budgets and not free else 0.0,
            priority=caller.priority,
            deadline=caller.deadline,
            tenant=caller.tenant,
            task_id=caller.task_id,
            model=model,
            free=free,
        )

    def cost(self, model: str, charge: Charge, *, cached_tokens: int = 0) -> float:
        """Return the dollars that a call costs; 0.0 if the model's price is not known, or there are no budgets.

        Args:
            model: the model of the call.
            charge: the tokens that it used.
            cached_tokens: how many of its input tokens came from the provider's cache.
        """
        return self._price(model, charge, cached_tokens) or 0.0

    def _expected_cost(self, model: str, charge: Charge) -> float:
        """Return the dollars that a call may cost. Calls without a known price are counted, and logged once a model."""
        usd = self._price(model, charge)
        if usd is None and model:
            with self._lock:
                self.unpriced_calls += 1
                new = model not in self._unpriced_models and len(self._unpriced_models) < _WARNED
                if new:
                    self._unpriced_models.add(model)
            if new:
                message = (
                    "no price is known for model %r: its calls count as free; give %r prices=, or its target prices"
                )
                log.warning(message, model, self)
        return usd or 0.0

    def _price(self, model: str, charge: Charge, cached_tokens: int = 0) -> float | None:
        if not self.budgets.has_budgets:
            return 0.0
        return self.prices.usd(self.provider, model, charge.input_tokens, charge.output_tokens, cached_tokens)

    def warn_unmetered(self) -> None:
        """Log, once, that calls over a WebSocket are neither paced nor counted."""
        with self._lock:
            warned, self._websocket_warned = self._websocket_warned, True
        if not warned:
            log.warning(
                "calls over a WebSocket are not paced, counted or charged by %r: call the model over HTTP, where"
                " answers stream too, or hold a permit by upstream.call(model, ...) for each answer, and settle it",
                self,
            )
