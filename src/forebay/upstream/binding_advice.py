"""Advice for objects that can be neither bound nor guarded: what to bind or guard instead."""

from __future__ import annotations

from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, Final

_CLASS: Final = "it is a class: if it is one of clients, bind a client: `upstream.bind({name}(...))`."
_FUNCTION: Final = (
    "bind the client that it is called on. A function that makes calls of its own is guarded:"
    " `upstream.guard(function)`."
)
_PART: Final = "it is a part of a client: bind the client, and use that part of the copy."
_LITELLM: Final = (
    "for models that LiteLLM calls by OpenAI's client, set `litellm.client_session = upstream.bind(httpx.Client())` and"
    " `litellm.aclient_session = upstream.bind(httpx.AsyncClient())`, and pass `max_retries=0`. For others pass"
    " `client=HTTPHandler(client=upstream.bind(httpx.Client()))` to a call, or run the gateway (`forebay gateway`), and"
    " pass its address as `api_base=`."
)
_BOTOCORE: Final = (
    "clients of boto3 have no HTTP client that can be bound. Guard the function that makes the call:"
    " `@upstream.guard` above it, and Config(retries={'total_max_attempts': 1}) for the client."
)
_SWARM: Final = (
    "bind its client: `config={'client': upstream.bind(AsyncOpenAI())}`, or `Swarm(upstream.bind(OpenAI()))`."
)
_AGENTS_SDK: Final = (
    "bind the client of its model: `OpenAIChatCompletionsModel(name, upstream.bind(AsyncOpenAI()))`, or that of all"
    " models: `set_default_openai_client(upstream.bind(AsyncOpenAI()))`."
)
_BY_PACKAGE: Final = {"agents": _AGENTS_SDK, "botocore": _BOTOCORE, "litellm": _LITELLM, "swarm": _SWARM}
_RESOURCES: Final = ("SyncAPIResource", "AsyncAPIResource")  # such as client.chat.completions
_FUNCTIONS: Final = (FunctionType, MethodType, BuiltinFunctionType)

NOT_CALLABLE: Final = (
    "it is not callable. Guard the function that it calls; of a tool, the one that it is made from:"
    " `Tool(upstream.guard(function))`. The client of a model is bound: `upstream.bind(client)`."
)
CLASS: Final = (
    "it is a class, and calling it only makes an object. Guard the function or the method that does the work, or bind"
    " the client: `upstream.bind({name}(...))`."
)


def find_advice(thing: Any) -> str | None:
    """Return what to bind instead of an object; None if nothing is known about it."""
    if isinstance(thing, type):
        return _BY_PACKAGE.get(thing.__module__.partition(".")[0]) or _CLASS.format(name=thing.__name__)
    if isinstance(thing, _FUNCTIONS):
        return _FUNCTION
    if isinstance(thing, ModuleType):
        return _BY_PACKAGE.get(thing.__name__.partition(".")[0])
    bases = type(thing).__mro__
    if any(base.__name__ in _RESOURCES for base in bases):
        return _PART
    packages = (base.__module__.partition(".")[0] for base in bases)
    return next((_BY_PACKAGE[package] for package in packages if package in _BY_PACKAGE), None)


def kind_of(thing: Any) -> str:
    """Return what an object is, for messages."""
    if isinstance(thing, ModuleType):
        return f"the module {thing.__name__}"
    named = thing if isinstance(thing, type | FunctionType | MethodType) else type(thing)
    return f"{named.__module__}.{named.__qualname__}"
