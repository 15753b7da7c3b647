"""The simulated provider of a test: in the loop as a model, over HTTP as a process."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import openai
import pytest

from forebay.simulation import AnswerCut, Dialect, Faults, InvalidProviderConfig, ProviderConfig, ProviderRefusal, Unit
from forebay.testing import FAST_PROVIDER, ProviderDouble, SimulatedProviderNotInstalled, now, virtual
from forebay.testing import provider_double as provider
from forebay.testing.provider_double import SharedProviderProcess


@pytest.fixture(scope="module")
def plants() -> Iterator[SharedProviderProcess]:
    plants = SharedProviderProcess()
    yield plants
    plants.close()


@virtual
async def test_in_the_loop_a_call_takes_virtual_time() -> None:
    double = ProviderDouble(SharedProviderProcess())
    double.configure(ttft=5.0, tpot=0.1)
    done = await double.call(input_tokens=7, output_tokens=50)
    assert now() == pytest.approx(10.0, abs=1e-3)
    assert (done.usage.input_tokens, done.usage.output_tokens) == (7, 50)
    assert (double.statistics().finished, double.statistics().usd > 0) == (1, True)


@virtual
async def test_limits_and_faults_are_set_and_set_anew() -> None:
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
    async def fates(seed: int) -> list[bool]:
        double = ProviderDouble(SharedProviderProcess())
        double.configure(seed=seed, faults=Faults(error=0.5))
        seen = []
        for _ in range(20):
            try:
                await double.call()
            except ProviderRefusal:
                seen.append(False)
            else:
                seen.append(True)
        return seen

    assert await fates(1) == await fates(1) != await fates(2)


def test_one_that_nobody_has_called_has_seen_nothing() -> None:
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


def test_what_makes_no_sense_is_an_error() -> None:
    double = ProviderDouble(SharedProviderProcess())
    with pytest.raises(InvalidProviderConfig, match="slots=-1"):
        double.configure(slots=-1)
    with pytest.raises(TypeError, match="colour"):
        double.configure(colour="blue")
    assert double.config is FAST_PROVIDER


@pytest.mark.blocks  # it asks another process
def test_over_http_both_sdks_find_it(plants: SharedProviderProcess) -> None:
    double = ProviderDouble(plants)
    with openai.OpenAI(base_url=double.openai_url, api_key="none", max_retries=0) as gpt:
        gpt.chat.completions.create(model="gpt-4o-mini", messages=[{"role": "user", "content": "Rivers?"}])
    with anthropic.Anthropic(base_url=double.anthropic_url, api_key="none", max_retries=0) as claude:
        claude.messages.create(
            model="claude-sonnet-5",
            max_tokens=20,
            messages=[{"role": "user", "content": "Rivers?"}],
            extra_headers={"x-plant-run": "mine"},
        )
    assert (double.statistics().finished, double.statistics().by_status) == (2, {200: 2})
    assert double.bills()["mine"].finished == 1


@pytest.mark.blocks
def test_over_http_it_is_as_configured_before_and_while_it_runs(plants: SharedProviderProcess) -> None:
    double = ProviderDouble(plants)
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
def test_the_next_test_finds_it_as_new(plants: SharedProviderProcess) -> None:
    first, second = ProviderDouble(plants), ProviderDouble(plants)
    first.configure(rpm=1)
    assert first.process.statistics()["now"] >= 0
    assert second.openai_url == first.openai_url
    assert second.statistics().calls == 0
    with openai.OpenAI(base_url=second.openai_url, api_key="none", max_retries=0) as gpt:
        for _ in range(3):
            gpt.chat.completions.create(model="gpt-4o-mini", messages=[{"role": "user", "content": "Rivers?"}])


def test_without_aiohttp_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider, "find_spec", lambda _: None)
    with pytest.raises(SimulatedProviderNotInstalled, match=r"pip install 'forebay\[testing\]'"):
        _ = ProviderDouble(SharedProviderProcess()).openai_url
