"""The settings of a gateway, typed and checked. `docs/gateway.md` has them as a table."""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal, NoReturn

import msgspec
from msgspec import field

from forebay._validate import is_number, is_positive, is_whole, reject
from forebay.errors import InvalidSetting, InvalidSpendLogUrl
from forebay.events import Event
from forebay.gateway.address import Address, parse_address, url_problem
from forebay.gateway.callers.key_file import InvalidKeysUrl, parse_keys_url
from forebay.gateway.secret import read_api_key, read_provider_key, read_token
from forebay.quota import Budget, Price, Prices, Quota
from forebay.retry import Retry
from forebay.spend_log import SpendLog, parse_spend_log
from forebay.storage.shown_url import shown_url
from forebay.upstream import Fallback, ProviderKeyLimits, Upstream
from forebay.upstream.providers import profile_for

Trust = Literal["anyone", "token", "nobody"]
AccessLogKind = Literal["text", "json", "off"]
PriorityName = Literal["critical", "high", "normal", "low"]

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")  # it appears in paths, metrics and on the command line
_HEADER: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}")  # RFC 9110, a field name
_SECRET_HEADERS: Final = frozenset({"authorization", "proxy-authorization", "x-api-key", "api-key", "cookie"})
_PASSWORD: Final = re.compile(r"://[^/?#]*@")
_NO_SPEND_LOG: Final = "none"
_TENANT: Final = re.compile(r"[ -~]{1,256}")  # others do not arrive in a header as they are written here
_TENANT_NAMES: Final = "1 to 256 printable characters of ASCII, as a header has them"
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KEY_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_WILDCARD: Final = re.compile(r"[*?\[]")
_MAX_NAME: Final = 256  # characters of a model's name
_UNKNOWN_SERVER: Final = "openai-compatible"
STDOUT: Final = "stdout"
STDERR: Final = "stderr"
OTHER_TENANTS: Final = "*"
"""The name of the limits that hold for each tenant without limits of its own."""


class _Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings that people write, so that no value is taken for granted, not even its type."""

    def _reject(self, name: str, expected: str, *, value: object = ...) -> NoReturn:
        """Reject a setting.

        Args:
            name: of the setting.
            expected: what it must be, after "it must be".
            value: of the setting, if it is not the attribute of that name, or must not be shown.

        Raises:
            InvalidSetting: always.
        """
        reject(type(self).__name__, name, getattr(self, name) if value is ... else value, expected)

    def _check_whole(self, *names: str, optional: bool = False) -> None:
        for name in names:
            value = getattr(self, name)
            if not is_whole(value) and not (optional and value is None):
                self._reject(name, "a whole number of at least 1")

    def _check_positive(self, *names: str, unit: str, optional: bool = False) -> None:
        for name in names:
            value = getattr(self, name)
            if not is_positive(value) and not (optional and value is None):
                self._reject(name, f"a positive number of {unit}")

    def _check_variable(self, name: str) -> None:
        """Check the name of an environment variable, if there is one. It is shown, so it must not be a key itself."""
        value = getattr(self, name)
        if value is not None and not _VARIABLE.fullmatch(value):
            expected = "the name of an environment variable (letters, digits and _), not the key itself"
            self._reject(name, expected, value="***")


class QuotaSettings(_Settings, frozen=True, kw_only=True):
    """Rate limits per minute; those left out are learned from rate-limit headers and 429s.

    Attributes:
        rpm: requests.
        input_tpm: LLM tokens sent.
        output_tpm: LLM tokens received.
        tpm: LLM tokens sent and received together, as some providers count.
        strict: `output_tpm` and `tpm` are never passed: each call reserves the most output that it may make, its
            ``max_tokens``, and is rejected without one.

    Raises:
        InvalidSetting: one is not a whole number of at least 1, or `strict` has neither `output_tpm` nor `tpm`.
    """

    rpm: int | None = None
    input_tpm: int | None = None
    output_tpm: int | None = None
    tpm: int | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        self._check_whole("rpm", "input_tpm", "output_tpm", "tpm", optional=True)
        if not isinstance(self.strict, bool) or (self.strict and self.output_tpm is None and self.tpm is None):
            self._reject("strict", "true or false, and true beside output_tpm or tpm, which it is for")

    def quotas(self) -> list[Quota]:
        """Return them as an upstream takes them."""
        quotas = []
        if self.rpm is not None:
            quotas.append(Quota(requests=self.rpm, per="minute"))
        if self.input_tpm is not None:
            quotas.append(Quota(input_tokens=self.input_tpm, per="minute"))
        if self.output_tpm is not None:
            quotas.append(Quota(output_tokens=self.output_tpm, per="minute", strict=self.strict))
        if self.tpm is not None:
            quotas.append(Quota(tokens=self.tpm, per="minute", strict=self.strict))
        return quotas


class FallbackSettings(_Settings, frozen=True, kw_only=True):
    """A fallback for calls that their own account cannot serve: to another target, another model, or both.

    Attributes:
        target: another target with the same protocol; None for another model of the same target.
        model: the model there; None for the same name at another target.
        load_threshold: the load of the account from which calls fall back without being rejected first; with 1.0 only
            rejected calls do.
        models: pattern of the models whose calls may fall back.
        api_key_env: environment variable with the API key for the other target; without it calls go there without a
            key, since the caller's own key is for its own provider.

    Raises:
        InvalidSetting: a setting is invalid.
    """

    target: str | None = None
    model: str | None = None
    load_threshold: float = 1.0
    models: str = "*"
    api_key_env: str | None = None

    def __post_init__(self) -> None:
        for name in ("target", "model", "api_key_env"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                self._reject(name, "a name")
        self._check_variable("api_key_env")
        if self.target is None and self.model is None:
            self._reject("model", "given if there is no target: a fallback needs another model or another target")
        if self.target is None and self.api_key_env is not None:
            self._reject("api_key_env", "left out if there is no target: the caller's own key is valid for both models")
        if not is_positive(self.load_threshold) or self.load_threshold > 1:
            self._reject("load_threshold", "a load above 0, up to 1")
        if not isinstance(self.models, str) or not self.models:
            self._reject("models", "a pattern of models, such as 'gpt-4o*'")

    def api_key(self, environment: Mapping[str, str]) -> str | None:
        """Return the API key for the other target, read now; None if there is to be none.

        Raises:
            MissingFallbackKey: the environment variable is empty or not set.
        """
        return None if self.api_key_env is None else read_api_key(self.api_key_env, environment)


class KeySettings(QuotaSettings, frozen=True, kw_only=True):
    """One of several API keys that the gateway holds for a target. Its rates hold instead of those of the target.

    Attributes:
        api_key_env: environment variable with the API key.
        name: stands for the key in metrics and messages; by default the name of that variable.
        max_concurrent: calls in flight at most, of each account of the key; None for that of the target.
        weight: share of the calls that it gets while several keys have room.

    Raises:
        InvalidSetting: a setting is invalid.
    """

    api_key_env: str
    name: str | None = None
    max_concurrent: int | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.api_key_env, str) or not self.api_key_env:
            self._reject("api_key_env", "the name of an environment variable")
        self._check_variable("api_key_env")
        if self.name is not None and (not isinstance(self.name, str) or not _KEY_NAME.fullmatch(self.name)):
            self._reject("name", "1 to 64 letters, digits, dots, hyphens and underscores")
        self._check_whole("max_concurrent", optional=True)
        self._check_positive("weight", unit="shares")

    @property
    def label(self) -> str:
        """The name that stands for the key."""
        return self.name or self.api_key_env

    def limits(self) -> ProviderKeyLimits:
        """Return them as an upstream takes them."""
        return ProviderKeyLimits(self.label, quotas=self.quotas() or None, max_concurrent=self.max_concurrent)


class DeploymentSettings(_Settings, frozen=True, kw_only=True):
    """One of several places that serve a model: a target, and the model's name there.

    Attributes:
        target: of the gateway. All its keys serve the model, if it has several.
        model: the model's name there; None for the name that callers use.
        weight: share of the calls that it gets while several have room.

    Raises:
        InvalidSetting: a setting is invalid.
    """

    target: str
    model: str | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check_model_name(self, "target", self.target)
        _check_model_name(self, "model", self.model)
        self._check_positive("weight", unit="shares")


class ModelSettings(_Settings, frozen=True, kw_only=True):
    """An alias: a model's name, or a pattern of names, by which callers use a model of a target, or one of a pool.

    Attributes:
        name: that callers use, such as ``"fast"``, or a pattern, such as ``"llama-*"``; the longest pattern counts.
        target: that serves it; None for the one that the call goes to by its path.
        model: the model's name there; None for the name that callers use.
        pool: several deployments that share the calls, instead of `target` and `model`.

    Raises:
        InvalidSetting: a setting is invalid.
    """

    name: str
    target: str | None = None
    model: str | None = None
    pool: tuple[DeploymentSettings, ...] = ()

    def __post_init__(self) -> None:
        _check_model_name(self, "name", self.name)
        _check_model_name(self, "target", self.target)
        _check_model_name(self, "model", self.model)
        if self.pool and (self.target is not None or self.model is not None):
            self._reject("pool", "left out if there is a target or a model: give those in each table of the pool")
        if not self.pool and self.target is None and self.model in (None, self.name):
            self._reject("model", "another name than the alias, or given together with a target, or a pool of several")
        places = [(deployment.target, deployment.model or self.name) for deployment in self.pool]
        for target, model in places:
            if places.count((target, model)) > 1:
                self._reject("pool", "made of different deployments: give one a weight instead", value=model)

    @property
    def is_pattern(self) -> bool:
        """True if it is for several names."""
        return _WILDCARD.search(self.name) is not None

    @property
    def deployments(self) -> tuple[DeploymentSettings | ModelSettings, ...]:
        """The places that serve it: those of its pool, or itself."""
        return self.pool or (self,)

    @property
    def weight(self) -> float:
        """The weight of a place that serves a model alone."""
        return 1.0


def _check_model_name(settings: _Settings, name: str, value: object) -> None:
    if value is not None and (not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= _MAX_NAME):
        settings._reject(name, f"a name of 1 to {_MAX_NAME} printable characters")  # noqa: SLF001 - of this module
    if name == "model" and isinstance(value, str) and "*" in value:  # it would be sent as it is
        expected = "the name of one model, not a pattern: leave it out to send the name that callers use"
        settings._reject(name, expected)  # noqa: SLF001 - of this module


class TargetSettings(QuotaSettings, frozen=True, kw_only=True):
    """One provider, and its limits. The rate limits here apply to models that match no pattern of `models`.

    Attributes:
        name: lower-case letters, digits and ``._-``; callers may name it in their base URL.
        url: of the provider, without the ``/v1`` that starts the path of each call.
        provider: whose rules apply; by default those of the provider that `name` names, else ``"openai-compatible"``.
        api_key_env: environment variable with an API key that all calls are sent with, in place of what callers send.
        api_key_file: file with that key.
        models: rate limits of groups of models, by pattern of name such as ``"gpt-4o*"``; each has its own account.
        max_concurrent: calls in flight at most, of each account; None learns how many the provider takes.
        budget_usd: US dollars that all its calls together may spend in a day, in UTC.
        tenant_budget_usd: US dollars that each tenant may spend in a day.
        task_budget_usd: US dollars that each task may spend in all.
        budget_alert: the share of the first two from which the log and a metric say, once a day, that so much is spent;
            None: only that all is. See `forebay.Budget`.
        prices: US dollars per million tokens, by pattern of model, of models that the price list lacks.
        unmetered: what happens to calls that a budget or a rate limit cannot count, because their body cannot be read:
            ``"reject"``, or ``"allow"``, and they count as one request that is free.
        unpriced: what happens to calls whose price a budget does not know: ``"refuse"``, or ``"warn"``: they count as
            free, and are logged once for each model or reason. None: ``"refuse"``, unless `unmetered` is ``"allow"``.
        share_keys: whether callers with different API keys share the accounts; else each key has its own.
        max_wait: seconds that a call may be expected to wait, if its caller waits that long; else it is rejected.
        max_attempts: of each call, the first included.
        weights: tenants' shares of turns; 1.0 for a tenant without one.
        fallback: tried in this order.
        keys: API keys that the gateway holds for this target, instead of those of its callers. Calls are shared by
            them, by the room of each: each has its own accounts.

    Raises:
        InvalidSetting: a setting is invalid.
        InvalidPrice: a price is not a number of at least 0.
    """

    name: str
    url: str
    provider: str | None = None
    api_key_env: str | None = None
    api_key_file: str | None = None
    models: dict[str, QuotaSettings] = field(default_factory=dict)
    max_concurrent: int | None = None
    budget_usd: float | None = None
    tenant_budget_usd: float | None = None
    task_budget_usd: float | None = None
    budget_alert: float | None = 0.8
    prices: dict[str, Price] = field(default_factory=dict)
    unmetered: Literal["reject", "allow"] = "reject"
    unpriced: Literal["warn", "refuse"] | None = None
    share_keys: bool = False
    max_wait: float = 600.0
    max_attempts: int = 6
    weights: dict[str, float] = field(default_factory=dict)
    fallback: tuple[FallbackSettings, ...] = ()
    keys: tuple[KeySettings, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_keys()
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            expected = "1 to 63 lower-case letters, digits, dots, hyphens and underscores, a letter or digit first"
            self._reject("name", expected)
        if self.name == "v1":
            self._reject("name", "another name: paths that start with /v1 go to the target with the call's protocol")
        if problem := url_problem(self.url):
            expected = f"the http:// or https:// URL of the provider, such as https://api.openai.com: {problem}"
            shown = _PASSWORD.sub("://***@", self.url) if isinstance(self.url, str) else self.url
            self._reject("url", expected, value=shown)
        if self.provider is not None:
            try:
                profile_for(self.provider)
            except InvalidSetting as error:
                self._reject("provider", vars(error)["expected"])
        self._check_api_key()
        self._check_whole("max_concurrent", optional=True)
        self._check_whole("max_attempts")
        self._check_positive("max_wait", unit="seconds")
        self._check_money()
        for tenant, weight in self.weights.items():
            if not is_positive(weight):
                self._reject(f"weights.{tenant}", "a positive number", value=weight)

    def _check_money(self) -> None:
        self._check_positive("budget_usd", "tenant_budget_usd", "task_budget_usd", unit="US dollars", optional=True)
        if self.budget_alert is not None and not (is_number(self.budget_alert) and 0 < self.budget_alert < 1):
            self._reject("budget_alert", "a share above 0 and below 1, such as 0.8")
        if self.unmetered not in ("reject", "allow"):
            self._reject("unmetered", "'reject' or 'allow'")
        if self.unpriced not in ("warn", "refuse", None):
            self._reject("unpriced", "'warn' or 'refuse'")
        Prices(self.prices)

    def _check_keys(self) -> None:
        if self.keys and self.holds_key:
            self._reject("keys", "left out if api_key_env or api_key_file is given, or all of them here", value="given")
        for attribute in ("label", "api_key_env"):
            values = [getattr(key, attribute) for key in self.keys]
            for value in values:
                if values.count(value) > 1:
                    self._reject("keys", "made of keys with different names and variables", value=value)
        for key in self.keys:
            if key.strict:
                self._reject("keys", "without strict, which is a setting of the target", value="strict")

    def _check_api_key(self) -> None:
        for name in ("api_key_env", "api_key_file"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                self._reject(name, "the name of an environment variable or a file, not the key itself")
        self._check_variable("api_key_env")
        if self.api_key_env is not None and self.api_key_file is not None:
            self._reject("api_key_file", "left out if api_key_env is given: there is one key")

    @property
    def holds_key(self) -> bool:
        """True if the gateway holds the API key of this provider."""
        return self.api_key_env is not None or self.api_key_file is not None

    def api_key(self, environment: Mapping[str, str]) -> str | None:
        """Return the API key that calls are sent with, read now; None if callers send their own.

        Raises:
            InvalidProviderKey: it is missing, or a header cannot carry it.
        """
        if not self.holds_key:
            return None
        return read_provider_key(self.name, self.api_key_env, self.api_key_file, environment)

    @property
    def resolved_provider(self) -> str:
        """The provider whose rules apply."""
        if self.provider is not None:
            return self.provider
        try:
            return profile_for(self.name).provider
        except InvalidSetting:
            return _UNKNOWN_SERVER

    @property
    def retry(self) -> Retry:
        """The retry policy of its calls."""
        return Retry(max_attempts=self.max_attempts, max_total_delay=self.max_wait)

    @property
    def has_budgets(self) -> bool:
        """True if it may spend no more than a budget."""
        return any(usd is not None for usd in (self.budget_usd, self.tenant_budget_usd, self.task_budget_usd))

    @property
    def protocol(self) -> Literal["openai", "anthropic"]:
        """The protocol of its API."""
        return "anthropic" if self.resolved_provider == "anthropic" else "openai"

    def upstream(
        self,
        fallbacks: Sequence[Fallback] = (),
        key_limits: Mapping[str, ProviderKeyLimits] | None = None,
        *,
        spend_log: SpendLog | None = None,
        on_event: Callable[[Event], object] | None = None,
        shared: str | None = None,
    ) -> Upstream:
        """Return a new upstream with these settings.

        Args:
            fallbacks: of its calls.
            key_limits: of the keys that the gateway holds, by API key.
            spend_log: where it keeps what its calls cost; open.
            on_event: called with its events.
            shared: see `Upstream`.
        """
        return Upstream(
            self.name,
            provider=self.resolved_provider,
            models={pattern: limits.quotas() for pattern, limits in self.models.items()},
            quotas=self.quotas(),
            budget=_budget(self.budget_usd, "day", self.budget_alert),
            tenant_budget=_budget(self.tenant_budget_usd, "day", self.budget_alert),
            task_budget=_budget(self.task_budget_usd, None),
            max_concurrent=self.max_concurrent,
            retry=self.retry,
            max_wait=self.max_wait,
            weights=self.weights,
            prices=self.prices,
            unmetered=self.unmetered,
            unpriced=self.unpriced,
            fallback=fallbacks,
            spend_log=spend_log,
            on_event=on_event,
            key_limits=key_limits,
            shared=shared,
        )


class ContextSettings(_Settings, frozen=True, kw_only=True):
    """The callers whose headers are trusted for a call's priority, deadline, tenant and task.

    Attributes:
        trust: who may set the ``x-forebay-*`` headers and `tenant_headers`: ``"anyone"``, ``"token"`` (callers that
            present the gateway's token) or ``"nobody"``; None: anyone if it listens on loopback, else ``"token"``.
        tenant_headers: further headers that name a tenant, such as ``x-user-id``; the first one present counts, after
            ``x-forebay-tenant``.

    Raises:
        InvalidSetting: trust is none of these, or a header is invalid.
    """

    trust: Trust | None = None
    tenant_headers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.trust not in ("anyone", "token", "nobody", None):
            self._reject("trust", "'anyone', 'token' or 'nobody'")
        for header in self.tenant_headers:
            if not isinstance(header, str) or not _HEADER.fullmatch(header):
                self._reject("tenant_headers", "a list of header names, such as ['x-user-id']", value=header)
            if header.lower() in _SECRET_HEADERS:
                expected = "a header without secrets: tenants appear in metrics and logs"
                self._reject("tenant_headers", expected, value=header)


class TenantSettings(_Settings, frozen=True, kw_only=True):
    """The limits of one tenant over all targets together, and its calls' place among those of others.

    Attributes:
        name: of the tenant; ``"*"`` for each tenant without settings of its own, all of which are separate.
        rpm: requests per minute.
        input_tpm: LLM tokens sent per minute.
        output_tpm: LLM tokens received per minute.
        tpm: LLM tokens per minute, sent and received together.
        max_concurrent: calls in progress at a time, those that wait for a target's account included.
        budget_usd: US dollars that its calls may spend in a day, in UTC.
        max_wait: seconds that a call may be expected to wait for these limits, if its caller waits that long.
        weight: its share of turns at each target that has no ``weights`` for it.
        priority: of its calls that name none.
        max_priority: the best that its calls may have; those that name a better one get this.

    Raises:
        InvalidSetting: a setting is invalid.
    """

    name: str
    rpm: int | None = None
    input_tpm: int | None = None
    output_tpm: int | None = None
    tpm: int | None = None
    max_concurrent: int | None = None
    budget_usd: float | None = None
    max_wait: float = 600.0
    weight: float = 1.0
    priority: PriorityName | None = None
    max_priority: PriorityName = "critical"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _TENANT.fullmatch(self.name):
            self._reject("name", f"{_TENANT_NAMES}, or '*' for each tenant without its own table")
        self._check_whole("rpm", "input_tpm", "output_tpm", "tpm", "max_concurrent", optional=True)
        self._check_positive("budget_usd", unit="US dollars", optional=True)
        self._check_positive("max_wait", unit="seconds")
        self._check_positive("weight", unit="turns")
        for name in ("priority", "max_priority"):
            value = getattr(self, name)
            if value not in typing.get_args(PriorityName) and not (value is None and name == "priority"):
                self._reject(name, "'critical', 'high', 'normal' or 'low'")

    def quotas(self) -> list[Quota]:
        """Return its rates as an account takes them."""
        rates = {name: getattr(self, name) for name in ("rpm", "input_tpm", "output_tpm", "tpm")}
        return QuotaSettings(**rates).quotas()

    def budget(self) -> Budget | None:
        """Return its budget; None if it has none."""
        return _budget(self.budget_usd, "day")


class GatewaySettings(_Settings, frozen=True, kw_only=True):
    """One gateway.

    Attributes:
        targets: its providers.
        models: aliases of models, and pools of several deployments.
        listen: ``"HOST:PORT"``, an IPv6 host in brackets; port 0 takes a free one.
        token_env: environment variable with the token that all callers present, in ``x-forebay-token``.
        token_file: file with that token; one of the two, or `keys`, is needed to listen on anything but loopback.
        keys: URL of the file of the keys that the gateway issues to its callers.
        require_key: whether each caller needs one of these keys; else those without one are served as without `keys`.
        context: whose headers are trusted for a call's priority, deadline, tenant and task.
        max_body_bytes: of a request's body.
        max_held_bytes: of the bodies of all requests together, each held until its call has ended.
        max_held_response_bytes: of the responses of all calls together, as far as they are not streams. A response for
            which no memory is left is passed on as it arrives.
        max_header_bytes: of a request's headers together, and of pipelined requests that are read ahead.
        max_connections: open at a time.
        idle_timeout: seconds for the head of a request to arrive, since the connection was opened or the last response.
        body_timeout: seconds for the body of a request to arrive.
        send_timeout: seconds after which a caller that takes nothing of its response is disconnected.
        drain_timeout: seconds for calls in progress to end when the gateway stops.
        client_timeout: seconds that a caller is assumed to wait for its answer if nothing tells how long.
        max_metrics_accounts: accounts of each target with gauges of their own in ``/metrics``, the busiest ones.
        max_metrics_models: models with a label of their own in ``/metrics``; those served later count as ``other``.
        max_metrics_tenants: the same of tenants; 0 for none.
        max_metrics_keys: the same of issued keys, and of API keys.
        spend_log: the file that keeps what calls cost, ``sqlite:////absolute.db``; ``"none"`` for none. None: none,
            but the command ``forebay gateway`` has one of its own where a target has a budget.
        workers: processes that serve it, on one address. With several, `shared` makes their limits one.
        shared: the store that makes the limits of targets one for all processes that name it, see `Upstream`; None:
            they hold for each process, but the command ``forebay gateway`` has a file of its own for several workers.
        tenants: limits of tenants over all targets.
        response_headers: whether answers have a request id, and say how long the call was held, its attempts, its
            account, its cost.
        access_log: a line for each request: ``"text"``, ``"json"`` or ``"off"``; None: ``"text"`` for the command
            ``forebay gateway``, ``"off"`` for a `Gateway` in a program of its own.
        access_log_to: ``"stdout"``, ``"stderr"`` or the path of a file, which is opened again on SIGHUP.

    Raises:
        InvalidSetting: a setting is invalid.
    """

    targets: tuple[TargetSettings, ...]
    models: tuple[ModelSettings, ...] = ()
    listen: str = "127.0.0.1:8787"
    token_env: str | None = None
    token_file: str | None = None
    keys: str | None = None
    require_key: bool = True
    context: ContextSettings = ContextSettings()
    max_body_bytes: int = 32 * 1024 * 1024
    max_held_bytes: int = 512 * 1024 * 1024
    max_held_response_bytes: int = 256 * 1024 * 1024
    max_header_bytes: int = 64 * 1024
    max_connections: int = 10_000
    idle_timeout: float = 75.0
    body_timeout: float = 60.0
    send_timeout: float = 60.0
    drain_timeout: float = 30.0
    client_timeout: float = 300.0
    max_metrics_accounts: int = 100
    max_metrics_models: int = 100
    max_metrics_tenants: int = 100
    max_metrics_keys: int = 100
    spend_log: str | None = None
    workers: int = 1
    shared: str | None = None
    tenants: tuple[TenantSettings, ...] = ()
    response_headers: bool = True
    access_log: AccessLogKind | None = None
    access_log_to: str = STDOUT

    def __post_init__(self) -> None:
        self._check_targets()
        self._check_observation()
        self._check_fallbacks()
        self._check_models()
        address = parse_address(self.listen)
        if address is None:
            self._reject("listen", "HOST:PORT, such as 127.0.0.1:8787, 0.0.0.0:8787 or [::1]:8787")
        self._check_whole("max_body_bytes", "max_held_bytes", "max_held_response_bytes")
        self._check_whole("max_header_bytes", "max_connections", "max_metrics_accounts", "workers")
        for name in ("max_metrics_models", "max_metrics_tenants", "max_metrics_keys"):
            if getattr(self, name) != 0 or isinstance(getattr(self, name), bool | float):
                self._check_whole(name)
        if self.max_held_bytes < self.max_body_bytes:
            self._reject("max_held_bytes", f"at least max_body_bytes ({self.max_body_bytes:,}), to hold one such body")
        self._check_positive(
            *("idle_timeout", "body_timeout", "send_timeout", "drain_timeout", "client_timeout"), unit="seconds"
        )
        self._check_keys()
        self._check_token(address)
        if self.spend_log_url is not None:
            try:
                parse_spend_log(self.spend_log_url)
            except InvalidSpendLogUrl as error:
                expected = f"a file, such as 'sqlite:////var/lib/forebay/spend.db', or 'none': {error.why}"
                shown = shown_url(self.spend_log_url) if isinstance(self.spend_log_url, str) else self.spend_log_url
                self._reject("spend_log", expected, value=shown)

    def _check_keys(self) -> None:
        if self.keys is not None:
            try:
                parse_keys_url(self.keys)
            except InvalidKeysUrl as error:
                expected = f"the URL of a SQLite file, such as sqlite:///keys.db: {vars(error)['why']}"
                self._reject("keys", expected, value=vars(error)["url"])
        if not isinstance(self.require_key, bool) or (not self.require_key and self.keys is None):
            self._reject("require_key", "true or false, and false only beside keys, which it is for")

    def _check_targets(self) -> None:
        if not self.targets:
            self._reject("targets", "at least one, by --target NAME=URL or a table [targets.NAME]", value="none")
        names = [target.name for target in self.targets]
        for name in names:
            if names.count(name) > 1:
                self._reject("targets", "targets of different names", value=name)

    def _check_observation(self) -> None:
        names = [tenant.name for tenant in self.tenants]
        for name in names:
            if names.count(name) > 1:
                self._reject("tenants", "tenants of different names", value=name)
        if not isinstance(self.response_headers, bool):
            self._reject("response_headers", "true or false")
        if self.access_log not in (*typing.get_args(AccessLogKind), None):
            self._reject("access_log", "'text', 'json' or 'off'")
        if not isinstance(self.access_log_to, str) or not self.access_log_to or "\0" in self.access_log_to:
            self._reject("access_log_to", "'stdout', 'stderr' or the path of a file")

    def _check_fallbacks(self) -> None:
        edges = {
            target.name: [fallback.target for fallback in target.fallback if fallback.target is not None]
            for target in self.targets
        }
        for target in self.targets:
            for name in edges[target.name]:
                setting = f"targets.{target.name}.fallback"
                if name not in edges:
                    self._reject(setting, f"an existing target: {', '.join(edges)}", value=name)
                if target.name in _reachable(edges, name):
                    self._reject(setting, "a target that does not lead back to this one", value=name)

    def _check_models(self) -> None:
        protocols = {target.name: target.protocol for target in self.targets}
        for alias in self.models:
            setting, used = f"models.{alias.name}", set()
            places = [deployment.target for deployment in alias.deployments]
            for target in places:
                if target is not None and target not in protocols:
                    name = f"{setting}.{'pool' if alias.pool else 'target'}"
                    self._reject(name, f"an existing target: {', '.join(protocols)}", value=target)
                used.add(protocols.get(target or ""))
            if len(used) > 1:
                expected = "made of targets with one protocol: a request for OpenAI's is not understood by Anthropic's"
                self._reject(f"{setting}.pool", expected, value=", ".join(f"{target}" for target in places))
        names = [alias.name for alias in self.models]
        for name in names:
            if names.count(name) > 1:
                self._reject("models", "aliases of different names", value=name)

    def _check_token(self, address: Address) -> None:
        for name in ("token_env", "token_file"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                self._reject(name, "the name of an environment variable or a file")
        self._check_variable("token_env")
        if self.token_env is not None and self.token_file is not None:
            self._reject("token_file", "left out if token_env is given: there is one token")
        if self.has_token:
            return
        if not address.loopback and not self.needs_key:
            expected = (
                "a loopback address, such as 127.0.0.1:8787; to be reachable from other machines, give a token with"
                " --token-env VARIABLE or --token-file FILE, or keys with --keys URL"
            )
            self._reject("listen", expected)
        if self.context.trust == "token":
            expected = "'anyone' or 'nobody' without a token; or give token_env or token_file"
            self._reject("context.trust", expected, value=self.context.trust)

    @property
    def has_budgets(self) -> bool:
        """True if a target or a tenant has a budget, or an issued key may have one: those change while it runs."""
        limited = any(target.has_budgets for target in self.targets)
        return limited or self.keys is not None or any(tenant.budget_usd is not None for tenant in self.tenants)

    @property
    def spend_log_url(self) -> str | None:
        """The URL of the spend log; None if there is none."""
        return None if self.spend_log == _NO_SPEND_LOG else self.spend_log

    @property
    def address(self) -> Address:
        """The address on which it listens."""
        address = parse_address(self.listen)
        assert address is not None  # noqa: S101 - checked when it was made
        return address

    @property
    def has_token(self) -> bool:
        """True if callers must present a token."""
        return self.token_env is not None or self.token_file is not None

    @property
    def needs_key(self) -> bool:
        """True if callers must present an issued key."""
        return self.keys is not None and self.require_key

    @property
    def trust(self) -> Trust:
        """The callers who may set the headers of a call's context."""
        return self.context.trust or ("anyone" if self.address.loopback else "token")

    def token(self, environment: Mapping[str, str]) -> str | None:
        """Return the token that callers present, read now; None if none is needed.

        Raises:
            InvalidSecret: it is missing, or not fit to be one.
        """
        return None if not self.has_token else read_token(self.token_env, self.token_file, environment)


def _reachable(edges: Mapping[str, Sequence[str]], name: str) -> set[str]:
    """Return all targets to which calls for `name` may fall back, itself included."""
    found: set[str] = set()
    pending = [name]
    while pending:
        current = pending.pop()
        if current not in found:
            found.add(current)
            pending += edges.get(current, ())
    return found


def _budget(usd: float | None, per: Literal["day"] | None, alert: float | None = None) -> Budget | None:
    return None if usd is None else Budget(usd=usd, per=per, alert=alert)
