"""The state that all calls of one upstream share: provider profile, accounts, money and retries."""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Sequence
from weakref import WeakSet

from forebay import clock, context
from forebay._fork import is_child, reset_in_child
from forebay.events import log
from forebay.interfaces import Charge
from forebay.quota import BilledUsage, Prices
from forebay.quota.prices import is_price_list_installed
from forebay.retry import Retry
from forebay.task import DEFAULT_TENANT, Deadline, Priority
from forebay.upstream.accepted_keys import AcceptedKeys
from forebay.upstream.accounts.account_registry import AccountRegistry
from forebay.upstream.accounts.spend import UpstreamBudgets
from forebay.upstream.accounts.usage_recorder import UsageRecorder
from forebay.upstream.call_request import UNBOUNDED, UNPRICED, UNREADABLE, Caller, CallPrice, CallRequest, Unmetered
from forebay.upstream.providers import profile_for
from forebay.upstream.shared.leases.lease import SETTLING
from forebay.upstream.shared.leases.link import LedgerLink
from forebay.upstream.stored_responses import BackgroundResponse, StoredResponses
from forebay.upstream.upstream_events import UpstreamEvents
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
        events: delivers its events; None: to supervisors only.
        link: to the ledgers of its accounts, which processes share; None: they are this process's.

    Attributes:
        profile: how the provider's API works.
        recorder: attributes the usage of calls; its table has that of all calls.
        accounts: the accounts, by API key and model group.
        accepted_keys: the API keys of a gateway's callers that may use the key of a fallback.
        background: stored responses whose usage comes later; the oldest stay paid as they were reserved.
        stored_tokens: the tokens of stored responses: a call that continues one sends as many unseen.
        unpriced_calls: number of calls whose price was not known.
        is_metered: a budget or a quota was given, so that calls must be readable.
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
        events: UpstreamEvents | None = None,
        link: LedgerLink | None = None,
    ) -> None:
        self.name = name
        self.provider = provider
        self.profile = profile_for(provider)
        self.settings = settings
        self.budgets = budgets
        self.events = events or UpstreamEvents(name)
        self.prices = prices
        self.retry = retry
        self.recorder = UsageRecorder(provider, prices)
        self.link = link
        if link is not None:  # what it holds is free for others as soon as nobody uses the upstream any more
            weakref.finalize(self, link.begin_close).atexit = False
        self.accounts = AccountRegistry(settings, budgets, retry, recorder=self.recorder, draw=clock.draw, link=link)
        self.accepted_keys = AcceptedKeys()
        self.background: StoredResponses[BackgroundResponse] = StoredResponses()
        self.stored_tokens: StoredResponses[int] = StoredResponses()
        self.unpriced_calls = 0
        self.is_metered = budgets.has_budgets or settings.has_quotas
        self._unpriced: set[str] = set()  # models, or reasons, that were warned about
        self._websocket_warned = False
        self._replaced: WeakSet[UpstreamCore] = WeakSet()  # members of the same ledgers, as long as they have calls
        self._has_own_limits = link is None and (self.is_metered or settings.max_concurrent is not None)
        self._lock = threading.Lock()
        reset_in_child(self)

    def reset_after_fork(self) -> None:
        """See `ForkAware`. The child has no calls under way, and what the parent has spent and learned counts on.

        Each process has the limits for itself from then on: nothing is shared between them.
        """
        self._lock = threading.Lock()
        self.budgets.reset_after_fork()
        self.events.reset_after_fork()
        self.recorder.table.reset_after_fork()
        self.accounts.reset_after_fork()
        self.accepted_keys.reset_after_fork()
        self.background = StoredResponses()  # the parent gets their usage
        self.stored_tokens.reset_after_fork()

    def adopt(self, old: UpstreamCore, *, accounts: bool) -> None:
        """Take over the state of an upstream that this one replaces, which has made its last call.

        What was spent stays spent, by the amounts and periods of this one's budgets. Calls in progress end as they are.

        Args:
            old: the upstream.
            accounts: its accounts too, if their limits are the same: it has the same provider and address.
        """
        if self.link is not None:  # the ledger knows what was spent, and this one is a new member of it
            self._replaced.update(old._replaced)
            self._replaced.add(old)
            self.link.settling_until = clock.now() + SETTLING
            for each in self._replaced:  # which go on with their calls by these limits
                self.accounts.change_leases(each.accounts)
                self.budgets.change_leases(each.budgets)
            self._adopt_answers(old, accounts=accounts)
            return
        had_budget = old.budgets.upstream_budget is not None
        keeps = accounts and had_budget == (self.budgets.upstream_budget is not None)  # accounts have a reference to it
        old.budgets.change_to(self.budgets)
        self.budgets = self.accounts.budgets = old.budgets
        self._adopt_answers(old, accounts=accounts)
        if keeps:
            self.accounts.adopt(old.accounts)

    def _adopt_answers(self, old: UpstreamCore, *, accounts: bool) -> None:
        """Take over what answers have told."""
        self.background, self.stored_tokens = old.background, old.stored_tokens
        self.unpriced_calls = old.unpriced_calls
        self.recorder.table = old.recorder.table
        if accounts:
            self.accepted_keys = old.accepted_keys

    def __repr__(self) -> str:
        return f"Upstream({self.name!r})"

    def request(  # noqa: PLR0913 - the facts about a call
        self,
        model: str,
        charge: Charge,
        *,
        free: bool = False,
        price: CallPrice | None = None,
        priority: Priority | None = None,
        deadline: Deadline | None = None,
        tenant: str | None = None,
    ) -> CallRequest:
        """Return the request of a call made here. Arguments left out come from the running task, if there is one.

        Args:
            model: the model of the call.
            charge: the requests and tokens that the call is expected to use.
            free: the call costs no money.
            price: of the call; None to find it by the model and the charge.
            priority: None for the task's, or NORMAL.
            deadline: None for the task's, or none.
            tenant: None for the task's, or ``"default"``.
        """
        running = context.running_task()
        task = None if running is None else running.task
        by = deadline if deadline is not None or running is None else running.deadline
        own = task is not None and tenant in (None, task.tenant)  # otherwise the weight of another tenant is not known
        caller = Caller(
            priority=priority if priority is not None else context.call_priority(running),
            deadline=math.inf if by is None else clock.now() + by.remaining(),
            tenant=tenant if tenant is not None else (DEFAULT_TENANT if task is None else task.tenant),
            task_id=None if task is None else task.task_id,
            weight=running.tenant_weight if running is not None and own else 1.0,
        )
        request = self.request_for(caller, model, charge, free=free, price=price)
        request.payer = context.usage_observer()
        if self.budgets.has_budgets and (run := context.call_observer()) is not None:
            self.events.add_receiver(run.event_receiver)
        return request

    def request_for(
        self, caller: Caller, model: str, charge: Charge, *, free: bool = False, price: CallPrice | None = None
    ) -> CallRequest:
        """Return the request of a call that is made for a caller."""
        if self._has_own_limits and is_child():
            self._warn_own_limits()
        if price is None:
            usage = BilledUsage(input_tokens=charge.input_tokens, output_tokens=charge.output_tokens)
            price = CallPrice() if free else self.price(model, usage)
        return CallRequest(
            charge=charge,
            usd=price.usd,
            usd_per_second=price.usd_per_second,
            usd_at_once=price.usd_at_once,
            bounded=price.bounded,
            unmetered=price.unmetered,
            priority=caller.priority,
            deadline=caller.deadline,
            tenant=caller.tenant,
            weight=caller.weight,
            task_id=caller.task_id,
            model=model,
            free=free,
            budgets=caller.budgets,
            key_name=caller.key_name,
        )

    def cost(
        self, model: str, usage: BilledUsage, *, answered_by: str = "", alternatives: Sequence[str] = ()
    ) -> float | None:
        """Return the dollars that a call costs: None if no price is known for some of it.

        Args:
            model: the model of the call.
            usage: of the call.
            answered_by: the model that has answered, by the answer; if it is dearer, that counts.
            alternatives: models that may have answered; if the answer tells none with a price, the dearest counts.
        """
        usd = self.prices.cost(self.provider, model, usage)
        if usd is None or answered_by == model:
            return usd
        answered = self.prices.cost(self.provider, answered_by, usage) if answered_by else None
        if answered is None:
            answered = max((self.prices.cost(self.provider, name, usage) or 0.0 for name in alternatives), default=0.0)
        return max(usd, answered)

    def price(  # noqa: PLR0913 - the facts about a call
        self,
        model: str,
        usage: BilledUsage,
        *,
        alternatives: Sequence[str] = (),
        per_second: BilledUsage | None = None,
        by_hand: bool = False,
        budgeted: bool = False,
    ) -> CallPrice:
        """Return the price of a call before it is sent.

        Args:
            model: the model of the call.
            usage: that it is expected to have at most.
            alternatives: models that may answer instead; the dearest counts.
            per_second: the output that can be made in one second, if it generates tokens.
            by_hand: its block may report its dollars, so that it passes without a price.
            budgeted: its caller has a budget.
        """
        if not (self.budgets.counts_dollars or budgeted):
            return CallPrice()
        dearest = rate = at_once = 0.0
        for name in (model, *alternatives):
            usd = self.prices.cost(self.provider, name, usage) if name or by_hand else None
            if usd is None:
                named = f"no price is known for model {name!r}: give the upstream prices=, or its target prices"
                if not is_price_list_installed():
                    named += ", or install the price list (pip install 'forebay[prices]')"
                reason = named if name else "it names no model, so that no price is known"
                allow = by_hand or not (self.budgets.has_budgets or budgeted)
                return self.unpriced_call(reason, name, allow=allow)
            dearest = max(dearest, usd)
            if per_second is None:
                at_once = max(at_once, usd)
            else:
                made = self.prices.cost(self.provider, name, per_second) or 0.0
                rate = max(rate, made)
                at_once = max(at_once, usd - made * usage.output_tokens / per_second.output_tokens)
        return CallPrice(dearest, rate, at_once)

    def count_unpriced(self, model: str) -> None:
        """Count and log a call of a model with a price that has used something that has none."""
        reason = f"no price is known for some of what calls of model {model!r} use"
        if self._is_first_unpriced(reason):
            log.warning("calls of %r count in its budget as they were reserved, because %s", self, reason)

    def unpriced_call(self, reason: str, model: str, *, allow: bool = False) -> CallPrice:
        """Return the price of a call whose price is not known: it is rejected, or counts as free and is logged."""
        first = self._is_first_unpriced(model or reason)
        if self.settings.refuses_unpriced and not allow:
            advice = "(unpriced='warn' lets such calls pass, counts them as free, and logs the first)"
            return CallPrice(
                unmetered=Unmetered(f"it cannot be counted in a budget, because {reason} {advice}", UNPRICED)
            )
        if first:
            log.warning("calls of %r count as free, because %s", self, reason)
        return CallPrice()

    def _is_first_unpriced(self, what: str) -> bool:
        """Count a call without a price, and return whether it is the first of its model or reason."""
        with self._lock:
            self.unpriced_calls += 1
            first = what not in self._unpriced and len(self._unpriced) < _WARNED
            if first:
                self._unpriced.add(what)
        return first

    def unreadable_call(self, reason: str) -> CallPrice | None:
        """Return the price of a call that cannot be read: it is rejected, or None if such calls pass."""
        if self.settings.unmetered == "allow":
            return None
        advice = "(unmetered='allow' lets such calls pass, and counts them as one request)"
        reason = f"it cannot be counted in a budget or a quota, because {reason} {advice}"
        return CallPrice(unmetered=Unmetered(reason, UNREADABLE))

    def unbounded_call(self, reason: str, advice: str) -> CallPrice:
        """Return the price of a call that may make any amount of output, and has a strict quota: it is rejected."""
        reason = f"it cannot be counted in a strict quota, because {reason}: {advice}"
        return CallPrice(unmetered=Unmetered(reason, UNBOUNDED))

    def _warn_own_limits(self) -> None:
        """Log, once, that the limits are those of this process, which is one of several."""
        with self._lock:
            warned, self._has_own_limits = not self._has_own_limits, False
        if not warned:
            log.warning(
                "the limits of %r hold for process %d alone, and each other process has as much again: give it"
                ' shared="sqlite:///account.db" in all of them to make the limits one',
                self,
                os.getpid(),
            )

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
