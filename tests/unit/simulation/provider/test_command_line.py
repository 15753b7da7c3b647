"""The command line of the simulated provider."""

from __future__ import annotations

import pytest

from forebay.simulation.__main__ import config_from_options, main, parser
from forebay.simulation.provider.provider_config import (
    Dialect,
    InvalidProviderConfig,
    ProviderConfig,
    SimulatedRateLimit,
    Unit,
)


def config(*arguments: str) -> ProviderConfig:
    return config_from_options(parser().parse_args(arguments))


def test_without_options_the_configuration_is_the_default() -> None:
    assert config() == ProviderConfig()


def test_options_set_the_usual_fields() -> None:
    assert config("--dialect", "anthropic", "--rpm", "50", "--otpm", "8000", "--slots", "7") == ProviderConfig(
        dialect=Dialect.ANTHROPIC,
        slots=7,
        rate_limits=(
            SimulatedRateLimit(unit=Unit.REQUESTS, amount=50),
            SimulatedRateLimit(unit=Unit.OUTPUT_TOKENS, amount=8000),
        ),
    )


def test_options_change_a_configuration_in_json() -> None:
    there = ProviderConfig.openai(rpm=5, slots=3)
    assert config("--config", there.to_json().decode(), "--slots", "4") == ProviderConfig.openai(rpm=5, slots=4)


def test_an_invalid_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidProviderConfig, match="slots"):
        config("--slots", "-1")
    with pytest.raises(SystemExit):
        main(["--config", '{"slotz": 1}'])
    assert "slotz" in capsys.readouterr().err
