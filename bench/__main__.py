"""Run one benchmark by name, print its results, and write them as JSON if asked."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import pkgutil
import platform
from pathlib import Path

import bench


def main() -> None:
    """Parse the command line and run."""
    modules = (module for module in pkgutil.iter_modules(bench.__path__) if not module.ispkg)
    names = sorted(module.name for module in modules if module.name not in ("__main__", "fit_traffic"))
    parser = argparse.ArgumentParser(prog="python -m bench", description="Every result is a ratio, from one run.")
    parser.add_argument("name", choices=names, nargs="?", help="the benchmark; without one, all are listed")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--quick", action="store_true", help="run less of it, where a benchmark takes minutes")
    arguments = parser.parse_args()
    if arguments.name is None:
        for name in names:
            summary = (importlib.import_module(f"bench.{name}").__doc__ or "").splitlines()[0]
            print(f"{name:10} {summary}")
        return
    run = importlib.import_module(f"bench.{arguments.name}").run
    if arguments.quick and "quick" not in inspect.signature(run).parameters:
        parser.error(f"{arguments.name} has no --quick")
    results = run(quick=True) if arguments.quick else run()
    report = {"bench": arguments.name, "python": platform.python_version(), **results}
    for name, result in report.items():
        print(f"{name:28} {result:.4g}" if isinstance(result, float) else f"{name:28} {result}")
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
