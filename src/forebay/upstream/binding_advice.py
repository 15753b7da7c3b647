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
_AGENT_FRAMEWORK: Final = (
    "bind the SDK's client that it is given: `OpenAIChatCompletionClient(async_client=upstream.bind(AsyncOpenAI()))`."
    " Where it takes none that can be bound, run the gateway (`forebay gateway`), and set its address as the base URL."
)
_PYDANTIC_AI: Final = (
    "bind the client that its provider takes, such as OpenAIProvider(openai_client=upstream.bind(AsyncOpenAI())). Where"
    " a provider takes none, ConcurrencyLimitedModel(model, UpstreamLimiter(upstream)) waits in the upstream:"
    " UpstreamLimiter is in forebay.adapters.pydantic_ai."
)
_AUTOGEN: Final = (
    "bind the model client that it is made with: `AssistantAgent('name', upstream.bind(OpenAIChatCompletionClient("
    "...)))`."
)
_CREW: Final = "bind the LLM that its agents are made with: `Agent(llm=upstream.bind(LLM(...)))`."
_GOOGLE: Final = (
    "give it bound HTTP clients: genai.Client(http_options={'httpx_client': upstream.bind(httpx.Client()),"
    " 'httpx_async_client': upstream.bind(httpx.AsyncClient())}) with Upstream(provider='generic'). Or use the gateway"
    " (`forebay gateway`), and set its address as http_options={'base_url': ...}."
)
_GRAPH: Final = "bind the model that the graph is made of: `create_agent(upstream.bind(model), ...)`."
#: By the package of the class of an object, or of one that it derives from.
_BY_PACKAGE: Final = {
    "agent_framework": _AGENT_FRAMEWORK,
    "agents": _AGENTS_SDK,
    "autogen_agentchat": _AUTOGEN,
    "autogen_core": _AUTOGEN,
    "botocore": _BOTOCORE,
    "crewai": _CREW,
    "google.genai": _GOOGLE,
    "langgraph": _GRAPH,
    "litellm": _LITELLM,
    "pydantic_ai": _PYDANTIC_AI,
    "swarm": _SWARM,
}
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
        return _of_package(thing.__module__) or _CLASS.format(name=thing.__name__)
    if isinstance(thing, _FUNCTIONS):
        return _FUNCTION
    if isinstance(thing, ModuleType):
        return _of_package(thing.__name__)
    bases = type(thing).__mro__
    if any(base.__name__ in _RESOURCES for base in bases):
        return _PART
    return next((advice for base in bases if (advice := _of_package(base.__module__)) is not None), None)


def _of_package(module: str) -> str | None:
    return next((advice for package, advice in _BY_PACKAGE.items() if f"{module}.".startswith(f"{package}.")), None)


def kind_of(thing: Any) -> str:
    """Return what an object is, for messages."""
    if isinstance(thing, ModuleType):
        return f"the module {thing.__name__}"
    named = thing if isinstance(thing, type | FunctionType | MethodType) else type(thing)
    return f"{named.__module__}.{named.__qualname__}"
