"""Fit token lengths and gaps between arrivals to the Azure LLM inference traces; print a module of quantiles.

    .venv/bin/python bench/fit_traffic.py --data DIR > src/forebay/simulation/provider/traffic_quantiles.py

The fit consists of order statistics alone:

- input tokens: a table of quantiles, denser in the tails;
- output tokens: one such table for each of several classes of input of equal size, because in conversations long
  questions get long answers;
- gaps: a table of quantiles of the gap over the mean gap.
"""

from __future__ import annotations

import argparse
import csv
import datetime as dt
import itertools
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

SERVICES = {"conv": ("CONVERSATION", 10), "code": ("CODE", 2)}  # file, name, classes of input
INPUT_CHANCES = (
    *(0.0, 0.001, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075),
    *(n / 20 for n in range(2, 19)),
    *(0.925, 0.95, 0.965, 0.98, 0.99, 0.995, 0.999, 1.0),
)
OUTPUT_CHANCES = (0.0, 0.005, 0.01, 0.03, *(n / 20 for n in range(1, 20)), 0.97, 0.99, 0.995, 0.999, 1.0)
GAP_CHANCES = (
    *(0.0, 0.01, 0.03, 0.06),
    *(n / 40 for n in range(4, 38)),
    *(0.95, 0.97, 0.98, 0.985, 0.99, 0.9925, 0.995, 0.9965, 0.9975, 0.998, 0.9985),
    *(0.999, 0.9993, 0.9995, 0.9997, 0.9998, 0.9999, 1.0),
)

HEADER = '''"""Quantiles of real LLM traffic, written by ``bench/fit_traffic.py``: do not edit, run it again.

The traffic is that of two Azure LLM inference services on 16 November 2023, published by Microsoft in the Azure Public
Dataset as "AzureLLMInferenceTrace" under CC-BY 4.0 and introduced in P. Patel et al., "Splitwise: Efficient Generative
LLM Inference Using Phase Splitting", ISCA 2024. Only quantiles are kept here, nothing of the traces themselves.
"""

from typing import Final

# fmt: off
'''

Row = tuple[dt.datetime, int, int]


def read(path: Path) -> list[Row]:
    """Return the arrival, input and output tokens of each request, in order of arrival."""
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        return sorted(
            (dt.datetime.fromisoformat(r["TIMESTAMP"][:26]), int(r["ContextTokens"]), int(r["GeneratedTokens"]))
            for r in rows
        )


def quantiles(values: Sequence[float], chances: Sequence[float]) -> list[float]:
    """Return quantiles of a sample, linear between order statistics."""
    ordered = sorted(values)
    found = []
    for chance in chances:
        position = chance * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        found.append(ordered[low] + (position - low) * (ordered[high] - ordered[low]))
    return found


def gaps(rows: Sequence[Row]) -> list[float]:
    """Return the gaps between arrivals over their mean."""
    between = [(b[0] - a[0]).total_seconds() for a, b in itertools.pairwise(rows)]
    mean = sum(between) / len(between)
    return [max(gap / mean, 1e-6) for gap in between]


def classes(rows: Sequence[Row], count: int) -> Iterator[list[int]]:
    """Yield the output tokens of `count` classes of equal size, from the shortest inputs to the longest."""
    by_input = sorted((r[1], r[2]) for r in rows)
    for n in range(count):
        part = by_input[n * len(by_input) // count : (n + 1) * len(by_input) // count]
        yield [output for _, output in part]


def table(before: str, values: Sequence[float], form: str = ".0f", after: str = "") -> str:
    """Return a tuple of numbers as source code, with `before` and `after` around it, in lines that fit."""
    text = f"{before}({', '.join(format(value, form) for value in values)}){after}"
    indent = " " * (len(before) - len(before.lstrip()) + 4)
    return textwrap.fill(text, 118, subsequent_indent=indent, drop_whitespace=True)


def main(arguments: Sequence[str]) -> None:
    """Print the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with the two traces")
    data = parser.parse_args(arguments).data
    print(HEADER)
    for name, chances in (("INPUT", INPUT_CHANCES), ("OUTPUT", OUTPUT_CHANCES), ("GAP", GAP_CHANCES)):
        print(table(f"{name}_CHANCES: Final = ", chances, ".6g"))
    for file, (name, count) in SERVICES.items():
        rows = read(data / f"AzureLLMInferenceTrace_{file}.csv")
        span = (rows[-1][0] - rows[0][0]).total_seconds()
        print(f"\n{name}_RATE: Final = {(len(rows) - 1) / span:.3f}  # arrivals a second")
        print(table(f"{name}_INPUT: Final = ", quantiles([r[1] for r in rows], INPUT_CHANCES)))
        print(f"{name}_OUTPUT: Final = (  # one row for each class of input, from the shortest to the longest")
        for outputs in classes(rows, count):
            print(table("    ", quantiles(outputs, OUTPUT_CHANCES), after=","))
        print(")")
        print(table(f"{name}_GAP: Final = ", quantiles(gaps(rows), GAP_CHANCES), ".6g"))


if __name__ == "__main__":
    main(sys.argv[1:])
