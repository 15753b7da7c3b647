"""The provider that the agents call: simulated, in a process of its own, or a real one named by the environment."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Final
from urllib.parse import urlsplit

import msgspec

from demo.settings import Settings
from forebay.errors import ForebayError
from forebay.simulation.provider.provider_config import (
    PRICES,
    Dialect,
    Faults,
    ProviderConfig,
    SimulatedRateLimit,
    TokenPrice,
    Unit,
)
from forebay.simulation.provider.provider_process import ProviderProcess, start_provider

KEY: Final = "PROVIDER_API_KEY"  # a side's process finds it in its environment, never on its command line

RPM: Final = 720
"""Calls a minute that the key grants: 12 a second, 240 runs of three calls a minute.

One process can make far more (about 85 a second), and the agents would: an answer takes 0.5 s to its first token and
then 10 ms a token (100 tokens a second), 2.6 s at the mean length of the Azure conversation trace, 211 tokens.
So by Little's law fifty agents ask for 19 calls a second, half as much again as is granted, and the key limits them.
"""
_BURST: Final = 120  # calls: ten seconds' worth


class MissingKey(ForebayError, LookupError):
    """PROVIDER_URL is {url!r}, but the environment has no key for it: set PROVIDER_API_KEY or OPENAI_API_KEY."""

    url: str


class Provider(msgspec.Struct, frozen=True, kw_only=True):
    """An OpenAI-compatible server.

    Attributes:
        url: for ``OpenAI(base_url=...)``.
        model: what is asked for.
        simulated: it is the simulated provider, which gets the length of each answer in a header.
    """

    url: str
    model: str = "gpt-4o"
    simulated: bool = True

    @property
    def rules(self) -> str:
        """Name of its row in `docs/providers.md`: OpenAI's for OpenAI itself, else that of all compatible servers."""
        return "openai" if urlsplit(self.url).hostname == "api.openai.com" else "openai-compatible"

    @property
    def price(self) -> TokenPrice | None:
        """List price of its tokens; None if it is not known here."""
        names = sorted((name for name in PRICES if self.model.startswith(name)), key=len)
        return PRICES[names[-1]] if names else None


def provider_from(environment: Mapping[str, str]) -> tuple[Provider, str] | None:
    """Return the real provider that the environment names, and its key; None if it names no provider.

    Raises:
        MissingKey: it names a provider but no key.
    """
    url = environment.get("PROVIDER_URL")
    if not url:
        return None
    key = environment.get(KEY) or environment.get("OPENAI_API_KEY")
    if not key:
        raise MissingKey(url=url)
    return Provider(url=url, model=environment.get("PROVIDER_MODEL") or "gpt-4o-mini", simulated=False), key


def provider_config(settings: Settings) -> ProviderConfig:
    """Return a simulated provider with a tight rate limit, ample machines, and the faults of an ordinary day."""
    speed = settings.speed
    return ProviderConfig(
        dialect=Dialect.OPENAI,
        slots=1000,
        ttft=0.5 / speed,
        tpot=0.01 / speed,
        noise=0.15,
        rate_limits=(SimulatedRateLimit(unit=Unit.REQUESTS, amount=round(RPM * speed), burst=_BURST),),
        faults=Faults(
            stray=0.003,
            error=0.003,
            bad_gateway=0.001,
            unavailable=0.002,
            cut=0.001,
            straggler=0.01,
            straggler_factor=3.0,
        ),
        max_runs=0,
    )


@contextlib.contextmanager
def open_provider(settings: Settings, real: Provider | None) -> Iterator[tuple[Provider, ProviderProcess | None]]:
    """Yield the real provider if there is one, else a new simulated one, the same for each side."""
    if real is not None:
        yield real, None
        return
    _bypass_proxies()
    with start_provider(provider_config(settings), seed=settings.seed) as process:
        yield Provider(url=process.openai_url), process


def _bypass_proxies() -> None:
    """Exempt this machine from the proxies of the environment: the simulated provider runs here."""
    for name in ("no_proxy", "NO_PROXY"):
        others = os.environ.get(name)
        os.environ[name] = f"{others},127.0.0.1" if others else "127.0.0.1"


def warning(provider: Provider, settings: Settings) -> str:
    """Return a warning of what a demo on a real provider may cost at most."""
    calls = 3 * settings.tasks
    return (
        f"This calls {provider.url} (model {provider.model}) and may spend real money: {settings.tasks:,} tasks, three"
        f" times, of three calls each, a call of up to 1,000 output tokens. Two of the sides repeat a run that fails up"
        f" to six times, so at worst each pays for {6 * calls:,} calls. Choose the size with --tasks."
    )
