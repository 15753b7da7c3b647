"""AgentCopies: copies of an agent or a team as it was when it was registered, so that each run has one."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from io import BytesIO
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, Final

from autogen_agentchat.conditions import TimeoutTermination
from autogen_agentchat.teams import BaseGroupChat
from autogen_agentchat.tools import AgentTool, TeamTool
from autogen_core import CacheStore, SingleThreadedAgentRuntime
from autogen_core.code_executor import CodeExecutor
from autogen_core.memory import Memory
from autogen_core.models import ChatCompletionClient
from autogen_core.tools import BaseTool, FunctionTool, StaticWorkbench, Workbench

from forebay._hooks import is_async
from forebay.adapters.agent_thread import AgentThread
from forebay.adapters.autogen.agent_run import RunRuntime, is_stopped

# What has no part in a conversation, or is meant to be shared: bound clients stay bound.
_SHARED: Final = (ChatCompletionClient, BaseTool, Workbench, Memory, CacheStore)
_SHARED_VALUES: Final = (type, FunctionType, BuiltinFunctionType, ModuleType, ContextVar)
_SHARED_PACKAGES: Final = frozenset({"anthropic", "forebay", "httpx", "httpx2", "openai"})
_COPIED: Final = (AgentTool, TeamTool, StaticWorkbench)
_OWN_PACKAGES: Final = frozenset(
    {"asyncio", "autogen_agentchat", "autogen_core", "autogen_ext", "builtins", "collections"}
)


class CannotCopy(Exception):
    """An agent cannot be copied."""


class WasRun(Exception):
    """A team has been run, so a copy of it would not have its conversation."""


class HasRuntime(Exception):
    """A team has a runtime that it was given, in which a copy of it cannot be registered."""


class AgentCopies:
    """Makes copies of an agent or a team, as it is now.

    Model clients, tools, memories and functions are those of the original. Messages, conditions, agents and teams are
    copied, also inside of tools, and so is whatever a class of yours has in its attributes.

    Args:
        agent: the original, which no run uses.
        shares_foreign: whether objects of classes that AutoGen does not know are shared instead of copied; then a
            single copy may be used.

    Raises:
        CannotCopy: a part of it cannot be copied, such as a lock or a connection.
        WasRun, HasRuntime: of a team.
    """

    def __init__(self, agent: Any, *, shares_foreign: bool = False) -> None:
        buffer = BytesIO()
        pickler = _Pickler(buffer, shares_foreign=shares_foreign)
        try:
            pickler.dump(agent)
            self._shared = pickler.shared
            self._state = buffer.getvalue()
            self.make()
        except (CannotCopy, HasRuntime, WasRun):
            raise
        except Exception as error:
            raise CannotCopy(str(error)) from error

    def make(self) -> Any:
        """Return a copy."""
        return _Unpickler(BytesIO(self._state), self._shared).load()


class _Pickler(pickle.Pickler):
    """Writes what is copied, and numbers what is shared: its bytes are read in this process alone."""

    def __init__(self, buffer: BytesIO, *, shares_foreign: bool) -> None:
        super().__init__(buffer, protocol=pickle.HIGHEST_PROTOCOL)
        self.shared: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._seen: list[Any] = []  # kept, so that no other object gets the id of one of them
        self._shares_foreign = shares_foreign

    def persistent_id(self, obj: Any) -> int | None:
        """Return the number of an object that copies share; None for one that is copied."""
        if isinstance(obj, BaseGroupChat):
            _check_team(obj)
            return None
        if id(obj) in self._numbers:
            return self._numbers[id(obj)]
        if isinstance(obj, FunctionTool):
            return self._share(obj, _in_thread(obj))
        if _is_shared(obj) or (self._shares_foreign and _is_foreign(obj)):
            return self._share(obj, obj)
        if isinstance(obj, CodeExecutor):
            raise CannotCopy("a code executor keeps files and variables from run to run")
        return None

    def reducer_override(self, obj: Any) -> Any:
        """Return how an object is made instead of copied."""
        if isinstance(obj, SingleThreadedAgentRuntime):  # of a team, which registers its agents when it is run
            return RunRuntime, ()
        if isinstance(obj, asyncio.Queue):
            return asyncio.Queue, (obj.maxsize,)
        if type(obj) is TimeoutTermination:  # its time starts now
            return TimeoutTermination, (obj._timeout_seconds,)  # noqa: SLF001 - in no other place
        return NotImplemented

    def _share(self, obj: Any, used: Any) -> int:
        number = self._numbers[id(obj)] = len(self.shared)
        self._seen.append(obj)
        self.shared.append(used)
        return number


class _Unpickler(pickle.Unpickler):
    """Reads what a `_Pickler` has written."""

    def __init__(self, buffer: BytesIO, shared: list[Any]) -> None:
        super().__init__(buffer)
        self._shared = shared

    def persistent_load(self, pid: Any) -> Any:
        """Return the shared object of a number."""
        return self._shared[pid]


def _is_shared(obj: Any) -> bool:
    if isinstance(obj, _SHARED_VALUES):
        return True
    if isinstance(obj, _SHARED):
        return not isinstance(obj, _COPIED)
    return _package(obj) in _SHARED_PACKAGES


def _is_foreign(obj: Any) -> bool:
    return isinstance(obj, CodeExecutor) or _package(obj) not in _OWN_PACKAGES


def _package(obj: Any) -> str:
    return type(obj).__module__.partition(".")[0]


def _check_team(team: Any) -> None:
    if not team._embedded_runtime:  # noqa: SLF001 - nothing public tells
        raise HasRuntime
    if team._initialized or team._is_running:  # noqa: SLF001
        raise WasRun


def _in_thread(tool: Any) -> Any:
    """Return a tool whose plain function runs in an AgentThread."""
    made = copy.copy(tool)
    function = tool._func  # noqa: SLF001 - the tool calls a plain one in the wrong place
    made._func = _contained(function if is_async(function) else _threaded(function))  # noqa: SLF001
    return made


def _threaded(function: Callable[..., Any]) -> Callable[..., Any]:
    async def call(**arguments: Any) -> Any:
        return await AgentThread().run(partial(function, **arguments))

    return call


def _contained(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that fails where `function` exits, or is cancelled by itself.

    AutoGen calls it in a task: an exit would end the loop, and after anything else that is no Exception the run would
    never end.
    """

    async def call(**arguments: Any) -> Any:
        try:
            return await function(**arguments)
        except asyncio.CancelledError as error:
            if is_stopped():
                raise
            raise RuntimeError("what the tool has waited for was cancelled") from error
        except Exception:
            raise
        except BaseException as error:
            raise RuntimeError(f"the tool raised {type(error).__name__}") from error

    return call
