"""The pytest plugin in a user's test suite: alone, and with other plugins for async tests."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.blocks  # it runs pytest in pytest

BARE = (
    "-W",
    "error",
    "--timeout",
    "60",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:langsmith_plugin",
)  # it imports for seconds
ALONE = ("-p", "no:asyncio", "-p", "no:anyio")
AUTO = (
    "-p",
    "asyncio",
    "-p",
    "no:anyio",
    "-o",
    "asyncio_mode=auto",
    "-o",
    "asyncio_default_fixture_loop_scope=function",
)
STRICT = ("-p", "asyncio", "-p", "no:anyio", "-o", "asyncio_default_fixture_loop_scope=function")
ANYIO = ("-p", "no:asyncio", "-p", "anyio", "-o", "anyio_mode=auto")
COMPANY = {"alone": ALONE, "asyncio auto": AUTO, "asyncio strict": STRICT, "anyio auto": ANYIO}

HOURS = """
    import asyncio
    import pytest
    from forebay import BackpressureSupervisor, Task
    from forebay.testing import SlowHandler, now

    @pytest.fixture
    async def supervisor():
        async with BackpressureSupervisor() as supervisor:
            supervisor.register_worker("w", handler=SlowHandler(100.0), task_types=["work"])
            yield supervisor
            await asyncio.sleep(3600.0)

    @pytest.fixture
    async def begun():
        await asyncio.sleep(3600.0)
        return now()

    async def test_hours_pass_at_once(virtual_time):
        await asyncio.sleep(3600.0)
        assert 3600.0 <= now() == virtual_time.now < 3601.0

    async def test_its_async_fixtures_share_its_loop(supervisor, virtual_time):
        assert await supervisor.run(Task("work", 7)) == 7

    async def test_time_goes_on_from_a_fixture(begun, virtual_time):
        assert begun == now() > 3600.0

    class TestMethods:
        def setup_method(self):
            self.mine = 3

        @pytest.fixture
        async def late(self):
            await asyncio.sleep(60.0)
            yield self.mine

        async def test_a_method(self, late, virtual_time):
            assert late == self.mine

    @pytest.mark.usefixtures("virtual_time")
    async def test_used_and_not_asked_for():
        await asyncio.sleep(3600.0)

    @pytest.mark.virtual_time(seed=5, jitter=0.0)
    async def test_marked(virtual_time):
        await asyncio.sleep(3600.0)
        assert (now(), virtual_time.seed) == (3600.0, 5)

    @pytest.mark.virtual_time
    async def test_marked_alone():
        await asyncio.sleep(3600.0)

    @pytest.mark.parametrize("virtual_time", [3, 4], indirect=True)
    async def test_seeds(virtual_time):
        assert virtual_time.seed in (3, 4)

    def test_a_plain_test_may_run_a_coroutine(virtual_time):
        virtual_time.run(asyncio.sleep(3600.0))
        assert virtual_time.now >= 3600.0
"""


def slowly(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("company", ["alone", "asyncio auto", slowly("asyncio strict"), slowly("anyio auto")])
def test_async_tests_run_in_virtual_time_with_any_other_plugin(pytester: pytest.Pytester, company: str) -> None:
    pytester.makepyfile(HOURS)
    result = pytester.runpytest_subprocess(*BARE, *COMPANY[company])
    result.assert_outcomes(passed=10)


THEIRS = """
    import asyncio
    import pytest

    {mark}
    async def test_of_theirs(theirs):
        assert theirs == "real"
        assert type(asyncio.get_running_loop()).__name__ != "VirtualLoop"

    @pytest.fixture
    async def theirs():
        return "real"
"""


@pytest.mark.parametrize(
    ("company", "mark"), [("asyncio auto", ""), slowly("anyio auto", ""), slowly("anyio auto", "ours")]
)
def test_other_async_tests_are_left_to_other_plugins(pytester: pytest.Pytester, company: str, mark: str) -> None:
    other_test = "async def test_of_ours(virtual_time):\n        await asyncio.sleep(3600.0)\n" if mark else ""
    pytester.makepyfile(THEIRS.format(mark=other_test))
    result = pytester.runpytest_subprocess(*BARE, *COMPANY[company])
    result.assert_outcomes(passed=2 if mark else 1)


def test_in_a_module_marked_asyncio_the_fixture_still_selects_virtual_time(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import asyncio
        import pytest

        pytestmark = pytest.mark.asyncio

        async def test_real():
            assert type(asyncio.get_running_loop()).__name__ != "VirtualLoop"

        async def test_virtual(virtual_time):
            await asyncio.sleep(3600.0)
    """)
    pytester.runpytest_subprocess(*BARE, *STRICT).assert_outcomes(passed=2)


@pytest.mark.parametrize("company", ["alone", slowly("asyncio auto"), slowly("anyio auto")])
def test_every_hypothesis_example_starts_at_second_0(pytester: pytest.Pytester, company: str) -> None:
    pytester.makepyfile("""
        import asyncio
        import pytest
        from hypothesis import given, strategies as st
        from forebay.testing import now

        seen = []

        @pytest.mark.virtual_time
        @given(seconds=st.integers(1, 3600))
        async def test_examples(seconds):
            seen.append(now())
            await asyncio.sleep(seconds)
            assert seconds <= now() < seconds + 1.0

        def test_they_ran():
            assert len(seen) > 10 and set(seen) == {0.0}
    """)
    result = pytester.runpytest_subprocess(*BARE, *COMPANY[company])
    result.assert_outcomes(passed=2)


def test_errors_of_the_simulation_fail_the_test_itself(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import asyncio
        import pytest

        async def test_fails(virtual_time):
            assert 1 == 2

        async def test_waits_for_nobody(virtual_time):
            await asyncio.Event().wait()

        async def test_loses_an_error(virtual_time):
            async def careless():
                raise ValueError("lost")
            asyncio.ensure_future(careless())
            await asyncio.sleep(1.0)

        @pytest.mark.virtual_time(max_time=10.0)
        async def test_takes_too_long():
            await asyncio.sleep(11.0)

        @pytest.mark.virtual_time(jitter=-1)
        async def test_is_set_wrong():
            pass
    """)
    result = pytester.runpytest_subprocess(*BARE, *ALONE)
    result.assert_outcomes(failed=4, errors=1)
    result.stdout.fnmatch_lines_random(
        [
            "*assert 1 == 2*",
            "*Deadlock at 0.000000 s of virtual time (seed 0)*",
            "*Unhandled errors: 1*",
            "*The simulation exceeded max_time=10*",
            "*VirtualLoop was given jitter=-1*",
        ]
    )


def test_remaining_tasks_are_cancelled_after_the_fixtures(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import asyncio
        import pytest

        order = []

        @pytest.fixture
        async def supper():
            yield
            order.append("fixture")

        async def test_leaves_a_task(supper, virtual_time):
            async def guest():
                try:
                    await asyncio.sleep(1e6)
                finally:
                    order.append("task")
            asyncio.create_task(guest())
            await asyncio.sleep(1.0)

        def test_order():
            assert order == ["fixture", "task"]
    """)
    pytester.runpytest_subprocess(*BARE, *ALONE).assert_outcomes(passed=2)


def test_an_async_fixture_must_yield_once(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import pytest

        @pytest.fixture
        async def twice():
            yield 1
            yield 2

        async def test_it(twice, virtual_time):
            pass
    """)
    result = pytester.runpytest_subprocess(*BARE, *ALONE)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*an async fixture must yield once*"])


ALL = """
    import asyncio
    import pytest
    from forebay import BackpressureSupervisor, Overloaded, Task
    from forebay.testing import SlowHandler

    async def test_passthrough(passthrough, virtual_time):
        passthrough.register_worker("w", handler=SlowHandler(), task_types=["work"])
        async with passthrough:
            for _ in range(300):
                await passthrough.submit(Task("work"))
        assert len(passthrough.record.results) == 300

    async def test_overload(overload, virtual_time):
        async with BackpressureSupervisor() as supervisor:
            supervisor.register_worker("w", handler=SlowHandler(), task_types=["work"])
            with overload(supervisor), pytest.raises(Overloaded):
                await supervisor.run(Task("work"))

    async def test_provider_in_the_loop(simulated_provider, virtual_time):
        simulated_provider.configure(ttft=60.0)
        assert (await simulated_provider.call()).ttft > 59.0

    @pytest.mark.parametrize("number", range(4))
    def test_provider_over_http(simulated_provider, number):
        import openai
        simulated_provider.configure(rpm=1)
        with openai.OpenAI(base_url=simulated_provider.openai_url, api_key="none", max_retries=0) as client:
            client.models.list()
            client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "Rivers?"}])
        assert simulated_provider.statistics().finished == 1
"""


@pytest.mark.parametrize("workers", [(), slowly(("-p", "xdist", "-n", "2"))], ids=["alone", "xdist"])
def test_the_fixtures_are_there(pytester: pytest.Pytester, workers: tuple[str, ...]) -> None:
    pytester.makepyfile(ALL)
    result = pytester.runpytest_subprocess(*BARE, "--strict-markers", *ALONE, *workers)
    result.assert_outcomes(passed=7)


def test_a_suite_that_does_not_use_the_plugin_does_not_import_forebay(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import sys

        def test_modules():
            assert not [name for name in ("forebay", "msgspec", "asyncio") if name in sys.modules]
    """)
    pytester.runpytest_subprocess(*BARE, *ALONE).assert_outcomes(passed=1)
