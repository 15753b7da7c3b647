"""The pytest plugin: fixtures, thin over what `forebay.testing` offers to everybody.

pytest loads it wherever Forebay is installed. So it stands beside the package, and imports it when a test asks for it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any, Final, cast

import pytest

if TYPE_CHECKING:
    from forebay.simulation import Simulation
    from forebay.testing.passthrough import PassthroughSupervisor
    from forebay.testing.provider_double import ProviderDouble, SharedProviderProcess

_VIRTUAL: Final = "virtual_time"
_TEST: Final = pytest.StashKey[Callable[..., Any]]()


def pytest_configure(config: pytest.Config) -> None:
    """Make the mark known."""
    config.addinivalue_line(
        "markers",
        "virtual_time(seed=0, max_time=86400.0, ...): run the async test in virtual time; the settings are those of"
        " forebay.simulation.simulate.",
    )


# --- virtual time ----------------------------------------------------------------------------------------------------


@pytest.fixture
def virtual_time(request: pytest.FixtureRequest) -> Iterator[Simulation]:
    """The async test, and the async fixtures that are its own, run in virtual time: minutes pass in milliseconds.

    A deadlock is an error, and so is what reached nobody. Parametrize it indirectly with seeds, or set more by the mark
    of its name. In a plain test, ``virtual_time.run(...)`` runs a coroutine.
    """
    from forebay.simulation import Simulation  # noqa: PLC0415 - see above

    with Simulation(**_settings(request.node, getattr(request, "param", None))) as simulation:
        yield simulation


def _settings(item: pytest.Item, seed: int | None = None) -> dict[str, Any]:
    mark = item.get_closest_marker(_VIRTUAL)
    settings = {} if mark is None else dict(mark.kwargs)
    return settings if seed is None else {**settings, "seed": seed}


def pytest_itemcollected(item: pytest.Item) -> None:
    """Let the mark stand for the fixture."""
    if isinstance(item, pytest.Function) and item.get_closest_marker(_VIRTUAL) and _VIRTUAL not in item.fixturenames:
        item.fixturenames.insert(0, _VIRTUAL)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Note the test as its author wrote it, before another plugin puts its own in place of it."""
    if isinstance(item, pytest.Function) and _VIRTUAL in item.fixturenames:
        given = getattr(item.obj, "hypothesis", None)
        item.stash[_TEST] = item.obj if given is None else given.inner_test


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """Give pytest a plain function in place of an async test. A wrapper, so that it comes before all other plugins."""
    test = pyfuncitem.stash.get(_TEST, None)
    if test is None or not inspect.iscoroutinefunction(test):
        return (yield)
    holder, name = pyfuncitem, "obj"
    plain = _in(cast("Simulation", pyfuncitem.funcargs[_VIRTUAL]), test)
    if hasattr(pyfuncitem.obj, "hypothesis"):
        holder, name = pyfuncitem.obj.hypothesis, "inner_test"
        plain = _each_by_itself(test, _settings(pyfuncitem))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holder, name, plain)
        return (yield)


def _in(simulation: Simulation, test: Callable[..., Any]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        __tracebackhide__ = True
        simulation.run(test(*args, **kwargs))
        simulation.check()

    return run


def _each_by_itself(test: Callable[..., Any], settings: dict[str, Any]) -> Callable[..., None]:
    """Every example of hypothesis from second 0."""
    from forebay.simulation import simulate  # noqa: PLC0415 - see above

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        simulate(test(*args, **kwargs), **settings)

    return run


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, Any, Any]:
    """Give pytest a plain fixture in place of an async one, if it belongs to a test in virtual time alone."""
    theirs = fixturedef.func
    if (
        _VIRTUAL not in request.fixturenames
        or fixturedef.scope != "function"
        or not (inspect.iscoroutinefunction(theirs) or inspect.isasyncgenfunction(theirs))
    ):
        return (yield)
    simulation: Simulation = request.getfixturevalue(_VIRTUAL)
    fixturedef.func = _fixture_in(simulation, _bound(theirs, request.instance))  # type: ignore[misc]
    try:
        return (yield)
    finally:
        fixturedef.func = theirs  # type: ignore[misc]


def _bound(function: Callable[..., Any], instance: object) -> Callable[..., Any]:
    """A fixture that is a method is one of the instance on which its test runs."""
    if inspect.ismethod(function) and instance is not None and type(function.__self__) is type(instance):
        bound: Callable[..., Any] = function.__func__.__get__(instance)
        return bound
    return function


def _fixture_in(simulation: Simulation, function: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(function):

        def plain(**kwargs: Any) -> Any:
            return simulation.run(function(**kwargs))

        return plain

    def generator(**kwargs: Any) -> Iterator[Any]:
        source = function(**kwargs)

        async def begin() -> Any:
            return await anext(source)

        async def end() -> None:
            async for _ in source:
                pytest.fail("an async fixture yields once", pytrace=False)

        yield simulation.run(begin)
        simulation.run(end)

    return generator


# --- the rest --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def _forebay_plants() -> Iterator[SharedProviderProcess]:
    from forebay.testing.provider_double import SharedProviderProcess  # noqa: PLC0415 - see above

    plants = SharedProviderProcess()
    yield plants
    plants.close()


@pytest.fixture
def simulated_provider(_forebay_plants: SharedProviderProcess) -> ProviderDouble:
    """A simulated LLM provider: over HTTP by `openai_url` and `anthropic_url`, in the event loop by `call`."""
    from forebay.testing.provider_double import ProviderDouble  # noqa: PLC0415 - see above

    return ProviderDouble(_forebay_plants)


@pytest.fixture
def passthrough() -> PassthroughSupervisor:
    """A supervisor that admits everything and records what happens; start it by ``async with passthrough:``."""
    from forebay.testing.passthrough import PassthroughSupervisor  # noqa: PLC0415 - see above

    return PassthroughSupervisor()


@pytest.fixture
def overload() -> Callable[..., Any]:
    """The context manager `forebay.testing.overload`: while its block lasts, a supervisor refuses tasks."""
    from forebay.testing.overload import overload  # noqa: PLC0415 - see above

    return overload
