"""Fixtures of the contract suite, which runs in the environment of each framework: see scripts/test.sh."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import pytest
from tests.frameworks.openai_double import OpenAIDouble, openai_double
from tests.frameworks.sample import Sample

# CrewAI otherwise reports to its makers, asks at the terminal whether to show a trace, and writes to the user's home.
os.environ |= {
    "CREWAI_DISABLE_TELEMETRY": "true",
    "CREWAI_TRACING_ENABLED": "false",
    "CREWAI_STORAGE_DIR": str(Path(__file__).parents[2] / "build" / "crewai"),
}

#: The modules of samples, by the package that each needs.
SAMPLES: Final = {
    "agent_framework": "agent_framework",
    "agents": "openai_agents",
    "autogen_agentchat": "autogen",
    "crewai": "crewai",
    "pydantic_ai": "pydantic_ai",
    "swarm": "openai_swarm",
}
INSTALLED: Final = [module for package, module in SAMPLES.items() if find_spec(package) is not None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test that takes a `sample` on each sample of each framework that is installed."""
    if "sample" in metafunc.fixturenames:
        modules = [import_module(f"tests.frameworks.samples.{name}") for name in INSTALLED]
        samples: list[Sample] = [sample for module in modules for sample in module.SAMPLES]
        metafunc.parametrize("sample", samples, ids=[sample.name.replace(" ", "-") for sample in samples])


@pytest.fixture
def double() -> Iterator[OpenAIDouble]:
    with openai_double() as running:
        yield running


@pytest.hookimpl(tryfirst=True)
def pytest_unconfigure() -> None:
    """Collect what CrewAI has kept of event loops that have ended: nobody can close these connections any more."""
    if find_spec("crewai") is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()
