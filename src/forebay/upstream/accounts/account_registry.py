"""The accounts of an upstream, by API key and model group."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from forebay import clock
from forebay._validate import reject
from forebay.breaker import Breaker
from forebay.events import log
from forebay.quota import Quota, RateLimiter
from forebay.quota.bucket import Bucket
from forebay.quota.rate_limiter import new_buckets, resize_buckets
from forebay.retry import Retry
from forebay.upstream.accounts.account import Account
from forebay.upstream.accounts.account_retries import AccountRetries
from forebay.upstream.accounts.guarded_limit import guarded_limit
from forebay.upstream.accounts.spend import UpstreamBudgets
from forebay.upstream.accounts.thread_safe_account import ThreadSafeAccount
from forebay.upstream.accounts.usage_recorder import UsageRecorder
from forebay.upstream.providers.credentials import digest_credential
from forebay.upstream.shared.leases.account_lease import AccountLease
from forebay.upstream.shared.leases.leased_breaker import LeasedBreaker
from forebay.upstream.shared.leases.link import LedgerLink
from forebay.upstream.shared.ledger.messages import LedgerTerms, QuotaTerms, ledger_key
from forebay.upstream.upstream_settings import UpstreamSettings
from forebay.upstream.weak_lru import WeakLRU

_CACHED: Final = 1_000  # accounts that nobody holds; those that a new one could replace go first
_MAX_LEVELS: Final = 131_072  # accounts whose given quotas are not full: none of them is forgotten
_KNOWN: Final = 1_000  # pairs of model and API key whose account is remembered


class _QuotaLevels:
    """The levels of the given quotas of one account. They outlive it."""

    __slots__ = ("__weakref__", "buckets")

    def __init__(self, buckets: Sequence[Bucket] = ()) -> None:
        self.buckets = buckets


_SHARED: Final = _QuotaLevels()  # of the accounts beyond the bound: they share one


class AccountRegistry:
    """Finds the account of a call, and opens it at its first call.

    Accounts are dropped when too many are open, and what they have learned with them; first those that a new one could
    replace. What is left of the quotas that were given is not: it is kept until they are full again. When too many wait
    for that, further keys and models share an account, so that no list of junk keys or models refills a quota.

    Args:
        settings: of the upstream.
        budgets: that its calls spend from.
        retry: of its calls.
        recorder: is told what its calls have used.
        draw: returns random numbers from [0, 1).
        link: to the ledgers of the accounts, for all processes that share them; None: they are this process's.
    """

    def __init__(  # noqa: PLR0913 - what accounts are made of
        self,
        settings: UpstreamSettings,
        budgets: UpstreamBudgets,
        retry: Retry,
        *,
        recorder: UsageRecorder,
        draw: Callable[[], float],
        link: LedgerLink | None = None,
    ) -> None:
        self.settings = settings
        self.budgets = budgets
        self._retry = retry
        self._recorder = recorder
        self._draw = draw
        self._link = link
        self._accounts: WeakLRU[tuple[str, str], ThreadSafeAccount] = WeakLRU(
            _CACHED, expendable=lambda _, account: account.is_expendable()
        )
        self._levels: WeakLRU[tuple[str, str], _QuotaLevels] = WeakLRU(
            _MAX_LEVELS, expendable=self._is_expendable, overflow=lambda _: _SHARED
        )
        self._shared: dict[str, ThreadSafeAccount] = {}  # by model group: of keys beyond `_MAX_LEVELS`
        self._unopened: dict[str, ThreadSafeAccount] = {}  # by model group: how an account would look at its first call
        self._suspended_until: dict[str, float] = {}  # by digest of an API key whose money is spent
        self._known: dict[tuple[str, str], tuple[str, str]] = {}  # so that calls need not hash and match patterns
        self._limit_place: tuple[str, str] | None = None  # the account that has the limit that was given as an object

    def __iter__(self) -> Iterator[ThreadSafeAccount]:
        return iter(dict.fromkeys(self._accounts.values()))  # a shared one has several keys

    def account(self, model: str, key: str = "") -> ThreadSafeAccount:
        """Return the account of `model` under an API key, as a header has it, of which only a digest is kept.

        Raises:
            InvalidSetting: the upstream's `limit` is one object, and another account has it.
        """
        place = self._known.get((model, key)) or self._place(model, key)
        return self._accounts.get(place, self._open)

    def adopt(self, old: AccountRegistry) -> None:
        """Take over the accounts of a registry that this one replaces, if their limits are the same.

        Other accounts start empty, but what was used of a given quota stays used. Calls in progress end as they are.
        """
        now = clock.now()
        self._suspended_until.update(old._suspended_until)
        for place, levels in old._levels.items():
            before, quotas = old._quotas(place), self._quotas(place)
            if self._is_group(place[1]) and quotas and levels is not _SHARED:
                if tuple(before) != tuple(quotas):
                    levels = _QuotaLevels(resize_buckets(now, before, levels.buckets, quotas))  # noqa: PLW2901
                self._levels.get(place, lambda _, kept=levels: kept)  # type: ignore[misc]
        for place, account in old._accounts.items():
            if self._has_limits_of(old, place):
                self._accounts.get(place, lambda _, kept=account: kept)  # type: ignore[misc]
                account.move(functools.partial(self._suspend_key, place[0]), self._retry)
        self._shared.update(
            (group, each) for group, each in old._shared.items() if self._has_limits_of(old, ("others", group))
        )

    def change_leases(self, old: AccountRegistry) -> None:
        """Let the leases of accounts that these replace have the limits of these, for the calls that they have yet."""
        now = clock.now()
        for place in [place for place, _ in old._accounts.items() if self._is_group(place[1])]:
            if (lease := old._lease(place)) is not None:
                with lease.lock:
                    lease.change_terms(now, self._terms(place))

    def _is_group(self, group: str) -> bool:
        """Return whether there are accounts of that model group."""
        return group in self.settings.models or self.settings.model_group(group) == group

    def _has_limits_of(self, old: AccountRegistry, place: tuple[str, str]) -> bool:
        """Return whether an account has the same limits here as in another registry."""
        mark, group = place
        return (
            self._is_group(group)
            and tuple(old._quotas(place)) == tuple(self._quotas(place))
            and old.settings.limits_of_key(mark) == self.settings.limits_of_key(mark)
            and old.settings.is_like(self.settings)
        )

    def accounts_of(self, model: str) -> Sequence[ThreadSafeAccount]:
        """Return the open accounts of `model`, or of all models if it is empty; if there are none, an unopened one."""
        group = self.settings.model_group(model) if model else ""
        found = [account for (_, other), account in self._accounts.items() if other == group or not model]
        if not found:
            if len(self._unopened) >= _CACHED:
                self._unopened = {}
            found = [self._unopened.get(group) or self._unopened.setdefault(group, self._make(("", group)))]
        return found

    def reset_after_fork(self) -> None:
        """See `ForkAware`."""
        self._accounts.reset_after_fork()
        for account in (*self._accounts.values(), *self._shared.values(), *self._unopened.values()):
            account.reset_after_fork()

    def _accounts_of_key(self, mark: str) -> Sequence[ThreadSafeAccount]:
        """Return the open accounts of an API key, given its digest."""
        return [account for (other, _), account in self._accounts.items() if other == mark]

    def _suspend_key(self, mark: str, seconds: float, since: float, account: ThreadSafeAccount) -> None:
        """Suspend all accounts of an API key: a provider has told one of them that the key's money is spent."""
        now, suspended = clock.now(), self._suspended_until
        if len(suspended) >= _KNOWN:
            self._suspended_until = suspended = {key: until for key, until in suspended.items() if until > now}
            if len(suspended) >= _KNOWN:  # that key tries each model that it did not call before once
                del suspended[next(iter(suspended))]
        suspended[mark] = now + seconds
        for each in {account, *self._accounts_of_key(mark)}:
            each.suspend_alone(seconds, since=since)

    def _continue_suspension(self, mark: str, account: ThreadSafeAccount) -> None:
        """Suspend an account that is opened while its API key is suspended."""
        seconds = self._suspended_until.get(mark, 0.0) - clock.now()
        if seconds > 0.0:
            account.suspend_alone(seconds)

    def _place(self, model: str, key: str) -> tuple[str, str]:
        place = (digest_credential(key), self.settings.model_group(model))
        if len(self._known) >= _KNOWN:
            self._known = {}
        self._known[model, key] = place
        return place

    def _open(self, place: tuple[str, str]) -> ThreadSafeAccount:
        lease = self._lease(place)
        levels = self._levels.get(place, self._new_levels) if self._quotas(place) and lease is None else None
        if levels is _SHARED:
            return self._shared_account(place[1])
        account = self._make(place, levels, lease)
        self._continue_suspension(place[0], account)
        if (single := self.settings.single_limit) is not None:
            if self._limit_place not in (None, place):
                expected = (
                    "a callable, such as VegasLimit: another API key has an account, and each needs its own limit"
                )
                reject(f"Upstream {self.settings.name!r}", "limit", single, expected)
            self._limit_place = place
        return account

    def _shared_account(self, group: str) -> ThreadSafeAccount:
        """Return the account that the keys beyond the bound of the table share."""
        if group not in self._shared:
            log.warning(
                "more than %d keys and models use quotas of %r: others share one", _MAX_LEVELS, self.settings.name
            )
            self._shared[group] = self._make(("others", group))
        return self._shared[group]

    def _quotas(self, place: tuple[str, str]) -> Sequence[Quota]:
        return self.settings.quotas_of(*place)

    def _lease(self, place: tuple[str, str]) -> AccountLease | None:
        """Return the lease on the ledger of an account; None if processes do not share it."""
        link = self._link
        if link is None:
            return None
        key = ledger_key("account", self.settings.name, *place)
        lease = link.lease(key, lambda: AccountLease(link, key, self._terms(place)))
        assert isinstance(lease, AccountLease)  # noqa: S101 - the key is that of an account
        return lease

    def _terms(self, place: tuple[str, str]) -> LedgerTerms:
        """Return the settings of the ledger of an account."""
        settings = self.settings
        of_key = settings.limits_of_key(place[0])
        own = None if of_key is None else of_key.max_concurrent
        most = settings.max_concurrent if own is None else own
        return LedgerTerms(
            quotas=tuple(
                sorted(
                    (QuotaTerms(quota.counted, quota.amount, quota.seconds) for quota in self._quotas(place)),
                    key=lambda quota: (quota.unit, quota.seconds, quota.amount),
                )
            ),
            max_concurrent=most,
            limit=settings.limit_kind if most is None else None,
            breaker=settings.breaker.summary,
        )

    def _new_levels(self, place: tuple[str, str]) -> _QuotaLevels:
        return _QuotaLevels(new_buckets(self._quotas(place)))

    def _is_expendable(self, place: tuple[str, str], levels: _QuotaLevels) -> bool:
        """Return whether levels may be forgotten: they are full, and no account uses them."""
        now = clock.now()
        return all(bucket.is_full(now) for bucket in levels.buckets) and not self._accounts.holds(place)

    def _make(
        self, place: tuple[str, str], levels: _QuotaLevels | None = None, lease: AccountLease | None = None
    ) -> ThreadSafeAccount:
        mark, group = place
        settings = self.settings
        recorder = self.budgets.recorder(settings.label_of(mark))
        quotas = self._quotas(place)
        buckets = None if levels is None else levels.buckets
        if lease is not None:
            buckets = [lease.bucket(quota.counted, quota.amount, quota.seconds) for quota in quotas]

        def open_account() -> Account:
            limit = guarded_limit(settings.new_limit(mark))
            limiter = RateLimiter(quotas, buckets=buckets)
            return Account(
                ":".join(part for part in (f"upstream:{settings.name}", settings.label_of(mark), group) if part),
                limit=limit if lease is None else lease.bind_limit(limit),
                quotas=limiter if lease is None else lease.observed.bind(limiter),
                breaker=(Breaker if lease is None else LeasedBreaker)(settings.breaker, draw=self._draw),
                budgets=self.budgets.for_request,
                upstream_budget=self.budgets.upstream_budget,
                max_wait=settings.max_wait,
                weights=settings.weights,
                has_key=bool(mark),
                lease=lease,
                money_wait=None if self._link is None else self.budgets.lease_wait,
                draw=self._draw,
                record=None if recorder is None else recorder.begin,
            )

        return ThreadSafeAccount(
            open_account,
            upstream=settings.name,
            retries=AccountRetries(self._retry, draw=self._draw),
            recorder=self._recorder,
            key=settings.label_of(mark),
            suspend_key=functools.partial(self._suspend_key, mark),
            max_start_wait=settings.max_start_wait,
            lease=lease,
            link=self._link,
        )
