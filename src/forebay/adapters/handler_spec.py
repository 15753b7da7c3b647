"""The agent that a worker was registered with, before an engine decides where it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from forebay._hooks import is_async
from forebay.adapters.detect import as_handler
from forebay.adapters.factory import handler_from_factory
from forebay.adapters.handler import Config, Handler
from forebay.adapters.import_paths import import_object
from forebay.errors import InvalidHandler, InvalidSetting
from forebay.task import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class HandlerSpec:
    """An agent or its factory, with its settings: an engine builds the Handler from it, here or in another process.

    Attributes:
        worker: the worker's name, for messages.
        handler: the agent, or the import path of one.
        factory: used instead of a handler: makes a new agent for each task; or the import path of such a callable.
        config: the framework's own configuration.
        on_cancel: stops a run, instead of the agent's own way.

    Raises:
        InvalidSetting: both a handler and a factory are given.
    """

    worker: str
    handler: Any = None
    factory: Callable[[], Any] | str | None = None
    config: Config | None = None
    on_cancel: Callable[[Task], object] | None = None

    def __post_init__(self) -> None:
        if self.handler is not None and self.factory is not None:
            expected = "left out, because handler= is given too: pass one of the two"
            raise InvalidSetting(owner=f"worker {self.worker!r}", name="factory", value=self.factory, expected=expected)

    def build(self) -> Handler:
        """Return the Handler that runs the agent in this process.

        Raises:
            InvalidHandler, InvalidSetting: it cannot be run.
        """
        if self.factory is not None:
            handler = handler_from_factory(self._resolve(self.factory), worker=self.worker, config=self.config)
        else:
            handler = as_handler(self._resolve(self.handler), worker=self.worker, config=self.config)
        self._check_plain("on_end", handler.on_end)
        self._check_plain("load", handler.load)
        return handler if self.on_cancel is None else replace(handler, on_cancel=self.on_cancel)

    def _check_plain(self, name: str, hook: object) -> None:
        """Check that a hook whose value is not awaited is a plain function."""
        if hook is not None and is_async(hook):
            hint = f"{name} of its Handler is an async function, which nothing awaits: make it a plain one"
            raise InvalidHandler(worker=self.worker, type="Handler", hint=hint)

    def _resolve(self, given: Any) -> Any:
        """Return the object that an import path names; anything else as it is."""
        if not isinstance(given, str) or ":" not in given:
            return given
        try:
            return import_object(given)
        except (ImportError, AttributeError, ValueError) as error:
            hint = f'the import path "package.module:name" {given!r} cannot be imported: {error}'
            raise InvalidHandler(worker=self.worker, type="str", hint=hint) from error
