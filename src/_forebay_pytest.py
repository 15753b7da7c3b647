"""The pytest plugin: fixtures for the functions and classes of `forebay.testing`.

pytest loads this module wherever Forebay is installed. So it is outside the package, and imports the package only when
a test uses a fixture.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any, Final, cast

import pytest

if TYPE_CHECKING:
    from forebay.simulation.loop import Simulation
    from forebay.testing.passthrough import PassthroughSupervisor
    from forebay.testing.provider_double import ProviderDouble, SharedProviderProcess

_VIRTUAL: Final = "virtual_time"
_TEST: Final = pytest.StashKey[Callable[..., Any]]()


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line(
        "markers",
        "virtual_time(seed=0, max_time=86400.0, ...): run the async test in virtual time; the settings are those of"
        " forebay.simulation.simulate.",
    )


# --- virtual time ----------------------------------------------------------------------------------------------------


@pytest.fixture
def virtual_time(request: pytest.FixtureRequest) -> Iterator[Simulation]:
    """Run the async test and its function-scoped async fixtures in virtual time: minutes pass in milliseconds.

    A deadlock and an unhandled exception are errors. Parametrize the fixture indirectly with seeds, or use the marker
    of the same name for other settings. In a plain test, ``virtual_time.run(...)`` runs a coroutine.
    """
    from forebay.simulation.loop import Simulation  # noqa: PLC0415 - see the module

    with Simulation(**_settings(request.node, getattr(request, "param", None))) as simulation:
        yield simulation


def _settings(item: pytest.Item, seed: int | None = None) -> dict[str, Any]:
    marker = item.get_closest_marker(_VIRTUAL)
    settings = {} if marker is None else dict(marker.kwargs)
    return settings if seed is None else {**settings, "seed": seed}


def pytest_itemcollected(item: pytest.Item) -> None:
    """Add the fixture to tests that have the marker."""
    if isinstance(item, pytest.Function) and item.get_closest_marker(_VIRTUAL) and _VIRTUAL not in item.fixturenames:
        item.fixturenames.insert(0, _VIRTUAL)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Remember the original test function, before another plugin replaces it."""
    if isinstance(item, pytest.Function) and _VIRTUAL in item.fixturenames:
        hypothesis = getattr(item.obj, "hypothesis", None)
        item.stash[_TEST] = item.obj if hypothesis is None else hypothesis.inner_test


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """Replace an async test by a plain function. A wrapper runs before the hooks of all other plugins."""
    test = pyfuncitem.stash.get(_TEST, None)
    if test is None or not inspect.iscoroutinefunction(test):
        return (yield)
    holder, name = pyfuncitem, "obj"
    plain = _run_in(cast("Simulation", pyfuncitem.funcargs[_VIRTUAL]), test)
    if hasattr(pyfuncitem.obj, "hypothesis"):
        holder, name = pyfuncitem.obj.hypothesis, "inner_test"
        plain = _run_each_example(test, _settings(pyfuncitem))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holder, name, plain)
        return (yield)


def _run_in(simulation: Simulation, test: Callable[..., Any]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        __tracebackhide__ = True
        simulation.run(test(*args, **kwargs))
        simulation.check()

    return run


def _run_each_example(test: Callable[..., Any], settings: dict[str, Any]) -> Callable[..., None]:
    """Return a function that runs every example of hypothesis in a simulation of its own, from second 0."""
    from forebay.simulation.loop import simulate  # noqa: PLC0415 - see the module

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        simulate(test(*args, **kwargs), **settings)

    return run


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, Any, Any]:
    """Replace a function-scoped async fixture of a test in virtual time by a plain one."""
    original = fixturedef.func
    if (
        _VIRTUAL not in request.fixturenames
        or fixturedef.scope != "function"
        or not (inspect.iscoroutinefunction(original) or inspect.isasyncgenfunction(original))
    ):
        return (yield)
    simulation: Simulation = request.getfixturevalue(_VIRTUAL)
    fixturedef.func = _fixture_in(simulation, _bound(original, request.instance))  # type: ignore[misc]
    try:
        return (yield)
    finally:
        fixturedef.func = original  # type: ignore[misc]


def _bound(function: Callable[..., Any], instance: object) -> Callable[..., Any]:
    """Bind a fixture that is a method to the instance on which the test runs."""
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
                pytest.fail("an async fixture must yield once", pytrace=False)

        yield simulation.run(begin)
        simulation.run(end)

    return generator


# --- other fixtures --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def _forebay_provider_process() -> Iterator[SharedProviderProcess]:
    from forebay.testing.provider_double import SharedProviderProcess  # noqa: PLC0415 - see the module

    process = SharedProviderProcess()
    yield process
    process.close()


@pytest.fixture
def simulated_provider(_forebay_provider_process: SharedProviderProcess) -> ProviderDouble:
    """Return a simulated LLM provider: over HTTP at `openai_url` and `anthropic_url`, in the event loop with `call`."""
    from forebay.testing.provider_double import ProviderDouble  # noqa: PLC0415 - see the module

    return ProviderDouble(_forebay_provider_process)


@pytest.fixture
def passthrough() -> PassthroughSupervisor:
    """Return a supervisor that admits every task and records events; start it with ``async with passthrough:``."""
    from forebay.testing.passthrough import PassthroughSupervisor  # noqa: PLC0415 - see the module

    return PassthroughSupervisor()


@pytest.fixture
def overload() -> Callable[..., Any]:
    """Return the context manager `forebay.testing.overload`: inside its block, a supervisor refuses tasks."""
    from forebay.testing.overload import overload  # noqa: PLC0415 - see the module

    return overload
