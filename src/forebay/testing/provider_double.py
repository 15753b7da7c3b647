"""A simulated provider for one test: over HTTP, or as a model inside the event loop."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, Final

import msgspec

from forebay.errors import ForebayError
from forebay.simulation import (
    Bill,
    CompletedCall,
    ProviderConfig,
    ProviderModel,
    ProviderProcess,
    ProviderStatistics,
    SimulatedProvider,
    SimulatedRateLimit,
    Unit,
    start_provider,
)

FAST_PROVIDER: Final = ProviderConfig(ttft=0.01, tpot=0.0001, noise=0.0)
"""What a test meets unless it says otherwise: fifty calls at a time, each in some hundredths of a second; no limits, no
faults."""

_UNITS: Final = {"rpm": Unit.REQUESTS, "tpm": Unit.TOKENS, "itpm": Unit.INPUT_TOKENS, "otpm": Unit.OUTPUT_TOKENS}


class SimulatedProviderNotInstalled(ForebayError, ImportError):
    """The simulated provider speaks HTTP by aiohttp, which is not installed: pip install 'forebay[testing]'."""


class SharedProviderProcess:
    """One plant's process, started when it is first asked for, and lent to one test after the other."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._process: ProviderProcess | None = None

    def start(self, config: ProviderConfig) -> ProviderProcess:
        """The plant, from its second 0, as `config` says.

        Raises:
            PlantNotInstalled: aiohttp is not there.
            PlantFailed: it did not start.
        """
        if self._process is None:
            if find_spec("aiohttp") is None:
                raise SimulatedProviderNotInstalled
            self._process = self._stack.enter_context(start_provider(config))
        else:
            self._process.reset(config)
        return self._process

    def close(self) -> None:
        """End it."""
        self._process = None
        self._stack.close()


class ProviderDouble:
    """A simulated LLM provider for one test, with limits and faults to order.

    A test uses one of two ways:

    - over HTTP, for real SDKs in real time: `openai_url` and `anthropic_url`, served by a process of its own;
    - in the event loop, for virtual time: `call`, or `model` itself.

    Attributes:
        config: what it is like.
    """

    def __init__(self, plants: SharedProviderProcess) -> None:
        self.config = FAST_PROVIDER
        self._shared_process = plants
        self._process: ProviderProcess | None = None
        self._model: SimulatedProvider | None = None
        self._seed = 0

    def configure(self, config: ProviderConfig | None = None, /, *, seed: int = 0, **fields: Any) -> None:
        """Say what it is like; if it is in use already, it begins anew.

        Args:
            config: all of it; None: what it is now.
            seed: what the chance of the model in the loop is drawn from.
            **fields: of a `ProviderConfig`, such as ``slots=5`` or ``faults=Faults(error=0.1)``; and in short `rpm`,
                `tpm`, `itpm` and `otpm`: requests, tokens, input tokens and output tokens a minute.

        Raises:
            InvalidProvider: a value is out of its range.
            TypeError: there is no such field.
        """
        rates = [
            SimulatedRateLimit(unit=unit, amount=fields.pop(name)) for name, unit in _UNITS.items() if name in fields
        ]
        if rates:
            fields["rate_limits"] = (*fields.get("rate_limits", ()), *rates)
        self.config = replace(self.config if config is None else config, **fields)
        self._seed = seed
        self._model = None
        if self._process is not None:
            self._process.reset(self.config)

    # --- over HTTP ---

    @property
    def process(self) -> ProviderProcess:
        """The provider as a process, started when first asked for: half a second, once in a run of tests.

        Raises:
            PlantNotInstalled: aiohttp is not there.
            PlantFailed: it did not start.
        """
        if self._process is None:
            self._process = self._shared_process.start(self.config)
        return self._process

    @property
    def openai_url(self) -> str:
        """For ``OpenAIWriter(base_url=...)`` and its kin."""
        return self.process.openai_url

    @property
    def anthropic_url(self) -> str:
        """For ``AnthropicWriter(base_url=...)``."""
        return self.process.url

    # --- in the event loop ---

    @property
    def model(self) -> SimulatedProvider:
        """The provider inside the running event loop, made when first asked for."""
        if self._model is None:
            self._model = SimulatedProvider(self.config, self._seed)
        return self._model

    async def call(
        self, *, model: str = "gpt-4o-mini", input_tokens: int = 500, output_tokens: int = 100, **rest: Any
    ) -> CompletedCall:
        """Make one call and wait for its end, as `SimulatedProvider.call` does.

        Raises:
            Refusal: the provider would not; it has status, headers, body and retry_after as they go over the wire.
            Broken: it broke off in the middle.
        """
        return await self.model.call(model=model, input_tokens=input_tokens, output_tokens=output_tokens, **rest)

    # --- what it saw ---

    def statistics(self) -> ProviderStatistics:
        """Calls, refusals, tokens and dollars until now."""
        if self._process is not None:
            return msgspec.convert(self._process.statistics(), ProviderStatistics, strict=False)
        if self._model is not None:
            return self._model.statistics()
        return ProviderModel(self.config).statistics()  # of one that nobody has called

    def bills(self) -> dict[str, Bill]:
        """The same for each run that calls named: by ``run=``, or by the header ``x-plant-run``."""
        if self._process is not None:
            return msgspec.convert(self._process.runs(), dict[str, Bill])
        return {} if self._model is None else self._model.bills()
