"""``forebay gateway``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from forebay import gateway as room
from forebay.cli import missing_extra_message
from forebay.cli.config import load_gateway_settings
from forebay.cli.toml_document import InvalidConfiguration
from forebay.errors import ForebayError, InvalidSetting
from forebay.gateway import GatewaySettings, TargetSettings
from forebay.gateway.http_proxy import http_proxy_for, without_password
from forebay.gateway.targets import make_targets

_EACH = "for each target, or NAME=NUMBER for one; repeatable."
_WRONG = 2  # the status of a command that was not given what it needs, as typer has it


def gateway(  # noqa: PLR0913 - one word each for what is said most
    *,
    target: Annotated[
        list[str] | None, typer.Option(metavar="NAME=URL", help="A provider, such as openai=https://api.openai.com.")
    ] = None,
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where callers come to: 127.0.0.1:8787.")
    ] = None,
    rpm: Annotated[list[str] | None, typer.Option(metavar="N", help=f"Requests a minute, {_EACH}")] = None,
    input_tpm: Annotated[list[str] | None, typer.Option(metavar="N", help=f"Input tokens a minute, {_EACH}")] = None,
    output_tpm: Annotated[list[str] | None, typer.Option(metavar="N", help=f"Output tokens a minute, {_EACH}")] = None,
    tpm: Annotated[list[str] | None, typer.Option(metavar="N", help=f"Tokens of both kinds a minute, {_EACH}")] = None,
    max_concurrent: Annotated[list[str] | None, typer.Option(metavar="N", help=f"Calls in flight, {_EACH}")] = None,
    budget_usd: Annotated[list[str] | None, typer.Option(metavar="X", help=f"US dollars a day, {_EACH}")] = None,
    share_keys: Annotated[
        bool | None, typer.Option("--share-keys/--no-share-keys", help="Callers with different keys share the limits.")
    ] = None,
    token_env: Annotated[
        str | None, typer.Option(metavar="VARIABLE", help="The environment variable with the token of callers.")
    ] = None,
    token_file: Annotated[str | None, typer.Option(metavar="FILE", help="The file with the token of callers.")] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="forebay.toml; the options here go before it.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Say what holds, or what is wrong, and start nothing.")
    ] = False,
) -> None:
    """Stand between agents and the providers that they share: only their base URL changes.

    Limits that are not given are learned from the providers' headers.
    """
    limits = {
        "rpm": rpm,
        "input_tpm": input_tpm,
        "output_tpm": output_tpm,
        "tpm": tpm,
        "max_concurrent": max_concurrent,
        "budget_usd": budget_usd,
    }
    try:
        settings = load_gateway_settings(
            config,
            targets=target or (),
            limits={name: texts or () for name, texts in limits.items()},
            share_keys=share_keys,
            gateway={"listen": listen, "token_env": token_env, "token_file": token_file},
        )
        named = {to.api_key_env: "set" for one in settings.targets for to in one.fallback if to.api_key_env}
        make_targets(settings, named)  # whether fallbacks fit together is seen only then, and needs no secrets
        proxies = {one.name: http_proxy_for(one.url, os.environ) for one in settings.targets}
    except (InvalidConfiguration, InvalidSetting) as error:
        typer.echo(f"{error}", err=True)
        raise typer.Exit(_WRONG) from None
    if check:
        typer.echo("\n".join(_lines(settings, proxies)))
        return
    raise typer.Exit(_serve(settings))


def _serve(settings: GatewaySettings) -> int:
    """Run it until it is stopped."""
    if absent := room.missing_libraries():
        typer.echo(missing_extra_message(absent, "gateway"), err=True)
        return 1
    try:
        return room.serve(settings, ready=lambda running: _say_where(settings, running.port))
    except ForebayError as error:
        typer.echo(f"forebay: {error}", err=True)
        return 1


def _say_where(settings: GatewaySettings, port: int) -> None:
    host = settings.listen.rpartition(":")[0]
    typer.echo(f"listens on http://{host}:{port}")  # what base URLs begin with; click flushes


def _lines(settings: GatewaySettings, proxies: Mapping[str, str | None]) -> list[str]:
    """What holds, for a person to check."""
    if settings.token_env is not None:
        missing = "" if settings.token_env in os.environ else ", which is not set here"
        callers = f"the token in ${settings.token_env}{missing}"
    elif settings.token_file is not None:
        missing = "" if Path(settings.token_file).is_file() else ", which is not there"
        callers = f"the token in {settings.token_file}{missing}"
    else:
        callers = "no token"
    return [
        f"listens on {settings.listen}; callers need {callers}",
        f"priority, deadline, tenant and task are believed of: {settings.trust}",
        *(line for target in settings.targets for line in _lines_of(target, proxies[target.name])),
    ]


def _lines_of(target: TargetSettings, proxy: str | None) -> list[str]:
    keys = "all keys share its limits" if target.share_keys else "limits hold for each key"
    given = {
        "in flight": target.max_concurrent,
        "USD a day": target.budget_usd,
        "USD a day for each tenant": target.tenant_budget_usd,
        "USD for each task": target.task_budget_usd,
    }
    holds = [f"{amount:,.12g} {what}" for what, amount in given.items() if amount is not None]
    groups: list[tuple[str, Any]] = [("", target), *target.models.items()]
    for pattern, rates in groups:
        holds += [
            f"{quota.amount:,} {quota.unit.replace('_', ' ')} a minute{f' of {pattern}' if pattern else ''}"
            for quota in rates.quotas()
        ]
    for to in target.fallback:
        there = " at ".join(part for part in (to.model, to.target) if part)
        missing = (
            ""
            if to.api_key_env in (None, *os.environ)
            else f", with the key in ${to.api_key_env}, which is not set here"
        )
        holds.append(f"what is refused{'' if to.models == '*' else f' of {to.models}'} goes to {there}{missing}")
    way = "" if proxy is None else f" through {without_password(proxy)}"
    first = f"{target.name}: {target.url}{way}, by the rules of {target.resolved_provider}; {keys}"
    return [first, *(f"    {line}" for line in holds or ["all learned from headers"])]
