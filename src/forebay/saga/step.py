"""A step of a saga: what is called for it, under which conditions, and what its errors say about its effect."""

from __future__ import annotations

import asyncio
import inspect
import sys
import types
import typing
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import Executor
from contextvars import copy_context
from dataclasses import dataclass
from functools import lru_cache, partial, wraps
from typing import Any, TypeVar

from forebay._hooks import is_async, name_of
from forebay._text import error_text, is_unicode
from forebay.adapters import Handler, as_handler, codec_for, is_agent
from forebay.errors import InvalidSetting, InvalidStep
from forebay.interfaces import Codec
from forebay.retry import Retry
from forebay.task import Task

_MAX_NAME = 200  # characters of a step's name
# What errors of clients and SDKs say of an effect, by the names of their classes and of those that these derive from:
# none of these libraries is imported here. No connection was made:
_NOT_CONNECTED = frozenset(
    {
        "CertificateError",
        "ClientConnectorError",
        "ConnectError",
        "ConnectTimeout",
        "ConnectTimeoutError",
        "ConnectionRefusedError",
        "ConnectionTimeoutError",
        "EndpointConnectionError",
        "NewConnectionError",
        "PoolTimeout",
        "SMTPConnectError",
        "SSLCertVerificationError",
        "gaierror",
        "herror",
    }
)
# No answer came, or a part of one, though the request may have.
_NO_ANSWER = frozenset(
    {
        "APITimeoutError",
        "AutoReconnect",
        "BadStatusLine",
        "BrokenExecutor",
        "BrokenResourceError",
        "CancelledError",
        "ChunkedEncodingError",
        "ClientPayloadError",
        "CloseError",
        "ClosedResourceError",
        "ConnectionClosed",
        "ConnectionClosedError",
        "ContentDecodingError",
        "DecodingError",
        "EOFError",
        "EndOfStream",
        "IncompleteRead",
        "IncompleteReadError",
        "LineTooLong",
        "NetworkError",
        "NotEncodable",
        "OperationalError",
        "PostgresConnectionError",
        "ProtocolError",
        "ReadError",
        "ReadTimeout",
        "ReadTimeoutError",
        "RemoteProtocolError",
        "ResponseError",
        "ResponseStreamingError",
        "SMTPServerDisconnected",
        "ServerDisconnectedError",
        "TimeoutError",
        "TimeoutExpired",
        "UnknownProtocol",
        "WriteError",
        "WriteTimeout",
    }
)
# An answer came that could not be read, unless the error has a status, which says more.
_UNREADABLE = frozenset(
    {
        "APIError",
        "APIResponseValidationError",
        "ContentTypeError",
        "DecodeError",
        "JSONDecodeError",
        "ResponseNotRead",
        "ResponseParserError",
        "StreamClosed",
        "StreamConsumed",
        "StreamConsumedError",
        "TooManyRedirects",
        "UnicodeDecodeError",
    }
)
# Errors that hide others: what they were raised from may say that no connection was made. Otherwise no answer came.
_WRAPPERS = frozenset({"ClientConnectionError", "ConnectionError", "HTTPClientError", "URLError"})
_SDK_CONNECTION = "APIConnectionError"  # of SDKs that try again by themselves
# Errors of the operating system that leave nothing open, and the answers of a mail server, which derive from these.
_CLEAR_OS_ERRORS = frozenset(
    {"FileNotFoundError", "IsADirectoryError", "NotADirectoryError", "PermissionError", "SMTPException", "ValueError"}
)

_STATUS_NAMES = ("status_code", "status", "http_status", "code")
_STATUSES = range(100, 600)
_REFUSALS = range(400, 500)
_OPEN_REFUSALS = (408, 499)  # the server, or one before it, has stopped to wait for the request or for its client


_CACHED = 256  # functions

_PLAIN = (None, type(None), Any, object, bool, int, float, str, bytes, list, tuple, dict)
_UNIONS = (typing.Union, types.UnionType)

_T = TypeVar("_T")


class NothingDone(Exception):
    """Raised by a step that has failed and knows that it had no effect under its key: then it is not undone."""


@dataclass(frozen=True, slots=True)
class Done:
    """The answer of a step's `check`: the step has had its effect.

    Attributes:
        output: what the step would have returned.
    """

    output: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One call of `SagaRun.step`.

    Attributes:
        name: of the step, unique in its saga.
        function: an async or a plain function, or an agent of a framework.
        args: its arguments.
        compensate: undoes its effect: ``undo(output, *, key)``, or ``undo(output)``.
        pivot: whether nothing before it is undone once it has succeeded.
        retry: how it is tried again when it raises. None: it is not.
        check: finds out whether it has had its effect: ``check(key=...)`` returns a `Done`, or None.
        idempotent: whether it may be repeated under its key.
        handler: of an agent.
        codec: converts its output to plain data and back; None: it is plain.
    """

    name: str
    function: Any
    args: tuple[Any, ...]
    compensate: Callable[..., Any] | None
    pivot: bool
    retry: Retry | None
    check: Callable[..., Any] | None
    idempotent: bool
    handler: Handler | None
    codec: Codec | None

    @property
    def function_name(self) -> str:
        """The name of its function, for people."""
        return error_text(name_of(self.function))

    @property
    def blocking(self) -> bool:
        """True if its function runs in a thread."""
        return not is_async(self.function) if self.handler is None else self.handler.blocking

    async def call(self, key: str, threads: Executor | None) -> Any:
        """Call the function, and return its output. It does not return before the function has really ended."""
        if self.handler is None:
            return await call(self.function, *self.args, key=key, threads=threads)
        # Durable: an attempt after a loss of the process goes on from what the agent has written until then.
        task = Task(self.name, *self.args, task_id=key, thread_id=key, durable=True)
        return await _call(self.handler.call, task, blocking=self.handler.blocking, threads=threads)


def step_of(  # noqa: PLR0913 - the arguments of `SagaRun.step`
    name: str,
    function: Any,
    args: tuple[Any, ...],
    *,
    compensate: Callable[..., Any] | None,
    pivot: bool,
    retry: Retry | None,
    check: Callable[..., Any] | None,
    idempotent: bool,
) -> Step:
    """Return the step that the arguments describe.

    Raises:
        InvalidStep: one of them is invalid.
        InvalidHandler: `function` can be called neither as a function nor as an agent.
    """
    if not isinstance(name, str) or not name or len(name) > _MAX_NAME:
        raise InvalidStep(step=name, why=f"its name must be a string of 1 to {_MAX_NAME} characters")
    if not is_unicode(name):
        raise InvalidStep(step=name, why="its name is not valid Unicode: it holds a surrogate, which no log can store")
    for what, hook in (("compensate", compensate), ("check", check)):
        if hook is not None and not callable(hook):
            raise InvalidStep(
                step=name, why=f"{what}= must be a function, without parentheses, and not a {type(hook).__name__}"
            )
    if pivot and compensate is not None:
        raise InvalidStep(step=name, why="it is the pivot, which is not undone: leave out compensate=, or pivot=True")
    if retry is not None and not isinstance(retry, Retry):
        raise InvalidStep(step=name, why="retry= must be a Retry, such as Retry(max_attempts=3)")
    handler, codec = None, None
    if not is_agent(function):
        _check_callable(name, function)
        codec = _codec_of(function)
    else:
        handler = as_handler(function, worker=f"step {name!r}")
        codec = handler.codec
        if len(args) > 1:
            raise InvalidStep(step=name, why=f"it calls an agent, which takes one argument, and was given {len(args)}")
    return Step(
        name=name,
        function=function,
        args=args,
        compensate=compensate,
        pivot=bool(pivot),
        retry=retry,
        check=check,
        idempotent=bool(idempotent),
        handler=handler,
        codec=codec,
    )


def _check_callable(name: str, function: Any) -> None:
    if not callable(function):
        why = f"it needs a function or an agent, and was given a {type(function).__name__}"
        if inspect.iscoroutine(function):
            function.close()  # else Python would also warn that it was never awaited
            why = 'it was given a call that has begun: pass the function and its arguments, run.step("a", f, x)'
        raise InvalidStep(step=name, why=why)


def _cached(look: Callable[[Any], _T]) -> Callable[[Any], _T]:
    """Make `look` remember its answers for the latest functions, except those that would keep a saga's data alive."""
    known = lru_cache(maxsize=_CACHED)(look)

    @wraps(look)
    def cached(function: Any) -> _T:
        if isinstance(function, types.FunctionType) and not (function.__closure__ or function.__defaults__):
            return known(function)
        return look(function)

    return cached


@_cached
def _codec_of(function: Any) -> Codec | None:
    """Return the codec of the type that a function says it returns; None if that is plain data, or it says nothing."""
    while isinstance(function, partial):
        function = function.func
    try:
        declared = typing.get_type_hints(function).get("return")
    except Exception:  # noqa: BLE001 - annotations of a user's that cannot be resolved here
        return None
    if _is_plain(declared):
        return None
    try:
        return codec_for(declared, owner="step", name="function")
    except InvalidSetting:
        return None


def _is_plain(declared: Any) -> bool:
    """Return whether all values of a type are plain data, as far as that can be seen; so is what says nothing."""
    if declared in _PLAIN:
        return True
    parts = typing.get_args(declared)
    origin = typing.get_origin(declared)
    return (
        bool(parts)
        and (origin in _PLAIN or origin in _UNIONS)
        and all(part is ... or _is_plain(part) for part in parts)
    )


async def call(function: Callable[..., Any], *args: Any, key: str, threads: Executor | None) -> Any:
    """Call a function of a step, in a thread if it is not async, and with its `key` if it takes one."""
    if len(args) <= _place_of_key(function):
        function = partial(function, key=key)
    return await _call(function, *args, blocking=not is_async(function), threads=threads)


async def _call(function: Callable[..., Any], *args: Any, blocking: bool, threads: Executor | None) -> Any:
    if not blocking:
        value = function(*args)
        return await value if inspect.isawaitable(value) else value
    loop = asyncio.get_running_loop()
    value = await _whole(loop.run_in_executor(threads, copy_context().run, _call_plain, function, args))
    if isinstance(value, Raised):
        raise value.error
    return await value if inspect.isawaitable(value) else value


@dataclass(slots=True)
class Raised:
    """An exception of user code, as a value.

    No future can carry a StopIteration, and an asyncio task that ends with a SystemExit ends its event loop.

    Attributes:
        error: the exception.
    """

    error: BaseException


async def outcome_of(awaitable: Awaitable[_T]) -> _T | Raised:
    """Return what user code returns, or what it raises, whatever that is.

    Who awaits this is raised a GeneratorExit only if it is closed itself, with its event loop.
    """
    try:
        return await awaitable
    except BaseException as error:  # noqa: BLE001 - user code
        return Raised(error)


def _call_plain(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    try:
        return function(*args)
    except StopIteration as error:
        return Raised(RuntimeError(f"it raised {error!r}"))
    except BaseException as error:  # noqa: BLE001 - given to the loop as a value
        return Raised(error)


async def _whole(future: Awaitable[Any]) -> Any:
    """Wait until a thread has ended, even if the caller is cancelled: it cannot be stopped, and has its effect."""
    waited = asyncio.ensure_future(future)
    while not waited.done():
        try:
            await asyncio.wait((waited,))
        except asyncio.CancelledError:
            continue
    return waited.result()


@_cached
def _place_of_key(function: Any) -> int:
    """Return how many arguments by position a function takes before its `key`; -1 if it takes none, or has it."""
    inner = function
    while isinstance(inner, partial):
        if "key" in inner.keywords:
            return -1
        inner = inner.func
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # as of some built-in functions
        return -1
    for place, parameter in enumerate(parameters.values()):
        if parameter.name == "key" and parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            return sys.maxsize
        if parameter.name == "key" and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
            return place
    return -1


def is_ambiguous(error: BaseException) -> bool:
    """Return whether an error leaves open if the step had its effect: it does not say that the request was refused.

    A cancellation, a timeout, a lost connection and an answer that cannot be read are ambiguous, and so is any HTTP
    status that is no refusal, in the error, its response, an error that it was raised from, or one of its group. A
    connection that was refused is not, nor is an error of a class that is not known here.
    """
    seen: set[int] = set()
    errors = [error]
    while errors:  # the error, and those of the groups in it
        if _leaves_open(errors.pop(), errors, seen):
            return True
    return False


def _leaves_open(error: BaseException, parts: list[BaseException], seen: set[int]) -> bool:
    """Return whether an error leaves it open, or what it was raised from; add the errors of groups to `parts`."""
    wrapped = False
    for each in _chain(error, seen):
        if isinstance(each, BaseExceptionGroup):
            parts.extend(each.exceptions)
        names = {kind.__name__ for kind in type(each).__mro__}
        if names & _NOT_CONNECTED:
            return False
        if names & _NO_ANSWER or isinstance(each, ConnectionError):
            return True
        status = _http_status(each)
        if status is not None:
            return wrapped or status not in _REFUSALS or status in _OPEN_REFUSALS
        if _SDK_CONNECTION in names and not _is_first_attempt(each):
            return True
        if _SDK_CONNECTION in names or names & _WRAPPERS:
            wrapped = True
        elif names & _UNREADABLE or _is_open_os_error(each, names):
            return True
    return wrapped


def _is_open_os_error(error: BaseException, names: set[str]) -> bool:
    """Return whether the operating system has failed in a way that leaves it open."""
    if not isinstance(error, OSError) or names & _CLEAR_OS_ERRORS:
        return False
    return type(error) is not OSError or error.errno is not None  # one without a number is raised by code that knows


def _is_first_attempt(error: BaseException) -> bool:
    """Return whether an SDK says that it had sent nothing before the request which this error is about.

    It hides what has become of its earlier attempts, of which one may have had the effect.
    """
    headers = _attribute(_attribute(error, "request"), "headers")
    return isinstance(headers, Mapping) and headers.get("x-stainless-retry-count") == "0"


def _http_status(error: BaseException) -> int | None:
    """Return the HTTP status that an error of a client has, or its response, by any of the usual names."""
    response = _attribute(error, "response")
    for owner in (error, response):
        for name in _STATUS_NAMES:
            status = _attribute(owner, name)
            if isinstance(status, int) and not isinstance(status, bool):
                return status if status in _STATUSES else None
    if isinstance(response, Mapping):  # of botocore
        metadata = response.get("ResponseMetadata")
        status = metadata.get("HTTPStatusCode") if isinstance(metadata, Mapping) else None
        return status if isinstance(status, int) else None
    return None


def _attribute(owner: Any, name: str) -> Any:
    """Return an attribute of a user's object, or None, also if it cannot be read."""
    try:
        return getattr(owner, name, None)
    except Exception:  # noqa: BLE001 - a property of a user's
        return None


class NotEncodable(Exception):
    """The output of a step cannot be written to the log. The step has had its effect."""


def _chain(error: BaseException, seen: set[int]) -> Iterator[BaseException]:
    """Yield an error, and those that it was raised from, but for those that were `seen`."""
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        yield each
        seen.add(id(each))
        reason = _attribute(each, "reason")  # of urllib and urllib3
        each = each.__cause__ or (reason if isinstance(reason, BaseException) else each.__context__)
