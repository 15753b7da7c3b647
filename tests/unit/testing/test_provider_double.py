"""The simulated provider of a test: in the event loop, and over HTTP in a process."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import openai
import pytest

from forebay.simulation.provider import (
    AnswerCut,
    Dialect,
    Faults,
    InvalidProviderConfig,
    ProviderConfig,
    ProviderRefusal,
    Unit,
)
from forebay.testing import ProviderDouble, now, provider_double, virtual
from forebay.testing.provider_double import FAST_PROVIDER, SharedProviderProcess, SimulatedProviderNotInstalled


@pytest.fixture(scope="module")
def shared_process() -> Iterator[SharedProviderProcess]:
    shared_process = SharedProviderProcess()
    yield shared_process
    shared_process.close()


@virtual
async def test_in_the_loop_a_call_takes_virtual_time() -> None:
    double = ProviderDouble(SharedProviderProcess())
    double.configure(ttft=5.0, tpot=0.1)
    done = await double.call(input_tokens=7, output_tokens=50)
    assert now() == pytest.approx(10.0, abs=1e-3)
    assert (done.usage.input_tokens, done.usage.output_tokens) == (7, 50)
    assert (double.statistics().finished, double.statistics().usd > 0) == (1, True)


@virtual
async def test_limits_and_faults_can_be_configured_repeatedly() -> None:
    double = ProviderDouble(SharedProviderProcess())
    double.configure(rpm=1)
    await double.call()
    with pytest.raises(ProviderRefusal) as refused:
        await double.call(run="mine")
    assert refused.value.status == 429
    assert double.bills()["mine"].refused == 1
    double.configure(faults=Faults(cut=1.0))
    assert double.config.rate_limits[0].amount == 1
    with pytest.raises(AnswerCut):
        await double.call()
    double.configure(ProviderConfig())
    await double.call()
    assert double.statistics().calls == 1


@virtual
async def test_the_seed_decides_the_faults() -> None:
    async def outcomes(seed: int) -> list[bool]:
        double = ProviderDouble(SharedProviderProcess())
        double.configure(seed=seed, faults=Faults(error=0.5))
        succeeded = []
        for _ in range(20):
            try:
                await double.call()
            except ProviderRefusal:
                succeeded.append(False)
            else:
                succeeded.append(True)
        return succeeded

    assert await outcomes(1) == await outcomes(1) != await outcomes(2)


def test_an_unused_provider_has_empty_statistics() -> None:
    double = ProviderDouble(SharedProviderProcess())
    assert (double.statistics().calls, double.bills()) == (0, {})


def test_limits_have_short_names() -> None:
    double = ProviderDouble(SharedProviderProcess())
    double.configure(rpm=1, tpm=2, itpm=3, otpm=4)
    assert {(rate.unit, rate.amount, rate.period) for rate in double.config.rate_limits} == {
        (Unit.REQUESTS, 1, 60.0),
        (Unit.TOKENS, 2, 60.0),
        (Unit.INPUT_TOKENS, 3, 60.0),
        (Unit.OUTPUT_TOKENS, 4, 60.0),
    }


def test_an_invalid_configuration_is_an_error() -> None:
    double = ProviderDouble(SharedProviderProcess())
    with pytest.raises(InvalidProviderConfig, match="slots=-1"):
        double.configure(slots=-1)
    with pytest.raises(TypeError, match="colour"):
        double.configure(colour="blue")
    assert double.config is FAST_PROVIDER


@pytest.mark.blocks  # it requests another process
def test_over_http_both_sdks_work(shared_process: SharedProviderProcess) -> None:
    double = ProviderDouble(shared_process)
    with openai.OpenAI(base_url=double.openai_url, api_key="none", max_retries=0) as gpt:
        gpt.chat.completions.create(model="gpt-4o-mini", messages=[{"role": "user", "content": "Rivers?"}])
    with anthropic.Anthropic(base_url=double.anthropic_url, api_key="none", max_retries=0) as claude:
        claude.messages.create(
            model="claude-sonnet-5",
            max_tokens=20,
            messages=[{"role": "user", "content": "Rivers?"}],
            extra_headers={"x-simulated-run": "mine"},
        )
    assert (double.statistics().finished, double.statistics().by_status) == (2, {200: 2})
    assert double.bills()["mine"].finished == 1


@pytest.mark.blocks
def test_over_http_it_can_be_configured_before_and_during_use(shared_process: SharedProviderProcess) -> None:
    double = ProviderDouble(shared_process)
    double.configure(dialect=Dialect.OPENAI, faults=Faults(unavailable=1.0))
    with openai.OpenAI(base_url=double.openai_url, api_key="none", max_retries=0) as gpt:

        def ask() -> None:
            gpt.chat.completions.create(model="gpt-4o-mini", messages=[{"role": "user", "content": "Rivers?"}])

        with pytest.raises(openai.InternalServerError):
            ask()
        double.configure(faults=Faults(), rpm=1)
        ask()
        with pytest.raises(openai.RateLimitError):
            ask()
    assert double.statistics().calls == 2


@pytest.mark.blocks
def test_the_next_test_gets_a_new_provider(shared_process: SharedProviderProcess) -> None:
    first, second = ProviderDouble(shared_process), ProviderDouble(shared_process)
    first.configure(rpm=1)
    assert first.process.statistics()["now"] >= 0
    assert second.openai_url == first.openai_url
    assert second.statistics().calls == 0
    with openai.OpenAI(base_url=second.openai_url, api_key="none", max_retries=0) as gpt:
        for _ in range(3):
            gpt.chat.completions.create(model="gpt-4o-mini", messages=[{"role": "user", "content": "Rivers?"}])


def test_without_aiohttp_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider_double, "find_spec", lambda _: None)
    with pytest.raises(SimulatedProviderNotInstalled, match=r"pip install 'forebay\[testing\]'"):
        _ = ProviderDouble(SharedProviderProcess()).openai_url
