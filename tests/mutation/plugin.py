"""A pytest plugin that injects a bug before tests are collected: ``-p tests.mutation.plugin --inject NAME``."""

from __future__ import annotations

import pytest
from tests.mutation import bugs


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--inject", metavar="NAME", help="a function of tests/mutation/bugs.py")


def pytest_configure(config: pytest.Config) -> None:
    if name := config.getoption("--inject"):
        getattr(bugs, name)()
