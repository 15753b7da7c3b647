"""Whom the agents call."""

from __future__ import annotations

from statistics import mean

import pytest

from demo.provider import RPM, MissingKey, Provider, provider_config, provider_from, warning
from demo.settings import Settings
from demo.workload import surge

URL = "https://llm.example/v1"


def test_without_a_url_it_is_the_simulated_provider() -> None:
    assert provider_from({"OPENAI_API_KEY": "secret"}) is None


def test_a_url_without_a_key_is_a_mistake_that_says_what_to_set() -> None:
    with pytest.raises(MissingKey, match="PROVIDER_API_KEY or OPENAI_API_KEY"):
        provider_from({"PROVIDER_URL": URL})


def test_the_providers_own_key_goes_before_openais() -> None:
    environment = {"PROVIDER_URL": URL, "OPENAI_API_KEY": "openai"}
    assert provider_from(environment) == (Provider(url=URL, model="gpt-4o-mini", simulated=False), "openai")
    both = provider_from(environment | {"PROVIDER_API_KEY": "own", "PROVIDER_MODEL": "llama-4"})
    assert both == (Provider(url=URL, model="llama-4", simulated=False), "own")


def test_only_openai_itself_is_taken_to_count_as_openai_does() -> None:
    assert Provider(url="https://api.openai.com/v1").rules == "openai"
    assert Provider(url=URL).rules == Provider(url="http://127.0.0.1:8000/v1").rules == "openai-compatible"


def test_the_price_is_that_of_the_longest_name_that_fits() -> None:
    mini = Provider(url=URL, model="gpt-4o-mini-2024-07-18").price
    full = Provider(url=URL, model="gpt-4o-2024-08-06").price
    assert mini is not None
    assert full is not None
    assert mini.input < full.input
    assert Provider(url=URL, model="llama-4").price is None


def test_the_key_grants_fewer_calls_than_one_process_can_make() -> None:
    (rate,) = provider_config(Settings()).rate_limits
    assert rate.amount == RPM
    assert rate.amount / rate.period < 20


def test_the_key_grants_fewer_calls_than_the_agents_would_make() -> None:
    simulated = provider_config(Settings())
    tokens = mean(length for job in surge(1000, 7) for length in job.lengths)
    assert Settings().agents / (simulated.ttft + simulated.tpot * tokens) > 1.2 * RPM / 60


def test_a_faster_provider_grants_more_and_answers_sooner() -> None:
    usual, fast = provider_config(Settings()), provider_config(Settings(speed=10.0))
    assert fast.rate_limits[0].amount == 10 * usual.rate_limits[0].amount
    assert fast.ttft == pytest.approx(usual.ttft / 10)


def test_the_warning_says_who_is_paid_and_how_often() -> None:
    text = warning(Provider(url=URL, model="gpt-4o-mini", simulated=False), Settings(tasks=60))
    assert URL in text
    assert "60 tasks" in text
    assert "--tasks" in text
