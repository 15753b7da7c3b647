"""A simulated provider for one test: over HTTP, or as a model inside the event loop."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, Final

import msgspec

from forebay.errors import ForebayError
from forebay.sim import (
    Allowance,
    Bill,
    Completion,
    Provider,
    ProviderConfig,
    RunningPlant,
    SimulatedProvider,
    Statistics,
    Unit,
    start_plant,
)

QUICK: Final = ProviderConfig(ttft=0.01, tpot=0.0001, noise=0.0)
"""What a test meets unless it says otherwise: fifty calls at a time, each in some hundredths of a second; no limits, no
faults."""

_UNITS: Final = {"rpm": Unit.REQUESTS, "tpm": Unit.TOKENS, "itpm": Unit.INPUT_TOKENS, "otpm": Unit.OUTPUT_TOKENS}


class PlantNotInstalled(ForebayError, ImportError):
    """The simulated provider speaks HTTP by aiohttp, which is not installed: pip install 'forebay[testing]'."""


class Plants:
    """One plant's process, started when it is first asked for, and lent to one test after the other."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._plant: RunningPlant | None = None

    def begin(self, config: ProviderConfig) -> RunningPlant:
        """The plant, from its second 0, as `config` says.

        Raises:
            PlantNotInstalled: aiohttp is not there.
            PlantFailed: it did not start.
        """
        if self._plant is None:
            if find_spec("aiohttp") is None:
                raise PlantNotInstalled
            self._plant = self._stack.enter_context(start_plant(config))
        else:
            self._plant.reset(config)
        return self._plant

    def close(self) -> None:
        """End it."""
        self._plant = None
        self._stack.close()


class ProviderDouble:
    """A simulated LLM provider for one test, with limits and faults to order.

    A test uses one of two ways:

    - over HTTP, for real SDKs in real time: `openai_url` and `anthropic_url`, served by a process of its own;
    - in the event loop, for virtual time: `call`, or `model` itself.

    Attributes:
        config: what it is like.
    """

    def __init__(self, plants: Plants) -> None:
        self.config = QUICK
        self._plants = plants
        self._plant: RunningPlant | None = None
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
        rates = [Allowance(unit=unit, amount=fields.pop(name)) for name, unit in _UNITS.items() if name in fields]
        if rates:
            fields["allowances"] = (*fields.get("allowances", ()), *rates)
        self.config = replace(self.config if config is None else config, **fields)
        self._seed = seed
        self._model = None
        if self._plant is not None:
            self._plant.reset(self.config)

    # --- over HTTP ---

    @property
    def plant(self) -> RunningPlant:
        """The provider as a process, started when first asked for: half a second, once in a run of tests.

        Raises:
            PlantNotInstalled: aiohttp is not there.
            PlantFailed: it did not start.
        """
        if self._plant is None:
            self._plant = self._plants.begin(self.config)
        return self._plant

    @property
    def openai_url(self) -> str:
        """For ``OpenAI(base_url=...)`` and its kin."""
        return self.plant.openai_url

    @property
    def anthropic_url(self) -> str:
        """For ``Anthropic(base_url=...)``."""
        return self.plant.url

    # --- in the event loop ---

    @property
    def model(self) -> SimulatedProvider:
        """The provider inside the running event loop, made when first asked for."""
        if self._model is None:
            self._model = SimulatedProvider(self.config, self._seed)
        return self._model

    async def call(
        self, *, model: str = "gpt-4o-mini", input_tokens: int = 500, output_tokens: int = 100, **rest: Any
    ) -> Completion:
        """Make one call and wait for its end, as `SimulatedProvider.call` does.

        Raises:
            Refusal: the provider would not; it has status, headers, body and retry_after as they go over the wire.
            Broken: it broke off in the middle.
        """
        return await self.model.call(model=model, input_tokens=input_tokens, output_tokens=output_tokens, **rest)

    # --- what it saw ---

    def statistics(self) -> Statistics:
        """Calls, refusals, tokens and dollars until now."""
        if self._plant is not None:
            return msgspec.convert(self._plant.statistics(), Statistics, strict=False)
        if self._model is not None:
            return self._model.statistics()
        return Provider(self.config).statistics()  # of one that nobody has called

    def bills(self) -> dict[str, Bill]:
        """The same for each run that calls named: by ``run=``, or by the header ``x-plant-run``."""
        if self._plant is not None:
            return msgspec.convert(self._plant.runs(), dict[str, Bill])
        return {} if self._model is None else self._model.bills()
