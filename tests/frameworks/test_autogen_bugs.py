"""The tests of AutoGen's adapter catch the bugs that matter most: each is injected, and its test fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from tests.frameworks.conftest import INSTALLED
from tests.frameworks.openai_double import OpenAIDouble

if "autogen" not in INSTALLED:
    pytest.skip("it runs in an environment of its own: scripts/test.sh makes it", allow_module_level=True)

from autogen_core import SingleThreadedAgentRuntime
from tests.frameworks import test_autogen, test_contract
from tests.frameworks.samples.autogen import SAMPLES

from forebay.adapters.autogen import agent_copies, agent_run
from forebay.adapters.autogen.agent_copies import AgentCopies
from forebay.adapters.autogen.agent_run import AgentRun, RunRuntime
from forebay.upstream.httpx_binding.client_binder import ClientBinder

closed_clients = test_autogen.closed_clients

Patch = pytest.MonkeyPatch
Test = Callable[[OpenAIDouble], Coroutine[Any, Any, None]]


def runs_share_an_agent(patch: Patch) -> None:
    original = AgentCopies.make

    def make(self: AgentCopies) -> Any:
        return vars(self).setdefault("made", original(self))

    patch.setattr(AgentCopies, "make", make)


def an_agent_inside_of_a_tool_is_shared(patch: Patch) -> None:
    patch.setattr(agent_copies, "_COPIED", ())


def the_tasks_of_a_cancelled_run_are_left(patch: Patch) -> None:
    async def stop(self: AgentRun, main: asyncio.Task[Any]) -> None:
        self.token.cancel()
        main.cancel()

    patch.setattr(AgentRun, "_stop", stop)


def a_cancelled_team_asks_its_next_agent(patch: Patch) -> None:
    patch.setattr(RunRuntime, "_process_publish", SingleThreadedAgentRuntime._process_publish)


def a_task_that_has_not_started_is_cancelled(patch: Patch) -> None:
    patch.setattr(agent_run, "getcoroutinestate", lambda _: "started")


def a_runtime_is_left_that_nobody_stops(patch: Patch) -> None:
    patch.setattr(agent_run, "_RUNS", agent_run._STOPS)


def a_plain_tool_is_left_to_autogen(patch: Patch) -> None:
    patch.setattr(agent_copies, "_in_thread", lambda tool: tool)


def the_error_of_a_team_is_a_text(patch: Patch) -> None:
    patch.setattr(AgentRun, "_original", lambda _, error: error)


def a_copy_of_a_bound_client_is_not_bound(patch: Patch) -> None:
    original = ClientBinder._bind_autogen

    def bind(self: ClientBinder, client: Any) -> Any:
        bound = original(self, client)
        bound._raw_config = client._raw_config
        return bound

    patch.setattr(ClientBinder, "_bind_autogen", bind)


def _of_sample(test: Any, sample: int = 0) -> Test:
    async def run(double: OpenAIDouble) -> None:
        await test(SAMPLES[sample], double)

    return run


async def _copied(_: OpenAIDouble) -> None:
    await test_autogen.test_an_agent_of_ones_own_is_copied_with_its_attributes()


def _at_any_time(make: Callable[[list[str]], Any]) -> Test:
    async def run(_: OpenAIDouble) -> None:
        log: Any = SimpleNamespace(text="")
        await test_autogen.test_a_run_that_is_cancelled_at_any_time_ends_and_begins_nothing_more(make, log)

    return run


CAUGHT_BY: dict[Callable[[Patch], None], Any] = {
    runs_share_an_agent: _copied,
    an_agent_inside_of_a_tool_is_shared: test_autogen.test_an_agent_inside_a_tool_is_copied_too,
    the_tasks_of_a_cancelled_run_are_left: partial(
        test_autogen.test_a_cancelled_run_lasts_until_its_tools_have_ended, around=lambda agent: agent
    ),
    a_cancelled_team_asks_its_next_agent: _at_any_time(test_autogen.two_agents),
    a_task_that_has_not_started_is_cancelled: _at_any_time(test_autogen.two_agents),
    a_runtime_is_left_that_nobody_stops: _at_any_time(test_autogen.two_agents),
    a_plain_tool_is_left_to_autogen: _of_sample(test_contract.test_context_variables_of_the_submitter_reach_the_tools),
    the_error_of_a_team_is_a_text: test_autogen.test_an_error_inside_nested_teams_is_that_of_the_client,
    a_copy_of_a_bound_client_is_not_bound: test_autogen.test_a_copy_of_a_bound_model_client_is_bound,
}


@pytest.mark.parametrize("bug", CAUGHT_BY, ids=lambda bug: bug.__name__)
async def test_an_injected_bug_is_caught(
    double: OpenAIDouble, monkeypatch: Patch, bug: Callable[[Patch], None]
) -> None:
    await CAUGHT_BY[bug](double)  # passes without it
    double.requests.clear()
    bug(monkeypatch)
    with pytest.raises((AssertionError, TimeoutError)):
        await CAUGHT_BY[bug](double)
