"""Mutation of the deciding files by mutmut, area by area, within bounds: ``make mutation ARGS="breaker retry"``.

Each area is mutated in a copy of the repository below ``build/mutation``, so that a run that is interrupted leaves the
checkout as it was. A sample of the mutants is drawn by seed. A run prints the share of them that the area's tests kill
and the difference that each survivor makes, and fails if the share is below the area's baseline.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Final

from tests.mutation.areas import AREAS, Area

from forebay.clock import monotonic

ROOT: Final = Path(__file__).parents[2]
WORK: Final = ROOT / "build" / "mutation"
COPIED: Final = ("src", "tests", "docs", "README.md", "pyproject.toml")
OPTIONS: Final = ("-n0", "-m", "not slow", "--hypothesis-profile=mutation", "-p", "no:cacheprovider")
IGNORED: Final = (r"\braise\b", r"\breject\(", r"\bcheck_\w+\(", r"_refuse\(")  # people review the words of errors
KILLED: Final = "killed"
TIMED_OUT: Final = "timeout"  # a mutant that never ends is noticed too
_CONFIGURATION: Final = """
[tool.mutmut]
source_paths = ["src"]
also_copy = ["docs", "README.md"]
only_mutate = {files}
do_not_mutate_patterns = {ignored}
pytest_add_cli_args = {options}
pytest_add_cli_args_test_selection = {tests}
timeout_constant = 5.0
"""


def main() -> int:
    """Mutate the areas that the command line names; return 1 if one of them is below its baseline."""
    arguments = _arguments()
    below = [name for name in arguments.areas if not _run(name, AREAS[name], arguments)]
    if below:
        print(f"Below the baseline (tests/mutation/areas.py): {', '.join(below)}.")
    return 1 if below else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make mutation", description=__doc__.partition("\n")[0])
    parser.add_argument("areas", nargs="*", default=list(AREAS), metavar="AREA", help=", ".join(AREAS))
    parser.add_argument("--most", type=int, default=150, help="mutants tried in each area, drawn by seed; 0 is all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--minutes", type=float, default=10.0, help="for each area; what was not tried is not counted")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; by default one a core")
    parser.add_argument("--quiet", action="store_true", help="show the figures, not the survivors")
    found = parser.parse_args()
    if unknown := sorted(set(found.areas) - set(AREAS)):
        parser.error(f"unknown area: {', '.join(unknown)}; choose from {', '.join(AREAS)}")
    return found


def _run(name: str, area: Area, arguments: argparse.Namespace) -> bool:
    """Mutate an area, print what was found, and return whether enough of its mutants were killed."""
    began, copy = monotonic(), WORK / name
    _prepare(area, copy)
    names = _sample(area, copy, most=arguments.most, seed=arguments.seed)
    print(f"{name}: {len(names)} mutants of {', '.join(area.files)}", flush=True)
    log = copy / "mutmut.log"
    with log.open("wb") as output:
        command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(arguments.jobs), *names]
        try:
            subprocess.run(command, cwd=copy, stdout=output, stderr=output, check=True, timeout=60 * arguments.minutes)
        except subprocess.TimeoutExpired:
            print(f"  stopped after {arguments.minutes:g} minutes")
        except subprocess.CalledProcessError as error:
            print(f"  mutmut ended with status {error.returncode}; see {log}:\n{log.read_text()[-2000:]}")
            return False
    found = _results(copy, names)
    if not arguments.quiet:
        for survivor in sorted(mutant for mutant, status in found.items() if status == "survived"):
            _show(survivor, copy)
    counts = Counter(found.values())
    killed, tried = counts[KILLED] + counts[TIMED_OUT], len(found)
    score = 100 * killed / tried if tried else 0.0
    statuses = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    print(
        f"{name}: {score:.0f} % killed (baseline {area.baseline} %) in {monotonic() - began:.0f} s; {statuses}",
        flush=True,
    )
    return round(score) >= area.baseline


def _prepare(area: Area, copy: Path) -> None:
    """Copy what the area's tests need, and tell mutmut what to do there."""
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    for part in COPIED:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, copy / part)
    configuration = _CONFIGURATION.format(
        files=json.dumps([f"src/forebay/{glob}" for glob in area.files]),
        ignored=json.dumps(list(IGNORED)),
        options=json.dumps(list(OPTIONS)),
        tests=json.dumps([f"tests/{test}" for test in area.tests]),
    )
    with (copy / "pyproject.toml").open("a") as file:
        file.write(configuration)


def _sample(area: Area, copy: Path, *, most: int, seed: int) -> list[str]:
    """Return the names of the mutants to try, as mutmut names them."""
    files = sorted({str(path.relative_to(copy)) for glob in area.files for path in (copy / "src/forebay").glob(glob)})
    program = (
        "import json, sys, pathlib\n"
        "from mutmut.mutation.file_mutation import mutate_file_contents as mutate\n"
        "from mutmut.utils.format_utils import get_mutant_name as name\n"
        "paths = [pathlib.Path(path) for path in sys.argv[1:]]\n"
        "print(json.dumps([name(p, m) for p in paths for m in mutate(str(p), p.read_text()).mutant_names]))\n"
    )
    listed = subprocess.run([sys.executable, "-c", program, *files], cwd=copy, capture_output=True, check=True)
    names: list[str] = json.loads(listed.stdout)
    return names if not most else sorted(random.Random(seed).sample(names, min(most, len(names))))


def _results(copy: Path, names: list[str]) -> dict[str, str]:
    """Return what became of each mutant that was tried."""
    program = "import json; from mutmut.stats import status_by_exit_code as of; print(json.dumps(list(of.items())))"
    listed = subprocess.run([sys.executable, "-c", program], cwd=copy, capture_output=True, check=True)
    statuses = dict(json.loads(listed.stdout))
    codes: dict[str, int | None] = {}
    for path in (copy / "mutants").rglob("*.meta"):
        codes |= json.loads(path.read_text())["exit_code_by_key"]
    return {name: statuses.get(code, "suspicious") for name in names if (code := codes.get(name)) is not None}


def _show(mutant: str, copy: Path) -> None:
    """Print the difference that a mutant makes."""
    command = [sys.executable, "-m", "mutmut", "show", mutant]
    shown = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    print(shown.stdout)


if __name__ == "__main__":
    sys.exit(main())
