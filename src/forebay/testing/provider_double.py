"""A simulated LLM provider for one test: over HTTP, or in the event loop."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, Final

import msgspec

from forebay.errors import ForebayError
from forebay.simulation.provider import (
    Bill,
    CompletedCall,
    ProviderConfig,
    ProviderModel,
    ProviderProcess,
    ProviderStatistics,
    SimulatedProvider,
    start_provider,
)
from forebay.simulation.provider.provider_config import UNITS_BY_NAME, limits_per_minute

FAST_PROVIDER: Final = ProviderConfig(ttft=0.01, tpot=0.0001, noise=0.0)
"""The default of a test: fifty calls at a time, each in some hundredths of a second, without limits and faults."""


class SimulatedProviderNotInstalled(ForebayError, ImportError):
    """The simulated provider needs aiohttp to serve HTTP, and it is not installed: pip install 'forebay[testing]'."""


class SharedProviderProcess:
    """One process of the simulated provider, started on first use and lent to one test after the other."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._process: ProviderProcess | None = None

    def start(self, config: ProviderConfig) -> ProviderProcess:
        """Return the process with a provider at second 0, configured by `config`.

        Raises:
            SimulatedProviderNotInstalled: aiohttp is missing.
            ProviderProcessFailed: the process did not start.
        """
        if self._process is None:
            if find_spec("aiohttp") is None:
                raise SimulatedProviderNotInstalled
            self._process = self._stack.enter_context(start_provider(config))
        else:
            self._process.reset(config)
        return self._process

    def close(self) -> None:
        """End the process."""
        self._process = None
        self._stack.close()


class ProviderDouble:
    """A simulated LLM provider for one test, with configurable limits and faults.

    A test uses it in one of two ways:

    - over HTTP, for real SDKs in real time: `openai_url` and `anthropic_url`, served by a process of its own;
    - in the event loop, for virtual time: `call`, or `model` itself.

    Attributes:
        config: its current configuration.
    """

    def __init__(self, shared_process: SharedProviderProcess) -> None:
        self.config = FAST_PROVIDER
        self._shared_process = shared_process
        self._process: ProviderProcess | None = None
        self._model: SimulatedProvider | None = None
        self._seed = 0

    def configure(self, config: ProviderConfig | None = None, /, *, seed: int = 0, **fields: Any) -> None:
        """Change the configuration; a provider that is in use restarts at second 0.

        Args:
            config: a whole configuration; None: the current one.
            seed: seeds the randomness of the provider in the event loop.
            **fields: fields of `ProviderConfig` to change, such as ``slots=5`` or ``faults=Faults(error=0.1)``; also
                `rpm`, `tpm`, `itpm` and `otpm`: requests, tokens, input tokens and output tokens a minute.

        Raises:
            InvalidProviderConfig: a value is out of range.
            TypeError: there is no such field.
        """
        limits = limits_per_minute(**{name: fields.pop(name) for name in UNITS_BY_NAME if name in fields})
        if limits:
            fields["rate_limits"] = (*fields.get("rate_limits", ()), *limits)
        self.config = replace(self.config if config is None else config, **fields)
        self._seed = seed
        self._model = None
        if self._process is not None:
            self._process.reset(self.config)

    # --- over HTTP ---

    @property
    def process(self) -> ProviderProcess:
        """The provider's process. The first use in a test session starts it, in about half a second.

        Raises:
            SimulatedProviderNotInstalled: aiohttp is missing.
            ProviderProcessFailed: the process did not start.
        """
        if self._process is None:
            self._process = self._shared_process.start(self.config)
        return self._process

    @property
    def openai_url(self) -> str:
        """The URL for ``OpenAI(base_url=...)`` and similar clients."""
        return self.process.openai_url

    @property
    def anthropic_url(self) -> str:
        """The URL for ``Anthropic(base_url=...)``."""
        return self.process.url

    # --- in the event loop ---

    @property
    def model(self) -> SimulatedProvider:
        """The provider in the running event loop, created on first use."""
        if self._model is None:
            self._model = SimulatedProvider(self.config, self._seed)
        return self._model

    async def call(
        self, *, model: str = "gpt-4o-mini", input_tokens: int = 500, output_tokens: int = 100, **rest: Any
    ) -> CompletedCall:
        """Make one call and wait for its end, as `SimulatedProvider.call` does.

        Raises:
            ProviderRefusal: the provider refused the call; it has the status, headers and body of the HTTP response.
            AnswerCut: the provider ended the answer early.
        """
        return await self.model.call(model=model, input_tokens=input_tokens, output_tokens=output_tokens, **rest)

    # --- readings ---

    def statistics(self) -> ProviderStatistics:
        """Return the calls, refusals, tokens and dollars until now."""
        if self._process is not None:
            return msgspec.convert(self._process.statistics(), ProviderStatistics, strict=False)
        if self._model is not None:
            return self._model.statistics()
        return ProviderModel(self.config).statistics()  # of a provider that got no call

    def bills(self) -> dict[str, Bill]:
        """Return the bill of each run that calls named with ``run=`` or the header ``x-simulated-run``."""
        if self._process is not None:
            return msgspec.convert(self._process.runs(), dict[str, Bill])
        return {} if self._model is None else self._model.bills()
