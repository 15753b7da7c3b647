"""What a gateway is made with, typed and checked. `docs/gateway.md` has the same as a table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final, Literal

import msgspec
from msgspec import field

from forebay.errors import InvalidSetting
from forebay.gateway.address import Address, parse_address, url_problem
from forebay.gateway.secret import read_api_key, read_token
from forebay.gateway.setting_checks import check_positive, check_positive_int, is_positive, reject_setting
from forebay.quota import Budget, Price, Prices, Quota
from forebay.retry import Retry
from forebay.upstream import Fallback, Upstream
from forebay.upstream.providers import profile_for

Trust = Literal["anyone", "token", "nobody"]

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")  # it stands in paths, in readings and on the command line
_HEADER: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}")  # RFC 9110, a field name
_SECRET_HEADERS: Final = frozenset({"authorization", "proxy-authorization", "x-api-key", "api-key", "cookie"})
_PASSWORD: Final = re.compile(r"://[^/?#]*@")
_UNKNOWN_SERVER: Final = "openai-compatible"


class QuotaSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Rates by the minute; what is not given is learned from headers.

    Attributes:
        rpm: requests.
        input_tpm: LLM tokens sent.
        output_tpm: LLM tokens received.
        tpm: LLM tokens of both kinds together, as some providers count.

    Raises:
        InvalidSetting: one is not a whole number of at least 1.
    """

    rpm: int | None = None
    input_tpm: int | None = None
    output_tpm: int | None = None
    tpm: int | None = None

    def __post_init__(self) -> None:
        check_positive_int(self, "rpm", "input_tpm", "output_tpm", "tpm", optional=True)

    def quotas(self) -> list[Quota]:
        """The same as an upstream takes it."""
        given = (
            {"requests": self.rpm},
            {"input_tokens": self.input_tpm},
            {"output_tokens": self.output_tpm},
            {"tokens": self.tpm},
        )
        return [Quota(**amount, per="minute") for amount in given if None not in amount.values()]


class FallbackSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where calls are sent on to that their own account cannot serve.

    Attributes:
        target: another target, of the same protocol; None for another model of the same.
        model: what the model is there; None for the same name at another target.
        when: the load from which calls are sent on without being refused first; 1.0 is not before.
        of: pattern of the models whose calls are sent on.
        api_key_env: environment variable with the API key for the other target; without it calls go there without one,
            since that of their caller is for somebody else.

    Raises:
        InvalidSetting: a setting cannot be meant.
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
                reject_setting(self, name, "a name")
        if self.target is None and self.model is None:
            reject_setting(self, "model", "given where no target is: calls go to another model, or elsewhere")
        if self.target is None and self.api_key_env is not None:
            reject_setting(
                self, "api_key_env", "left out where no target is given: the caller's own key is for it as well"
            )
        if not is_positive(self.load_threshold) or self.load_threshold > 1:
            reject_setting(self, "load_threshold", "a load above 0, up to 1")
        if not isinstance(self.models, str) or not self.models:
            reject_setting(self, "models", "a pattern of models, such as 'gpt-4o*'")

    def api_key(self, environment: Mapping[str, str]) -> str | None:
        """The key, read now; None if there is to be none.

        Raises:
            MissingKey: it is not there.
        """
        return None if self.api_key_env is None else read_api_key(self.api_key_env, environment)


class TargetSettings(QuotaSettings, frozen=True, kw_only=True):
    """One provider, and what may be asked of it. The rates here hold for models that no pattern of `models` fits.

    Attributes:
        name: what it is called, in small letters, digits and ``._-``; callers name it in their base URL.
        url: where it is, without the part that every call's path begins with (``/v1``).
        provider: whose rules hold; by default those of the provider that `name` names, else ``"openai-compatible"``.
        models: rates of each group of models, by pattern of name such as ``"gpt-4o*"``; each has an account of its own.
        max_concurrent: calls in flight at most, of each account; None finds out how many it bears.
        budget_usd: US dollars that all its calls together may spend in a day, in UTC.
        tenant_budget_usd: US dollars that each tenant may spend in a day.
        task_budget_usd: US dollars that each task may spend, once and for all.
        prices: US dollars per million tokens, by pattern of model, of what the price list does not know.
        share_keys: whether callers with different API keys share the accounts; else each key has its own.
        longest_wait: seconds that a call may be expected to wait, if its caller reads that long; beyond that it is
            refused.
        max_attempts: how often a call is tried while it fails, the first time included.
        weights: tenants' shares of turns; 1.0 where none is given.
        fallback: where calls are sent on to, tried in this order.

    Raises:
        InvalidSetting: a setting cannot be meant.
        InvalidPrice: a price is no number of at least 0.
    """

    name: str
    url: str
    provider: str | None = None
    models: dict[str, QuotaSettings] = field(default_factory=dict)
    max_concurrent: int | None = None
    budget_usd: float | None = None
    tenant_budget_usd: float | None = None
    task_budget_usd: float | None = None
    prices: dict[str, Price] = field(default_factory=dict)
    share_keys: bool = False
    max_wait: float = 600.0
    max_attempts: int = 6
    weights: dict[str, float] = field(default_factory=dict)
    fallback: tuple[FallbackSettings, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            expected = "up to 63 small letters, digits, dots, hyphens and underscores, a letter or digit first"
            reject_setting(self, "name", expected)
        if self.name == "v1":
            reject_setting(self, "name", "another one: paths that begin with /v1 are for whoever speaks what they ask")
        if problem := url_problem(self.url):
            expected = f"the http:// or https:// address of the provider, such as https://api.openai.com: {problem}"
            shown = _PASSWORD.sub("://***@", self.url) if isinstance(self.url, str) else self.url
            reject_setting(self, "url", expected, value=shown)
        if self.provider is not None:
            try:
                profile_for(self.provider)
            except InvalidSetting as error:
                reject_setting(self, "provider", vars(error)["expected"])
        check_positive_int(self, "max_concurrent", optional=True)
        check_positive_int(self, "max_attempts")
        check_positive(self, "budget_usd", "tenant_budget_usd", "task_budget_usd", unit="US dollars", optional=True)
        check_positive(self, "max_wait", unit="seconds")
        for tenant, weight in self.weights.items():
            if not is_positive(weight):
                reject_setting(self, f"weights.{tenant}", "a positive number", value=weight)
        Prices(self.prices)

    @property
    def resolved_provider(self) -> str:
        """The provider whose rules hold."""
        if self.provider is not None:
            return self.provider
        try:
            return profile_for(self.name).provider
        except InvalidSetting:
            return _UNKNOWN_SERVER

    @property
    def retry(self) -> Retry:
        """How failed calls are tried again."""
        return Retry(max_attempts=self.max_attempts, max_total_delay=self.max_wait)

    def upstream(self, fallbacks: Sequence[Fallback] = ()) -> Upstream:
        """A new upstream that keeps these terms, and sends calls on by `fallbacks`."""
        return Upstream(
            self.name,
            provider=self.resolved_provider,
            models={pattern: rates.quotas() for pattern, rates in self.models.items()},
            quotas=self.quotas(),
            budget=_budget(self.budget_usd, "day"),
            tenant_budget=_budget(self.tenant_budget_usd, "day"),
            task_budget=_budget(self.task_budget_usd, None),
            max_concurrent=self.max_concurrent,
            retry=self.retry,
            max_wait=self.max_wait,
            weights=self.weights,
            prices=self.prices,
            fallback=fallbacks,
        )


class ContextSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Whose word is taken for a call's priority, deadline, tenant and task.

    Attributes:
        trust: who may set the ``x-forebay-*`` headers and those of `tenant_headers`: ``"anyone"``, ``"token"`` (who
            presents the gateway's token) or ``"nobody"``; None: anyone on loopback, else who has the token.
        tenant_headers: headers of others that name a tenant, such as ``x-user-id``; the first that is there counts,
            after ``x-forebay-tenant``.

    Raises:
        InvalidSetting: trust is none of these, or a header cannot be meant.
    """

    trust: Trust | None = None
    tenant_headers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.trust not in ("anyone", "token", "nobody", None):
            reject_setting(self, "trust", "'anyone', 'token' or 'nobody'")
        for header in self.tenant_headers:
            if not isinstance(header, str) or not _HEADER.fullmatch(header):
                reject_setting(self, "tenant_headers", "a list of header names, such as ['x-user-id']", value=header)
            if header.lower() in _SECRET_HEADERS:
                expected = "headers that hold no secret: tenants are shown in readings and logs"
                reject_setting(self, "tenant_headers", expected, value=header)


class GatewaySettings(msgspec.Struct, frozen=True, kw_only=True):
    """One gateway.

    Attributes:
        targets: the providers behind it.
        listen: ``"HOST:PORT"``, an IPv6 host in brackets; port 0 takes a free one.
        token_env: environment variable that holds the token that all callers present, in ``x-forebay-token``.
        token_file: file that holds it; one of the two is needed to listen on anything but loopback.
        context: whose word is taken for a call's priority, deadline, tenant and task.
        max_body_bytes: of a request.
        max_held_bytes: of the bodies of all requests together, each held until its call has ended.
        max_header_bytes: of a request's headers together, and of what is sent ahead of the answer before.
        max_connections: open at a time.
        idle_timeout: seconds in which the head of a request must arrive, since the connection was made or the answer
            before was given.
        body_timeout: seconds in which the body of a request must arrive.
        send_timeout: seconds in which a caller must take something of an answer that waits for it.
        drain_timeout: seconds that calls under way are given at the end.

    Raises:
        InvalidSetting: a setting cannot be meant.
    """

    targets: tuple[TargetSettings, ...]
    listen: str = "127.0.0.1:8787"
    token_env: str | None = None
    token_file: str | None = None
    context: ContextSettings = ContextSettings()
    max_body_bytes: int = 32 * 1024 * 1024
    max_held_bytes: int = 512 * 1024 * 1024
    max_header_bytes: int = 64 * 1024
    max_connections: int = 10_000
    idle_timeout: float = 75.0
    body_timeout: float = 60.0
    send_timeout: float = 60.0
    drain_timeout: float = 30.0

    def __post_init__(self) -> None:
        self._check_targets()
        self._check_fallbacks()
        address = parse_address(self.listen)
        if address is None:
            reject_setting(self, "listen", "HOST:PORT, such as 127.0.0.1:8787, 0.0.0.0:8787 or [::1]:8787")
        check_positive_int(self, "max_body_bytes", "max_held_bytes", "max_header_bytes", "max_connections")
        if self.max_held_bytes < self.max_body_bytes:
            reject_setting(
                self, "max_held_bytes", f"at least max_body_bytes, {self.max_body_bytes:,}, or no such body passes"
            )
        check_positive(self, "idle_timeout", "body_timeout", "send_timeout", "drain_timeout", unit="seconds")
        self._check_token(address)

    def _check_targets(self) -> None:
        if not self.targets:
            reject_setting(
                self, "targets", "at least one, by --target NAME=URL or a table [targets.NAME]", value="none"
            )
        names = [target.name for target in self.targets]
        for name in names:
            if names.count(name) > 1:
                reject_setting(self, "targets", "targets of different names", value=name)

    def _check_fallbacks(self) -> None:
        leads = {target.name: [to.target for to in target.fallback if to.target is not None] for target in self.targets}
        for target in self.targets:
            for name in leads[target.name]:
                if name not in leads:
                    reject_setting(
                        self,
                        f"targets.{target.name}.fallback",
                        f"to a target that there is: {', '.join(leads)}",
                        value=name,
                    )
                if target.name in _reached(leads, name):
                    reject_setting(
                        self, f"targets.{target.name}.fallback", "to a target that does not lead back to it", value=name
                    )

    def _check_token(self, address: Address) -> None:
        for name in ("token_env", "token_file"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                reject_setting(self, name, "a name, of an environment variable or a file")
        if self.token_env is not None and self.token_file is not None:
            reject_setting(self, "token_file", "left out where token_env is given: the token has one place")
        if self.has_token:
            return
        if not address.loopback:
            expected = (
                "an address of loopback, such as 127.0.0.1:8787; to be reached from elsewhere, callers need a token:"
                " give --token-env VARIABLE or --token-file FILE"
            )
            reject_setting(self, "listen", expected)
        if self.context.trust == "token":
            expected = "'anyone' or 'nobody' where there is no token; or give token_env or token_file"
            reject_setting(self, "context.trust", expected, value=self.context.trust)

    @property
    def address(self) -> Address:
        """Where it listens."""
        address = parse_address(self.listen)
        assert address is not None  # noqa: S101 - checked when it was made
        return address

    @property
    def has_token(self) -> bool:
        """Whether callers present a token."""
        return self.token_env is not None or self.token_file is not None

    @property
    def trust(self) -> Trust:
        """Who may set the headers that tell a call's context."""
        return self.context.trust or ("anyone" if self.address.loopback else "token")

    def token(self, environment: Mapping[str, str]) -> str | None:
        """The token that callers present, read now; None if none is asked for.

        Raises:
            InvalidSecret: it is not there, or is not fit for one.
        """
        return None if not self.has_token else read_token(self.token_env, self.token_file, environment)


def _reached(leads: Mapping[str, Sequence[str]], name: str) -> set[str]:
    """All targets to which calls for `name` may come, itself included."""
    found: set[str] = set()
    coming = [name]
    while coming:
        here = coming.pop()
        if here not in found:
            found.add(here)
            coming += leads.get(here, ())
    return found


def _budget(usd: float | None, per: Literal["day"] | None) -> Budget | None:
    return None if usd is None else Budget(usd=usd, per=per)
