"""Queue control: what becomes of tasks that wait when more arrives than can be served in time.

Tasks with deadlines on the 20 slots of a real supervisor, three virtual minutes after the first, means over seeds
(SEEDS=3), two to four distributions of service time, deadlines of four or of two to twenty mean service times, and one
priority or four. Of each way to control the queue: the tasks that ended in time, of those that the slots could serve;
the share of the slots that they used; and after which share of their time the callers of the others were told.
Of CRITICAL tasks in bursts that cannot be stored: the share that is rejected, with worse tasks pushed out of the queue
or not. Of agents on a token quota: the runs in time, with a start gate that reads their estimates or does not.
``--only NAME`` measures policies, estimates, push-out or "start gate". Charts go to build/bench.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from statistics import fmean
from typing import Final

from bench.calls.limits import select
from bench.calls.parallel_runs import CHARTS, SEEDS, run_parallel
from bench.queue.charts import plot_panels
from bench.queue.deadline_run import ESTIMATES, PRIORITIES, Case, DeadlineRun, Outcome
from bench.queue.gate_run import GateCase, runs_in_time
from bench.queue.policies import OURS, POLICIES
from bench.queue.push_run import SLOTS, PushCase, share_rejected

LOADS: Final = (0.9, 1.2, 2.0, 5.0, 10.0)  # times what the slots can serve
_ARRIVALS: Final = {"steady": False, "in bursts": True}
_MEASURES: Final[dict[str, Callable[[Outcome], float]]] = {
    "tasks in time": lambda outcome: outcome.in_time,
    "slots put to use": lambda outcome: outcome.work,
    "others told after": lambda outcome: outcome.told,
}
_COMPARED: Final = ("policies", "estimates", "push-out", "start gate")
_BURSTS: Final = (5, 10, 20, 40, 80)  # CRITICAL tasks at once
_GATE_LOADS: Final = (0.8, 1.5, 3.0, 5.0)


def one(case: Case) -> Outcome:
    """Return the outcome of one run."""
    return DeadlineRun(case).run()


def _measure(
    cases: Mapping[str, Iterable[Case]], loads: Iterable[float], seeds: int
) -> dict[str, dict[float, Outcome]]:
    """Return the mean outcome over all cases and seeds, by name and load."""
    runs = {
        (name, load): [replace(case, load=load, seed=seed) for case in of_name for seed in range(seeds)]
        for load in loads
        for name, of_name in cases.items()
    }
    found = dict(zip(flat := [case for each in runs.values() for case in each], run_parallel(one, flat), strict=True))
    means: dict[str, dict[float, Outcome]] = {}
    for (name, load), of_name in runs.items():
        outcomes = [found[case] for case in of_name]
        fields = ("work", "in_time", "told")
        mean = {field: fmean(getattr(outcome, field) for outcome in outcomes) for field in fields}
        better = fmean(found[case].better for case in of_name if len(set(PRIORITIES[case.priorities])) > 1)
        means.setdefault(name, {})[load] = Outcome(**mean, better=better)
    return means


def _scenes(services: Iterable[str], **fields: bool | str) -> list[Case]:
    """Return the cases of two kinds of deadlines and of priorities, whose policy, load and seed are to be set."""
    return [
        Case(policy=OURS, load=1.0, service=service, deadline=deadline, priorities=priorities, **fields)  # type: ignore[arg-type]
        for service in services
        for deadline in ("short", "mixed")
        for priorities in PRIORITIES
    ]


def _compare_policies(loads: tuple[float, ...], seeds: int) -> dict[str, float]:
    panels, results = {}, {}
    for arrivals, bursts in _ARRIVALS.items():
        scenes = _scenes(("exponential", "answers", "few long"), bursts=bursts)
        means = _measure({name: [replace(case, policy=name) for case in scenes] for name in POLICIES}, loads, seeds)
        for measure, value in _MEASURES.items():
            panels[f"{measure}, {arrivals}"] = {
                name: [value(by_load[load]) for load in loads] for name, by_load in means.items()
            }
        results.update(_lines(means, arrivals))
    plot_panels(CHARTS / "queue-policies.png", panels, loads, xlabel="load", bold=OURS)
    return results


def _compare_estimates(loads: tuple[float, ...], seeds: int) -> dict[str, float]:
    scenes = _scenes(("alike", "exponential", "answers", "few long"))
    means = _measure({name: [replace(case, estimates=name) for case in scenes] for name in ESTIMATES}, loads, seeds)
    panels = {
        measure: {name: [value(by_load[load]) for load in loads] for name, by_load in means.items()}
        for measure, value in _MEASURES.items()
    }
    plot_panels(CHARTS / "queue-estimates.png", panels, loads, xlabel="load", bold="exact")
    return _lines(means, "estimates")


def _lines(means: Mapping[str, Mapping[float, Outcome]], what: str) -> dict[str, float]:
    return {
        f"{what}, {load:g}x, {name}, {measure}": round(value(outcome), 3)
        for name, by_load in means.items()
        for load, outcome in by_load.items()
        for measure, value in (*_MEASURES.items(), ("of CRITICAL and HIGH", lambda outcome: outcome.better))
    }


def _compare_push_out(loads: tuple[float, ...], seeds: int) -> dict[str, float]:
    panels: dict[str, dict[str, list[float]]] = {}
    results = {}
    for queue in (None, SLOTS):
        lines = panels[f"CRITICAL rejected, queue of {queue or 100}"] = {}
        for load in loads:
            for pushes, name in ((False, f"others {load:g}x"), (True, f"others {load:g}x, pushed out")):
                cases = [PushCase(burst, load, queue, pushes, seed) for burst in _BURSTS for seed in range(seeds)]
                rejected = dict(zip(cases, run_parallel(share_rejected, cases), strict=True))
                lines[name] = [
                    fmean(rejected[PushCase(burst, load, queue, pushes, seed)] for seed in range(seeds))
                    for burst in _BURSTS
                ]
                for burst, share in zip(_BURSTS, lines[name], strict=True):
                    results[f"queue of {queue or 100}, bursts of {burst}, {name}, rejected"] = round(share, 3)
    plot_panels(CHARTS / "queue-push-out.png", panels, _BURSTS, xlabel="CRITICAL tasks at once", bold="")
    return results


def _compare_gates(loads: tuple[float, ...], seeds: int) -> dict[str, float]:
    panels: dict[str, dict[str, list[float]]] = {}
    results = {}
    for large in (5_000, 20_000, 60_000):
        for reads, name in ((False, "typical call"), (True, "own estimate")):
            cases = [GateCase(reads, load, large, seed) for load in loads for seed in range(seeds)]
            found = dict(zip(cases, run_parallel(runs_in_time, cases), strict=True))
            for index, what in enumerate(("runs", "tokens")):
                values = [
                    fmean(found[GateCase(reads, load, large, seed)][index] for seed in range(seeds)) for load in loads
                ]
                panels.setdefault(f"{what} in time, a fifth {large // 1000} times as large", {})[name] = values
                for load, value in zip(loads, values, strict=True):
                    results[f"start gate, {large // 1000}x, {load:g}x, {name}, {what}"] = round(value, 3)
    plot_panels(CHARTS / "queue-start-gate.png", panels, loads, xlabel="load", bold="")
    return results


def run(*, quick: bool = False, only: str | None = None) -> dict[str, float]:
    """Return what became of the tasks by arrivals, load and way; `quick` is one seed and three loads."""
    loads, seeds = ((LOADS[0], LOADS[2], LOADS[-1]), 1) if quick else (LOADS, SEEDS)
    compared = select(_COMPARED, only)
    results: dict[str, float] = {}
    if "policies" in compared:
        results |= _compare_policies(loads, seeds)
    if "estimates" in compared:
        results |= _compare_estimates(loads, seeds)
    if "push-out" in compared:
        results |= _compare_push_out((0.8, 1.2, 3.0), seeds)
    if "start gate" in compared:
        results |= _compare_gates(_GATE_LOADS, seeds)
    return results
