"""Lists on pages that are kept by hand: every public name of a package stands on a page of docs/reference/api."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from tests.contract.test_limit import LIMITS
from tests.integration.test_docs import DOCS, ERRORS, names
from tests.unit.upstream.providers.test_request import PROVIDERS

import forebay
from forebay import errors, limit
from forebay.limit import Limit

API = sorted((DOCS / "reference" / "api").glob("*.md"))
PACKAGES = (
    "forebay",
    "forebay.adapters.langgraph",
    "forebay.breaker",
    "forebay.events",
    "forebay.limit",
    "forebay.quota",
    "forebay.retry",
    "forebay.scale",
    "forebay.state",
    "forebay.supervisor",
    "forebay.testing",
    "forebay.upstream",
)
# Exported for the other packages of Forebay alone.
INTERNAL = {
    "forebay.adapters.langgraph": {"handler"},
    "forebay.breaker": {"UPSTREAM_RULES", "WORKER_RULES"},
    "forebay.events": {"EventBus"},
    "forebay.quota": {"check_dollars", "check_quotas"},
}
DIRECTIVE = re.compile(r"^::: ([\w.]+)\n(?: +options:\n +members: (\[[\w, ]*\]|false)$)?", re.MULTILINE)


def find(path: str) -> Any:
    """Return the name in a module, or else the module, at a path with dots."""
    module, _, name = path.rpartition(".")
    parent = importlib.import_module(module)
    return getattr(parent, name) if hasattr(parent, name) else importlib.import_module(path)


def shown(page: Path) -> list[Any]:
    """Return what a page documents: the object of each directive, and a module's names as far as they are listed."""
    found = []
    for path, members in DIRECTIVE.findall(page.read_text()):
        target = find(path)
        found.append(target)
        if inspect.ismodule(target) and members != "false":
            listed = re.findall(r"\w+", members) or getattr(target, "__all__", [])
            found.extend(getattr(target, name) for name in listed)
    return found


def public_names(package: str) -> set[str]:
    """Return the names in ``__all__``; without one, the public classes and functions that are defined there."""
    module = importlib.import_module(package)
    defined = {name for name, value in vars(module).items() if getattr(value, "__module__", "") == package}
    return set(getattr(module, "__all__", {name for name in defined if not name.startswith("_")}))


def is_error(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, errors.ForebayError)


@pytest.mark.parametrize("page", API, ids=lambda page: page.stem)
def test_a_page_shows_each_name_once(page: Path) -> None:
    found = [id(value) for value in shown(page)]
    assert len(found) == len(set(found)) > 0


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_of_a_package_stands_on_a_page(package: str) -> None:
    listed = [value for page in API for value in shown(page)]
    public = {name: find(f"{package}.{name}") for name in public_names(package) - INTERNAL.get(package, set())}
    missing = [
        name for name, value in public.items() if not is_error(value) and not any(value is other for other in listed)
    ]
    assert missing == [], f"add ::: {package}.NAME to a page of docs/reference/api"


def test_every_public_error_stands_on_the_page_of_errors() -> None:
    public = {name for name in forebay.__all__ if is_error(getattr(forebay, name))}
    assert public <= set(names(ERRORS.read_text()))


@pytest.mark.parametrize("package", INTERNAL)
def test_an_internal_name_is_still_exported(package: str) -> None:
    assert INTERNAL[package] <= public_names(package)


@pytest.mark.parametrize("page", ["reference/settings.md", "gateway.md"])
def test_the_setting_of_the_provider_names_every_provider(page: str) -> None:
    (row,) = (line for line in (DOCS / page).read_text().splitlines() if line.startswith("| `provider` |"))
    assert [name for name in PROVIDERS if f'`"{name}"`' not in row] == []


def test_the_contract_is_tested_on_every_limit() -> None:
    kinds = {getattr(limit, name) for name in limit.__all__}
    expected = {kind for kind in kinds if issubclass(kind, Limit)} - {Limit}
    tested = {type(make()) for make in LIMITS.values()}
    assert expected <= tested
