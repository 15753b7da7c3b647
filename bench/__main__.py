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
    parser.add_argument("--only", metavar="NAME", help="measure one entry, where a benchmark compares several")
    parser.add_argument("--sides", metavar="NAME,NAME", help="what to compare, where a benchmark has sides to choose")
    arguments = parser.parse_args()
    if arguments.name is None:
        for name in names:
            summary = (importlib.import_module(f"bench.{name}").__doc__ or "").splitlines()[0]
            print(f"{name:10} {summary}")
        return
    run = importlib.import_module(f"bench.{arguments.name}").run
    options = {name: value for name in ("quick", "only", "sides") if (value := getattr(arguments, name))}
    for name in options.keys() - inspect.signature(run).parameters.keys():
        parser.error(f"{arguments.name} has no --{name}")
    results = run(**options)
    report = {"bench": arguments.name, "python": platform.python_version(), **results}
    for name, result in report.items():
        print(f"{name:28} {result:.4g}" if isinstance(result, float) else f"{name:28} {result}")
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
