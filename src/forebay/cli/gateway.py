"""The command ``forebay gateway``."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer

from forebay import gateway as gateway_package
from forebay.cli.config import load_gateway_settings
from forebay.cli.extras import missing_extra_message
from forebay.cli.start_problems import find_start_problems
from forebay.cli.state_directory import default_shared, make_state_directory, with_default_spend_log
from forebay.cli.toml_document import InvalidConfiguration
from forebay.errors import ForebayError, InvalidSetting
from forebay.gateway import GatewaySettings, KeySettings, ModelSettings, TargetSettings, TenantSettings
from forebay.gateway.callers.key_file import parse_keys_url
from forebay.gateway.connections.http_proxy import http_proxy_for, without_password
from forebay.gateway.settings import OTHER_TENANTS
from forebay.gateway.targets.targets import make_targets
from forebay.spend_log import parse_spend_log
from forebay.storage.shown_url import shown_url

_EACH: Final = "for all targets, or NAME=NUMBER for one; repeatable."
_USAGE_ERROR: Final = 2  # exit status, as typer's


def gateway(  # noqa: PLR0913 - one option for each common setting
    *,
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=URL", help="A provider, such as openai=https://api.openai.com; repeatable."),
    ] = None,
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Address to listen on; default 127.0.0.1:8787.")
    ] = None,
    rpm: Annotated[list[str] | None, typer.Option(metavar="N", help=f"Requests per minute, {_EACH}")] = None,
    input_tpm: Annotated[list[str] | None, typer.Option(metavar="N", help=f"Input tokens per minute, {_EACH}")] = None,
    output_tpm: Annotated[
        list[str] | None, typer.Option(metavar="N", help=f"Output tokens per minute, {_EACH}")
    ] = None,
    tpm: Annotated[
        list[str] | None, typer.Option(metavar="N", help=f"Input and output tokens per minute, {_EACH}")
    ] = None,
    max_concurrent: Annotated[list[str] | None, typer.Option(metavar="N", help=f"Calls in flight, {_EACH}")] = None,
    budget_usd: Annotated[list[str] | None, typer.Option(metavar="X", help=f"US dollars per day, {_EACH}")] = None,
    share_keys: Annotated[
        bool | None,
        typer.Option("--share-keys/--no-share-keys", help="Whether callers with different API keys share the limits."),
    ] = None,
    token_env: Annotated[
        str | None, typer.Option(metavar="VARIABLE", help="Environment variable with the token that callers present.")
    ] = None,
    token_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="File with the token that callers present.")
    ] = None,
    spend_log: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="File that keeps what calls cost, sqlite:////absolute.db, or none; default with a budget: one in"
            " $XDG_STATE_HOME/forebay.",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Processes that serve, on one address; default 1.")
    ] = None,
    shared: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Store that makes limits one for all processes that name it, sqlite:////absolute.db or redis://...;"
            " default with several workers: a file of this gateway.",
        ),
    ] = None,
    keys: Annotated[
        str | None,
        typer.Option(metavar="URL", help="File of the keys that callers present, such as sqlite:///keys.db."),
    ] = None,
    drain_timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="How long calls in progress may take to end after SIGTERM; default 30."),
    ] = None,
    access_log: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="A line for each request: text (default), json, or off.")
    ] = None,
    access_log_to: Annotated[
        str | None, typer.Option(metavar="FILE", help="Where these lines go: stdout (default), stderr, or a file.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Configuration, such as forebay.toml; options override it.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Print the resulting configuration, or its problems, and exit: 0 if it can start."
        ),
    ] = False,
) -> None:
    """Run the HTTP gateway: clients send their LLM calls through it by changing only their base URL.

    Limits that are not given are learned from the providers' rate-limit headers and 429s.
    """
    limits = {
        "rpm": rpm,
        "input_tpm": input_tpm,
        "output_tpm": output_tpm,
        "tpm": tpm,
        "max_concurrent": max_concurrent,
        "budget_usd": budget_usd,
    }
    options: dict[str, Any] = {
        "targets": target or (),
        "limits": {name: texts or () for name, texts in limits.items()},
        "share_keys": share_keys,
        "gateway": {
            "listen": listen,
            "token_env": token_env,
            "token_file": token_file,
            "keys": keys,
            "drain_timeout": drain_timeout,
            "spend_log": spend_log,
            "workers": workers,
            "shared": shared,
            "access_log": access_log,
            "access_log_to": access_log_to,
        },
    }
    load = functools.partial(_load, config, options)
    try:
        settings = load()
        proxies = {each.name: http_proxy_for(each.url, os.environ) for each in settings.targets}
    except (InvalidConfiguration, InvalidSetting) as error:
        typer.echo(f"{error}", err=True)
        raise typer.Exit(_USAGE_ERROR) from None
    if check:
        typer.echo("\n".join(_summary(settings, proxies)))
        for problem in (problems := find_start_problems(settings, os.environ)):
            typer.echo(f"forebay: {problem}", err=True)
        raise typer.Exit(1 if problems else 0)
    raise typer.Exit(_serve(settings, config, load))


def _load(config: Path | None, options: Mapping[str, Any]) -> GatewaySettings:
    """Return the settings of the file, if there is one, and of the options, which override it.

    Raises:
        InvalidConfiguration, InvalidSetting: with each mistake that was found.
    """
    settings = with_default_spend_log(load_gateway_settings(config, **options), os.environ)
    _check_fallbacks(settings)
    return settings


def _check_fallbacks(settings: GatewaySettings) -> None:
    """Check that fallbacks fit together, which making the targets shows; no secret is needed for that.

    Raises:
        InvalidSetting: they do not.
    """
    keyless = [msgspec.structs.replace(each, api_key_env=None, api_key_file=None, keys=()) for each in settings.targets]
    settings = msgspec.structs.replace(settings, targets=tuple(keyless))
    fallbacks = [fallback for target in settings.targets for fallback in target.fallback]
    make_targets(settings, {fallback.api_key_env: "set" for fallback in fallbacks if fallback.api_key_env})


def _serve(settings: GatewaySettings, config: Path | None, load: Callable[[], GatewaySettings]) -> int:
    """Run the gateway until it is stopped; return the exit status. With a file, a SIGHUP reloads it."""
    if missing := gateway_package.missing_libraries():
        typer.echo(missing_extra_message(missing, "gateway"), err=True)
        return 1
    try:
        make_state_directory(settings, os.environ)
        with default_shared(settings, os.environ) as shared:
            settings = msgspec.structs.replace(settings, shared=shared)
            return gateway_package.serve(
                settings,
                ready=lambda running: _print_address(settings, running.port),
                reload=None if config is None else lambda: _with_shared(load(), shared),
                reloaded=lambda: typer.echo(f"reloaded {config}"),
            )
    except ForebayError as error:
        typer.echo(f"forebay: {error}", err=True)
        return 1


def _with_shared(settings: GatewaySettings, shared: str | None) -> GatewaySettings:
    """Return settings with the store of this gateway, if they name none."""
    return msgspec.structs.replace(settings, shared=settings.shared or shared)


def _print_address(settings: GatewaySettings, port: int) -> None:
    host = settings.listen.rpartition(":")[0]
    typer.echo(
        "\n".join([f"listening on http://{host}:{port}", *_spend_log_summary(settings), *_workers_summary(settings)])
    )  # click flushes


def _summary(settings: GatewaySettings, proxies: Mapping[str, str | None]) -> list[str]:
    """Return the configuration in words, a line each."""
    if settings.token_env is not None:
        missing = "" if settings.token_env in os.environ else ", which is not set"
        callers = f"the token in ${settings.token_env}{missing}"
    elif settings.token_file is not None:
        missing = "" if Path(settings.token_file).is_file() else ", which does not exist"
        callers = f"the token in {settings.token_file}{missing}"
    else:
        callers = "no token"
    if settings.keys is not None:
        path = parse_keys_url(settings.keys)
        missing = "" if path.is_file() else ", which does not exist"
        callers = f"a key of {path}{missing}" if settings.require_key else f"{callers}, or a key of {path}{missing}"
    log_format = settings.access_log or "text"
    return [
        f"listening on {settings.listen}; callers need {callers}",
        f"may set priority, deadline, tenant and task: {_trusted(settings)}",
        *_spend_log_summary(settings),
        *_workers_summary(settings),
        f"access log: {'off' if log_format == 'off' else f'{log_format} to {settings.access_log_to}'}",
        *(_tenant_summary(tenant) for tenant in settings.tenants),
        *(line for target in settings.targets for line in _target_summary(target, proxies[target.name])),
        *(line for alias in settings.models for line in _alias_summary(alias, settings)),
    ]


def _trusted(settings: GatewaySettings) -> str:
    """Return who may set the context of a call; for callers with an issued key, the key says it."""
    if settings.keys is None:
        return settings.trust
    return "as each key says" if settings.require_key else f"as each key says; without one {settings.trust}"


def _spend_log_summary(settings: GatewaySettings) -> list[str]:
    """Return where spend is kept; nothing if there is none to keep."""
    if settings.spend_log_url is not None:
        return [f"what calls cost is kept in {parse_spend_log(settings.spend_log_url).path}"]
    if settings.has_budgets:
        return ["what calls cost is kept in memory: a restart refills the budgets"]
    return []


def _workers_summary(settings: GatewaySettings) -> list[str]:
    """Return how many processes serve, and what they share."""
    workers = [f"{settings.workers} worker processes"] if settings.workers > 1 else []
    if settings.shared is not None:
        workers.append(f"limits are shared through {shown_url(settings.shared)}")
    return workers


def _alias_summary(alias: ModelSettings, settings: GatewaySettings) -> list[str]:
    """Return the deployments of an alias, in words."""
    keys = {target.name: len(target.keys) for target in settings.targets}
    places = []
    for deployment in alias.deployments:
        model = "the same name" if deployment.model is None else deployment.model
        where = "the target of the call's path" if deployment.target is None else deployment.target
        shared = keys.get(deployment.target or "", 0)
        by_keys = f" by {shared} keys" if shared > 1 else ""
        weight = "" if deployment.weight == 1.0 else f", weight {deployment.weight:,.6g}"
        places.append(f"{model} at {where}{by_keys}{weight}")
    kind = "models" if alias.is_pattern else "model"
    if len(places) == 1:
        return [f"{kind} {alias.name}: {places[0]}"]
    return [f"{kind} {alias.name}: shared by {len(places)} deployments", *(f"    {place}" for place in places)]


def _key_summary(key: KeySettings) -> str:
    limits = [
        *(f"{quota.amount:,} {quota.unit.replace('_', ' ')} per minute" for quota in key.quotas()),
        *([] if key.max_concurrent is None else [f"{key.max_concurrent:,} calls in flight"]),
        *([] if key.weight == 1.0 else [f"weight {key.weight:,.6g}"]),
    ]
    missing = "" if key.api_key_env in os.environ else ", which is not set"
    shown = f": {', '.join(limits)}" if limits else ""
    return f"key {key.label} in ${key.api_key_env}{missing}{shown}"


def _tenant_summary(tenant: TenantSettings) -> str:
    who = "each other tenant" if tenant.name == OTHER_TENANTS else f"tenant {tenant.name!r}"
    limits = [f"{quota.amount:,} {quota.unit.replace('_', ' ')} per minute" for quota in tenant.quotas()]
    if tenant.max_concurrent is not None:
        limits.append(f"{tenant.max_concurrent:,} calls in progress")
    if tenant.budget_usd is not None:
        limits.append(f"{tenant.budget_usd:,.12g} USD per day")
    if tenant.priority is not None:
        limits.append(f"priority {tenant.priority}")
    if tenant.max_priority != "critical":
        limits.append(f"at most {tenant.max_priority}")
    if tenant.weight != 1.0:
        limits.append(f"weight {tenant.weight:g}")
    return f"{who}: {', '.join(limits) or 'no limits'}"


def _target_summary(target: TargetSettings, proxy: str | None) -> list[str]:
    keys = "one account for all API keys" if target.share_keys else "accounts of its own for each API key"
    if target.api_key_env is not None:
        missing = "" if target.api_key_env in os.environ else ", which is not set"
        keys = f"calls are sent with the API key in ${target.api_key_env}{missing}"
    elif target.api_key_file is not None:
        missing = "" if Path(target.api_key_file).is_file() else ", which does not exist"
        keys = f"calls are sent with the API key in {target.api_key_file}{missing}"
    elif target.keys:
        keys = "calls are sent with the API keys of the gateway"
    amounts = {
        "calls in flight": target.max_concurrent,
        "USD per day": target.budget_usd,
        "USD per day for each tenant": target.tenant_budget_usd,
        "USD for each task": target.task_budget_usd,
    }
    limits = [f"{amount:,.12g} {name}" for name, amount in amounts.items() if amount is not None]
    groups: list[tuple[str, Any]] = [("", target), *target.models.items()]
    for pattern, rates in groups:
        limits += [
            f"{quota.amount:,} {quota.unit.replace('_', ' ')} per minute{f' of {pattern}' if pattern else ''}"
            + (", strict" if quota.strict else "")
            for quota in rates.quotas()
        ]
    limits += [_key_summary(key) for key in target.keys]
    for fallback in target.fallback:
        where = " at ".join(part for part in (fallback.model, fallback.target) if part)
        models = "" if fallback.models == "*" else f" of {fallback.models}"
        key = "" if fallback.api_key_env is None else f", with the API key in ${fallback.api_key_env}"
        missing = "" if fallback.api_key_env in (None, *os.environ) else ", which is not set"
        limits.append(f"rejected calls{models} fall back to {where}{key}{missing}")
    through = "" if proxy is None else f" through the HTTP proxy {without_password(proxy)}"
    first = f"{target.name}: {target.url}{through}; rules of {target.resolved_provider}; {keys}"
    return [first, *(f"    {line}" for line in limits or ["all limits are learned from headers and 429s"])]
