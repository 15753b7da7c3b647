"""What a worker was registered with, before it is known where it will run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from forebay.adapters.detect import Config, as_handler
from forebay.adapters.factory import handler_from_factory
from forebay.adapters.handler import Handler
from forebay.adapters.import_paths import import_object
from forebay.errors import InvalidHandler, InvalidSetting
from forebay.task import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class HandlerSpec:
    """An agent, or what makes one, and what it is run with: an engine makes the Handler of it, or has another process.

    Attributes:
        worker: the worker's name, for messages.
        handler: the agent, or the import path of one.
        factory: instead of a handler: makes a fresh agent for each task; or the import path of one that does.
        config: the framework's own configuration.
        on_cancel: how to stop a run, instead of the agent's own way.

    Raises:
        InvalidSetting: it has both a handler and a factory.
    """

    worker: str
    handler: Any = None
    factory: Callable[[], Any] | str | None = None
    config: Config | None = None
    on_cancel: Callable[[Task], object] | None = None

    def __post_init__(self) -> None:
        if self.handler is not None and self.factory is not None:
            expected = "left out, since it has a handler"
            raise InvalidSetting(owner=f"worker {self.worker!r}", name="factory", value=self.factory, expected=expected)

    def build(self) -> Handler:
        """The Handler of it, to be run in this process.

        Raises:
            InvalidHandler, InvalidSetting: it cannot be run.
        """
        if self.factory is not None:
            bound = handler_from_factory(self._found(self.factory), worker=self.worker, config=self.config)
        else:
            bound = as_handler(self._found(self.handler), worker=self.worker, config=self.config)
        return bound if self.on_cancel is None else bound.with_on_cancel(self.on_cancel)

    def _found(self, given: Any) -> Any:
        if not isinstance(given, str) or ":" not in given:
            return given
        try:
            return import_object(given)
        except (ImportError, AttributeError, ValueError) as error:
            hint = f'as an import path, "package.module:name", {given!r} leads nowhere: {error}'
            raise InvalidHandler(worker=self.worker, type="str", hint=hint) from error
