"""The parts of the package that decide something, and the tests that must notice when a decision changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, kw_only=True)
class Area:
    """Files that are mutated together, and the tests that are run against each mutant.

    Attributes:
        files: globs below ``src/forebay``.
        tests: files and folders below ``tests``.
        baseline: percent of the mutants that the tests must kill; a run below it fails.
    """

    files: tuple[str, ...]
    tests: tuple[str, ...]
    baseline: int


AREAS: Final = {
    "admission": Area(
        files=("admission/*.py",),
        tests=("unit/admission", "acceptance/test_routing.py", "acceptance/test_submitting.py"),
        baseline=81,
    ),
    "limit": Area(
        files=("limit/*.py", "limit/adaptive/*.py"), tests=("unit/limit", "contract/test_limit.py"), baseline=66
    ),
    "quota": Area(files=("quota/*.py",), tests=("unit/quota", "unit/upstream/accounts/test_decisions.py"), baseline=76),
    "breaker": Area(files=("breaker/*.py",), tests=("unit/breaker",), baseline=86),
    "retry": Area(files=("retry/*.py",), tests=("unit/retry", "acceptance/test_upstream_retries.py"), baseline=91),
    "account": Area(
        files=(
            "upstream/accounts/account.py",
            "upstream/accounts/call_queue.py",
            "upstream/accounts/fair_order.py",
            "upstream/accounts/bypass.py",
        ),
        tests=(
            *("unit/upstream", "contract/test_account.py", "acceptance/test_upstream.py", "acceptance/test_outage.py"),
        ),
        baseline=82,
    ),
    "call-flow": Area(
        files=("upstream/call_flow.py",),
        tests=(
            *("unit/upstream/test_call_flow.py", "acceptance/test_upstream_retries.py", "acceptance/test_fallback.py"),
        ),
        baseline=85,
    ),
    "selection": Area(
        files=("supervisor/worker_selection.py", "supervisor/pool.py", "supervisor/worker.py"),
        tests=(
            *("unit/supervisor", "acceptance/test_routing.py", "acceptance/test_workers.py"),
            *("acceptance/test_retry_after.py", "acceptance/test_start_deadlines.py", "acceptance/test_submitting.py"),
        ),
        baseline=79,
    ),
    "overflow": Area(
        files=("overflow/*.py",),
        tests=("unit/overflow", "contract/test_task_store.py", "contract/test_task_store_model.py"),
        baseline=90,
    ),
}
