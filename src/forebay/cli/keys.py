"""The commands ``forebay keys create|list|show|update|rotate|revoke``: the keys that a gateway issues."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Final, TypeVar

import typer

from forebay import clock
from forebay.cli.store_command import USAGE_ERROR, AsJson, date, fail, print_json, relative
from forebay.cli.text_table import one_line, text_table
from forebay.errors import ForebayError, InvalidSetting
from forebay.gateway.callers.issued_keys import IssuedKey, new_key
from forebay.gateway.callers.key_file import InvalidKeysUrl, KeyFile, StoredKey, parse_keys_url

T = TypeVar("T")

_UNITS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}
_DURATION: Final = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhdw])")
_FORMS: Final = "a number with s, m, h, d or w, such as 30d"
_NEVER: Final = "never"

keys = typer.Typer(help="The keys that a gateway issues to its callers.", no_args_is_help=True)


class KeyPriority(StrEnum):
    """A priority, as an option."""

    CRITICAL = "critical"
    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


class BudgetPeriodName(StrEnum):
    """The period of a budget, as an option."""

    HOUR = "hour"
    DAY = "day"
    MONTH = "month"
    TOTAL = "total"


class ClearedField(StrEnum):
    """A field that can be removed from a key, as an option."""

    TENANT = "tenant"
    MAX_PRIORITY = "max-priority"
    BUDGET = "budget-usd"
    RPM = "rpm"
    TPM = "tpm"
    MAX_CONCURRENT = "max-concurrent"
    MODELS = "model"
    TARGETS = "target"
    EXPIRES = "expires"


_CLEARED: Final[Mapping[ClearedField, Mapping[str, Any]]] = {
    ClearedField.TENANT: {"tenant": None},
    ClearedField.MAX_PRIORITY: {"max_priority": None},
    ClearedField.BUDGET: {"budget_usd": None},
    ClearedField.RPM: {"rpm": None},
    ClearedField.TPM: {"tpm": None},
    ClearedField.MAX_CONCURRENT: {"max_concurrent": None},
    ClearedField.MODELS: {"models": ()},
    ClearedField.TARGETS: {"targets": ()},
    ClearedField.EXPIRES: {"expires_at": None},
}

Url = Annotated[str, typer.Argument(metavar="URL", show_default=False, help="The key file, such as sqlite:///keys.db.")]
Name = Annotated[str, typer.Argument(metavar="NAME", show_default=False, help="The name of the key.")]
Tenant = Annotated[
    str | None, typer.Option(metavar="TEXT", help="Tenant of its calls; without one each key is its own tenant.")
]
SetsTenant = Annotated[
    bool | None,
    typer.Option("--sets-tenant/--no-sets-tenant", help="Whether its callers may name another tenant for each call."),
]
DefaultPriority = Annotated[KeyPriority | None, typer.Option(help="Of calls that ask for none; default normal.")]
MaxPriority = Annotated[
    KeyPriority | None, typer.Option(help="The best that its calls may ask for; without it --priority.")
]
BudgetUsd = Annotated[float | None, typer.Option(metavar="X", help="US dollars that its calls may spend in a period.")]
BudgetPer = Annotated[
    BudgetPeriodName | None, typer.Option(help="The period, by the calendar in UTC; total never renews. Default day.")
]
Rpm = Annotated[int | None, typer.Option(metavar="N", help="Requests per minute.")]
Tpm = Annotated[int | None, typer.Option(metavar="N", help="LLM tokens per minute, input and output.")]
MaxConcurrent = Annotated[int | None, typer.Option(metavar="N", help="Calls in progress at a time.")]
Models = Annotated[
    list[str] | None, typer.Option("--model", metavar="PATTERN", help="A model that it may call; repeatable.")
]
Targets = Annotated[
    list[str] | None, typer.Option("--target", metavar="NAME", help="A target that it may call; repeatable.")
]
Expires = Annotated[
    str | None,
    typer.Option(metavar="WHEN", help=f"When it expires: a date in UTC, such as 2027-01-31, or {_FORMS}."),
]


@keys.command()
def create(  # noqa: PLR0913 - one option for each field
    url: Url,
    name: Name,
    *,
    tenant: Tenant = None,
    sets_tenant: SetsTenant = None,
    priority: DefaultPriority = None,
    max_priority: MaxPriority = None,
    budget_usd: BudgetUsd = None,
    budget_per: BudgetPer = None,
    rpm: Rpm = None,
    tpm: Tpm = None,
    max_concurrent: MaxConcurrent = None,
    model: Models = None,
    target: Targets = None,
    expires: Expires = None,
    as_json: AsJson = False,
) -> None:
    """Create a key, and print it: it is never shown again. The file is made if it is missing."""
    now, text = clock.wall_time(), new_key()
    if budget_per is not None and budget_usd is None:
        fail("--budget-per is the period of --budget-usd, which is not given", status=USAGE_ERROR)
    given = {
        "tenant": tenant,
        "sets_tenant": sets_tenant,
        "priority": priority,
        "max_priority": max_priority,
        "budget_usd": budget_usd,
        "budget_per": budget_per,
        "rpm": rpm,
        "tpm": tpm,
        "max_concurrent": max_concurrent,
        "models": model,
        "targets": target,
    }
    fields = _fields(given, expires, now)
    stored = _run(url, lambda file: file.create(IssuedKey(name=name, created_at=now, **fields), text), create=True)
    _print_secret(stored, text, as_json=as_json, what="created")


@keys.command("list")
def list_(
    url: Url,
    *,
    every: Annotated[bool, typer.Option("--all", help="Those that were revoked, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the keys by their names. The keys themselves are not in the file, only hashes."""
    found = [stored for stored in _run(url, KeyFile.list) if every or stored.key.revoked_at is None]
    now = clock.wall_time()
    if as_json:
        print_json([_as_dict(stored, now) for stored in found])
        return
    titles = ("name", "key", "state", "tenant", "priority", "budget", "limits", "may call", "expires", "last used")
    typer.echo(text_table(titles, [_row(stored, now) for stored in found]) if found else "no keys")


@keys.command()
def show(url: Url, name: Name, *, as_json: AsJson = False) -> None:
    """Show one key: what it may do, its secrets by their beginnings, and when it was used last."""
    stored, now = _run(url, lambda file: file.get(name)), clock.wall_time()
    if as_json:
        print_json(_as_dict(stored, now))
        return
    _print_key(stored, now)


@keys.command()
def update(  # noqa: PLR0913 - one option for each field
    url: Url,
    name: Name,
    *,
    tenant: Tenant = None,
    sets_tenant: SetsTenant = None,
    priority: DefaultPriority = None,
    max_priority: MaxPriority = None,
    budget_usd: BudgetUsd = None,
    budget_per: BudgetPer = None,
    rpm: Rpm = None,
    tpm: Tpm = None,
    max_concurrent: MaxConcurrent = None,
    model: Models = None,
    target: Targets = None,
    expires: Expires = None,
    enabled: Annotated[
        bool | None, typer.Option("--enable/--disable", help="Whether it is accepted, until that is changed again.")
    ] = None,
    clear: Annotated[list[ClearedField] | None, typer.Option(help="A field to remove; repeatable.")] = None,
    as_json: AsJson = False,
) -> None:
    """Change what a key may do. What is not given stays as it is; running gateways follow within two seconds."""
    now = clock.wall_time()
    given = {
        "tenant": tenant,
        "sets_tenant": sets_tenant,
        "priority": priority,
        "max_priority": max_priority,
        "budget_usd": budget_usd,
        "budget_per": budget_per,
        "rpm": rpm,
        "tpm": tpm,
        "max_concurrent": max_concurrent,
        "models": model,
        "targets": target,
        "enabled": enabled,
    }
    changes = _fields(given, expires, now)
    for field in clear or ():
        if any(each in changes for each in _CLEARED[field]):
            fail(f"give --{field} or --clear {field}, not both", status=USAGE_ERROR)
        changes |= _CLEARED[field]
    if not changes:
        fail("say what to change: forebay keys update --help has the options", status=USAGE_ERROR)
    stored = _run(url, lambda file: file.update(name, changes))
    if as_json:
        print_json(_as_dict(stored, now))
    else:
        _print_key(stored, now)


@keys.command()
def rotate(
    url: Url,
    name: Name,
    *,
    grace: Annotated[
        str, typer.Option(metavar="TIME", help=f"How long the key before stays valid: {_FORMS}; 0s for not at all.")
    ] = "1d",
    as_json: AsJson = False,
) -> None:
    """Give a key another secret, and print it: it is never shown again. What the key may do stays as it is."""
    seconds = _seconds(grace)
    if seconds is None:
        fail(f"--grace: {one_line(grace, 40)!r} is not a time: {_FORMS}", status=USAGE_ERROR)
    now, text = clock.wall_time(), new_key()
    stored = _run(url, lambda file: file.rotate(name, text, now=now, grace=seconds))
    _print_secret(stored, text, as_json=as_json, what="rotated")


@keys.command()
def revoke(url: Url, name: Name, *, as_json: AsJson = False) -> None:
    """Refuse a key for good, with all its secrets. Calls in progress end as they are."""
    now = clock.wall_time()
    stored = _run(url, lambda file: file.revoke(name, now=now))
    if as_json:
        print_json(_as_dict(stored, now))
    else:
        typer.echo(f"key {name} is revoked; running gateways refuse it within two seconds")


# --- the file --------------------------------------------------------------------------------------------------------


def _run(url: str, action: Callable[[KeyFile], T], *, create: bool = False) -> T:
    """Return what `action` returns of the key file; if it cannot, print why and exit."""
    try:
        with KeyFile(parse_keys_url(url), create=create) as file:
            return action(file)
    except (InvalidKeysUrl, InvalidSetting) as error:
        fail(str(error), status=USAGE_ERROR)
    except ForebayError as error:
        fail(str(error))


def _fields(given: Mapping[str, Any], expires: str | None, now: float) -> dict[str, Any]:
    """Return the fields of a key that were given as options."""
    fields: dict[str, Any] = {}
    for name, value in given.items():
        if value is not None:
            fields[name] = value.value if isinstance(value, StrEnum) else tuple(value) if name[-1] == "s" else value
    for name in ("models", "targets"):
        if any("," in each for each in fields.get(name, ())):
            fail(f"--{name[:-1]}: give one at a time, and the option several times, instead of commas", USAGE_ERROR)
    if expires is not None:
        fields["expires_at"] = _time(expires, now)
    return fields


def _time(text: str, now: float) -> float:
    """Return the epoch seconds of a date, or of the end of a time from now; if it is neither, print so and exit."""
    at = now + seconds if (seconds := _seconds(text)) is not None else _moment(text)
    if at <= now:
        fail(f"--expires: {one_line(text, 40)} has passed: to refuse a key at once, revoke or disable it", USAGE_ERROR)
    return at


def _moment(text: str) -> float:
    """Return the epoch seconds of a date; if it is none, print so and exit."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        fail(f"--expires: {one_line(text, 40)!r} is neither a date, such as 2027-01-31, nor {_FORMS}", USAGE_ERROR)
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()


def _seconds(text: str) -> float | None:
    """Return the seconds of a time such as ``30d``; None if it is not one."""
    found = _DURATION.fullmatch(text.strip().lower())
    return None if found is None else float(found[1]) * _UNITS[found[2]]


# --- what is printed -------------------------------------------------------------------------------------------------


def _print_secret(stored: StoredKey, text: str, *, as_json: bool, what: str) -> None:
    now = clock.wall_time()
    if as_json:
        print_json({"key": text, **_as_dict(stored, now)})
        return
    typer.echo(text)  # alone on stdout, so that a shell can take it
    typer.echo(f"{what} key {stored.key.name}: keep it now, it is not shown again", err=True)
    for secret in stored.secrets[:-1]:
        if secret.valid_until is not None and secret.valid_until > now:
            typer.echo(f"the one before ({secret.hint}...) is valid until {date(secret.valid_until)}", err=True)
        elif secret.valid_until is not None:
            typer.echo(f"the one before ({secret.hint}...) is not valid any more", err=True)


def _as_dict(stored: StoredKey, now: float) -> dict[str, Any]:
    key = stored.key
    return {
        "name": key.name,
        "state": key.state(now),
        "tenant": key.tenant_name,
        "sets_tenant": key.sets_tenant,
        "priority": key.priority,
        "max_priority": key.best_priority.name.lower(),
        "budget_usd": key.budget_usd,
        "budget_per": None if key.budget_usd is None else key.budget_per,
        "rpm": key.rpm,
        "tpm": key.tpm,
        "max_concurrent": key.max_concurrent,
        "models": list(key.models),
        "targets": list(key.targets),
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
        "last_used": stored.last_used,
        "secrets": [
            {"hint": secret.hint, "created_at": secret.created_at, "valid_until": secret.valid_until}
            for secret in stored.secrets
        ],
    }


def _row(stored: StoredKey, now: float) -> tuple[str, ...]:
    key = stored.key
    return (
        key.name,
        f"{stored.secrets[-1].hint}..." if stored.secrets else "",
        key.state(now),
        key.tenant_name,
        _priorities(key),
        _budget(key),
        _limits(key),
        _allowed(key),
        "" if key.expires_at is None else relative(key.expires_at, now),
        "" if stored.last_used is None else _ago(stored.last_used, now),
    )


def _priorities(key: IssuedKey) -> str:
    best = key.best_priority.name.lower()
    return key.priority if best == key.priority else f"{key.priority}, up to {best}"


def _budget(key: IssuedKey) -> str:
    if key.budget_usd is None:
        return ""
    return f"{key.budget_usd:,.12g} USD {'in all' if key.budget_per == 'total' else f'per {key.budget_per}'}"


def _limits(key: IssuedKey) -> str:
    limits = {"rpm": key.rpm, "tpm": key.tpm, "at a time": key.max_concurrent}
    return ", ".join(f"{amount:,} {what}" for what, amount in limits.items() if amount is not None)


def _allowed(key: IssuedKey) -> str:
    targets = f"at {', '.join(key.targets)}" if key.targets else ""
    return " ".join(part for part in (", ".join(key.models), targets) if part)


def _ago(at: float, now: float) -> str:
    return "within the hour" if now - at < math.ceil(_UNITS["h"]) else relative(at, now)


def _print_key(stored: StoredKey, now: float) -> None:
    key = stored.key
    fields = {
        "name": key.name,
        "state": key.state(now),
        "tenant": f"{key.tenant_name}{', unless a call names another' if key.sets_tenant else ''}",
        "priority": _priorities(key),
        "budget": _budget(key) or "none",
        "limits": _limits(key) or "none",
        "may call": _allowed(key) or "every model at every target",
        "created": f"{date(key.created_at)} ({relative(key.created_at, now)})",
        "expires": _NEVER if key.expires_at is None else f"{date(key.expires_at)} ({relative(key.expires_at, now)})",
        "revoked": "" if key.revoked_at is None else f"{date(key.revoked_at)} ({relative(key.revoked_at, now)})",
        "last used": _NEVER if stored.last_used is None else _ago(stored.last_used, now),
    }
    width = max(map(len, fields))
    for name, value in fields.items():
        if value:
            typer.echo(f"{name.ljust(width)}  {one_line(value)}")
    for secret in stored.secrets:
        until = "" if secret.valid_until is None else f", valid until {date(secret.valid_until)}"
        gone = "" if secret.is_valid(now) else " (not any more)"
        typer.echo(f"{'secret'.ljust(width)}  {secret.hint}... of {date(secret.created_at)}{until}{gone}")
