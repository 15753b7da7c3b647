"""Keys that a gateway issues to its callers: what each may do, and the text of a key, of which only a hash is kept."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Final, Literal, NoReturn

import msgspec

from forebay import clock
from forebay._validate import is_number, is_positive, is_whole, reject
from forebay.errors import ForebayError
from forebay.quota import Budget, Quota
from forebay.task import Priority

KEY_PREFIX: Final = "fb-"
"""The beginning of every key, by which scanners for leaked secrets, and this gateway, recognise one."""

PRIORITIES: Final[Mapping[str, Priority]] = MappingProxyType({each.name.lower(): each for each in Priority})
"""The priorities by their names."""

BudgetPeriod = Literal["hour", "day", "month", "total"]

_DIGITS: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_SECRET_BYTES: Final = 24
_SECRET_LENGTH: Final = 33  # digits of 24 bytes
_CHECKSUM_LENGTH: Final = 6  # digits of 32 bits
_KEY: Final = re.compile(rf"{KEY_PREFIX}[0-9A-Za-z]{{{_SECRET_LENGTH + _CHECKSUM_LENGTH}}}")
_HINT: Final = len(KEY_PREFIX) + 4  # characters of a key that are shown: the others have 172 random bits
_NAME: Final = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,62}"
)  # it appears in logs, in metrics and on the command line
_LABEL: Final = re.compile(r"[^\x00-\x1f\x7f]{1,256}")


class UnknownKey(ForebayError, LookupError):
    """There is no key {name!r} in {where}. `forebay keys list` has the names."""


class KeyExists(ForebayError, ValueError):
    """There is a key {name!r} in {where} already{state}. Give the new one another name, or update that one."""


class KeyRevoked(ForebayError, ValueError):
    """The key {name!r} was revoked, which cannot be undone: create another one."""


def new_key() -> str:
    """Return the text of a new key: a prefix, 192 random bits, and a checksum by which a mistyped one is recognised."""
    secret = KEY_PREFIX + _base62(int.from_bytes(clock.secret_bytes(_SECRET_BYTES)), _SECRET_LENGTH)
    return secret + _checksum(secret)


def is_well_formed(text: str) -> bool:
    """Return whether a text has the form and the checksum of a key."""
    return _KEY.fullmatch(text) is not None and text.endswith(_checksum(text[:-_CHECKSUM_LENGTH]))


def contains_key(text: str) -> bool:
    """Return whether a key stands anywhere in a text."""
    return KEY_PREFIX in text and _KEY.search(text) is not None


def hide_keys(text: str) -> str:
    """Return a text with asterisks for each key in it."""
    return _KEY.sub(f"{KEY_PREFIX}***", text) if KEY_PREFIX in text else text


def key_digest(text: str) -> bytes:
    """Return the hash by which a key is stored and found.

    A plain SHA-256 is enough: slow and salted hashes are for secrets that people choose, which can be guessed. Of 192
    random bits no share worth mentioning can be tried. And without a secret of its own, gateways can share a file.
    """
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def key_hint(text: str) -> str:
    """Return the beginning of a key, by which a person tells keys apart."""
    return text[:_HINT]


def _checksum(text: str) -> str:
    return _base62(zlib.crc32(text.encode()), _CHECKSUM_LENGTH)


def _base62(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, 62)
        digits.append(_DIGITS[digit])
    return "".join(reversed(digits))


class IssuedKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key that a gateway has issued, and what its callers may do.

    Attributes:
        name: unique in its file; it is no secret, and appears in logs and metrics.
        tenant: of its calls; None for the name of the key.
        sets_tenant: its callers may name another tenant for each call.
        priority: of its calls, unless they ask for another one.
        max_priority: the best that its calls may ask for; None for `priority`.
        budget_usd: US dollars that its calls may spend in each period.
        budget_per: the period, by the calendar in UTC; ``"total"`` never renews.
        rpm: requests per minute.
        tpm: LLM tokens per minute, sent and received together.
        max_concurrent: calls in progress at a time.
        models: patterns of the models that it may call; empty for all.
        targets: names of the targets that it may call; empty for all.
        expires_at: epoch seconds from which it is refused; None for never.
        enabled: False refuses it until it is enabled again.
        created_at: epoch seconds.
        revoked_at: epoch seconds since which it is refused for good; None if it was not revoked.

    Raises:
        InvalidSetting: a field is invalid.
    """

    name: str
    tenant: str | None = None
    sets_tenant: bool = False
    priority: str = "normal"
    max_priority: str | None = None
    budget_usd: float | None = None
    budget_per: BudgetPeriod = "day"
    rpm: int | None = None
    tpm: int | None = None
    max_concurrent: int | None = None
    models: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    expires_at: float | None = None
    enabled: bool = True
    created_at: float = 0.0
    revoked_at: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            self._reject("name", "1 to 63 letters, digits and ._@+- without spaces, a letter or digit first")
        if self.name.startswith(KEY_PREFIX):
            self._reject("name", f"a name, which does not begin with {KEY_PREFIX!r}, as keys do", hidden=True)
        if self.tenant is not None and not (isinstance(self.tenant, str) and _LABEL.fullmatch(self.tenant)):
            self._reject("tenant", "1 to 256 printable characters")
        self._check_priorities()
        self._check_limits()
        for name, what in (("models", "patterns of models, such as 'gpt-4o*'"), ("targets", "names of targets")):
            if not all(isinstance(each, str) and _LABEL.fullmatch(each) for each in getattr(self, name)):
                self._reject(name, what)
        if self.expires_at is not None and not is_number(self.expires_at):
            self._reject("expires_at", "epoch seconds")

    def _check_priorities(self) -> None:
        for name in ("priority", "max_priority"):
            value = getattr(self, name)
            if value not in PRIORITIES and not (name == "max_priority" and value is None):
                self._reject(name, ", ".join(PRIORITIES))
        if self.best_priority > PRIORITIES[self.priority]:
            self._reject("max_priority", f"at least as good as its priority, {self.priority}")

    def _check_limits(self) -> None:
        for name in ("rpm", "tpm", "max_concurrent"):
            value = getattr(self, name)
            if value is not None and not is_whole(value):
                self._reject(name, "a whole number of at least 1")
        if self.budget_usd is not None and not is_positive(self.budget_usd):
            self._reject("budget_usd", "a positive number of US dollars")
        if self.budget_per not in ("hour", "day", "month", "total"):
            self._reject("budget_per", "hour, day, month or total")

    def _reject(self, name: str, expected: str, *, hidden: bool = False) -> NoReturn:
        reject("key", name, object() if hidden else getattr(self, name), expected)

    @property
    def tenant_name(self) -> str:
        """The tenant of its calls: each key is its own unless it names another."""
        return self.tenant or self.name

    @property
    def default_priority(self) -> Priority:
        """The priority of calls that ask for none."""
        return PRIORITIES[self.priority]

    @property
    def best_priority(self) -> Priority:
        """The best priority that its calls may ask for."""
        return PRIORITIES[self.max_priority or self.priority]

    def allows_model(self, model: str) -> bool:
        """Return whether it may call a model."""
        return not self.models or any(fnmatchcase(model, pattern) for pattern in self.models)

    def allows_target(self, target: str) -> bool:
        """Return whether it may call a target."""
        return not self.targets or target in self.targets

    def quotas(self) -> tuple[Quota, ...]:
        """Return its rates."""
        requests = () if self.rpm is None else (Quota(requests=self.rpm, per="minute"),)
        return requests if self.tpm is None else (*requests, Quota(tokens=self.tpm, per="minute"))

    def budget(self) -> Budget | None:
        """Return its budget, or None."""
        if self.budget_usd is None:
            return None
        return Budget(usd=self.budget_usd, per=None if self.budget_per == "total" else self.budget_per)

    def state(self, now: float) -> str:
        """Return ``"active"``, or why it is refused at epoch second `now`."""
        if self.revoked_at is not None:
            return "revoked"
        if self.expires_at is not None and now >= self.expires_at:
            return "expired"
        return "active" if self.enabled else "disabled"


class KeySecret(msgspec.Struct, frozen=True, kw_only=True):
    """One of the secrets of a key: after a rotation, the one before stays valid for a while.

    Attributes:
        key: the name of the key.
        digest: its hash.
        hint: its beginning, for a person.
        created_at: epoch seconds.
        valid_until: epoch seconds from which it is refused; None for as long as its key is valid.
    """

    key: str
    digest: bytes
    hint: str
    created_at: float
    valid_until: float | None = None

    def is_valid(self, now: float) -> bool:
        """Return whether it is valid at epoch second `now`."""
        return self.valid_until is None or now < self.valid_until
