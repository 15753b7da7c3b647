"""What the pages say is so: their programs run and print what is quoted, their tables are those of the code."""

from __future__ import annotations

import ast
import builtins
import inspect
import logging
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

import _forebay_pytest as plugin
from forebay import BackpressureSupervisor, Task, Upstream, breaker, errors, events, supervisor, testing, upstream
from forebay.breaker import BreakerRules
from forebay.cli.autoscale_metrics import render_metrics
from forebay.engine import ProcessEngine
from forebay.gateway.metrics.metric_definitions import METRICS
from forebay.quota import RateLimiter
from forebay.retry import Retry
from forebay.scale import Autoscaler, AutoscalerStatistics

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
GATEWAY = DOCS / "gateway.md"
PACKAGE = ROOT / "src" / "forebay"
SUBMITTING = DOCS / "guide" / "submitting.md"
PRIORITIES = DOCS / "guide" / "priorities.md"
EVENTS = DOCS / "guide" / "events.md"
ENGINES = DOCS / "guide" / "engines.md"
SETTINGS = DOCS / "reference" / "settings.md"
ERRORS = DOCS / "reference" / "errors.md"
BLOCKS = DOCS / "reference" / "blocks.md"
OPERATE = DOCS / "operate"
TESTING = DOCS / "testing.md"
RECIPE = DOCS / "howto" / "tests.md"
DESIGN = DOCS / "design.md"
CLIENTS = DOCS / "guide" / "clients.md"
PAGES = (README, *sorted(DOCS.rglob("*.md")))

BLOCK = re.compile(r"^```python( fragment| test)?\n(.*?)^```\n(?:```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
ANY_BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")

# What the README's program imports.
MY_AGENTS = """
from typing import TypedDict
from langgraph.graph import StateGraph

class State(TypedDict, total=False):
    topic: str
    notes: str

async def research(state: State) -> State:
    return {"notes": f"what is known of {state['topic']}"}

graph = StateGraph(State).add_node("research", research).set_entry_point("research").compile()
"""


class Block(NamedTuple):
    """A block of Python on a page, and what the page says that it prints."""

    page: str
    line: int
    code: str
    printed: str | None
    kind: str  # of "fragment", "test", or nothing for a program

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(
            page=str(page.relative_to(ROOT)),
            line=text.count("\n", 0, match.start(2)) + 1,
            code=match[2],
            printed=match[3],
            kind=(match[1] or "").strip(),
        )
        for match in BLOCK.finditer(text)
    ]


def rows(page: Path, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, or below a line that begins so; without its own two first rows."""
    lines = page.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(heading))
    table: list[str] = []
    for line in lines[start:]:
        if line.startswith("|"):
            table.append(line)
        elif table:
            break
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table[2:]]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def defaults(function: Any) -> dict[str, Any]:
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return {parameter.name: parameter.default for parameter in parameters}


def check_settings(table: list[list[str]], expected: dict[str, Any]) -> None:
    """Each setting stands in the table once, in its place and with its default."""
    assert [names(row[0])[0] for row in table] == list(expected)
    for row, default in zip(table, expected.values(), strict=True):
        told = names(row[1])
        if default is inspect.Parameter.empty:
            assert told == [], row
        else:
            assert told, row
            if isinstance(default, type):
                assert told[0] == default.__name__, row
                continue
            assert ast.literal_eval(told[0]) == default, row


PROGRAMS = [block for page in PAGES for block in blocks(page) if not block.kind]
FRAGMENTS = [block for page in PAGES for block in blocks(page) if block.kind == "fragment"]
SUITE = [block for page in (TESTING, RECIPE) for block in blocks(page) if block.kind == "test"]


@pytest.mark.blocks  # a program may do what it likes in its own loop, such as ask for the working directory
@pytest.mark.parametrize("block", PROGRAMS, ids=str)
def test_a_program_runs_as_it_stands_and_prints_what_is_quoted(
    block: Block,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "my_agents.py").write_text(MY_AGENTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    code = compile("\n" * (block.line - 1) + block.code, block.page, "exec", dont_inherit=True)
    exec(code, {"__name__": "__main__"})  # noqa: S102 - the page is ours
    assert capsys.readouterr().out == (block.printed or "")
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


@pytest.mark.parametrize("block", FRAGMENTS, ids=str)
def test_a_fragment_is_python(block: Block) -> None:
    code = "async def page():\n" + textwrap.indent(block.code, "    ")
    compile(code, block.page, "exec", dont_inherit=True)


@pytest.mark.slow
@pytest.mark.blocks
def test_the_suites_of_the_page_on_testing_pass_as_they_stand(pytester: pytest.Pytester) -> None:
    (briefs,) = (block.code for block in FRAGMENTS if block.code.startswith("# briefs.py"))
    for block in SUITE:
        (pytester.path / f"test_{Path(block.page).stem}_{block.line}.py").write_text(block.code)
    (pytester.path / "briefs.py").write_text(briefs)
    alone = ("-p", "no:asyncio", "-p", "no:anyio", "-p", "no:langsmith_plugin")
    result = pytester.runpytest_subprocess("-W", "error", "--strict-markers", "--timeout", "100", "-v", *alone)
    for block in SUITE:
        passes = rf"^test_{Path(block.page).stem}_{block.line}\.py::.* PASSED"
        passed = len(re.findall(passes, result.stdout.str(), re.MULTILINE))
        assert block.printed == f"{passed} passed\n", block
    assert set(result.parseoutcomes()) == {"passed"}


def test_every_program_says_what_it_prints() -> None:
    silent = {"README.md", "docs/traffic.md"}  # they print what they get: of a task, or by chance
    assert [str(block) for block in PROGRAMS if block.page not in silent and not block.printed] == []


def test_the_settings_are_those_of_the_supervisor() -> None:
    check_settings(rows(SETTINGS, "## BackpressureSupervisor"), defaults(BackpressureSupervisor.__init__))


def test_the_settings_are_those_of_register_worker() -> None:
    check_settings(rows(SETTINGS, "## register_worker"), defaults(BackpressureSupervisor.register_worker))


def test_the_settings_are_those_of_an_upstream() -> None:
    check_settings(rows(SETTINGS, "## Upstream"), defaults(Upstream.__init__))


def test_the_settings_are_those_of_an_autoscaler() -> None:
    check_settings(rows(SETTINGS, "## Autoscaler"), defaults(Autoscaler.__init__))


def test_the_metrics_of_the_gateway_are_those_of_its_page() -> None:
    table = [(*names(row[0]), row[1], tuple(names(row[2])), row[3]) for row in rows(GATEWAY, "## Metrics")]
    assert table == [(metric.name, metric.kind, metric.labels, metric.unit) for metric in METRICS]


def test_each_metric_that_a_page_names_exists() -> None:
    suffixes = ("", "_bucket", "_sum", "_count")
    known = {metric.name + suffix for metric in METRICS for suffix in suffixes}
    known |= set(re.findall(r"^# TYPE (\w+)", render_metrics("workers", AutoscalerStatistics()), re.MULTILINE))
    known |= {name.removesuffix("_total") for name in known}
    for page in PAGES:
        if page.parent.name != "adr":
            found = set(
                re.findall(r"\b(?:forebay|gen_ai)_\w+(?:_total|_seconds|_ratio|_usd|_bucket)\b", page.read_text())
            )
            assert found <= known, page


def test_the_settings_are_those_of_overload() -> None:
    check_settings(rows(TESTING, "| `overload(supervisor"), defaults(testing.overload))


def test_the_handlers_and_checks_are_those_of_forebay_testing() -> None:
    told = {re.split(r"\W", name)[0] for row in rows(TESTING, "| handler |") for name in names(row[0])}
    assert told == {
        name
        for name, kind in vars(testing).items()
        if inspect.isclass(kind) and issubclass(kind, testing.HandlerDouble)
    }
    for row in rows(TESTING, "| check |"):
        (name, signature) = re.fullmatch(r"(?:async with )?(\w+)(\(.*\))", names(row[0])[0]).groups()  # type: ignore[union-attr]
        expected = inspect.signature(getattr(testing, name))
        bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in expected.parameters.values()]
        assert signature == str(inspect.Signature(bare))
    assert {name for name in testing.__all__ if name.startswith(("check_", "no_"))} == {
        re.split(r"\W", names(row[0])[0].removeprefix("async with "))[0] for row in rows(TESTING, "| check |")
    }


def test_the_fixtures_are_those_of_the_plugin() -> None:
    told = {names(row[0])[0] for row in rows(TESTING, "| fixture |")}
    assert all(hasattr(plugin, name) for name in told)
    assert told == {
        name
        for name, value in vars(plugin).items()
        if type(value).__name__ == "FixtureFunctionDefinition" and not name.startswith("_")
    }


def test_the_settings_are_those_of_in_process() -> None:
    check_settings(rows(ENGINES, "| of `ProcessEngine` |"), defaults(ProcessEngine.__init__))


def test_the_settings_are_those_of_retries_and_breakers() -> None:
    check_settings(rows(BLOCKS, "| `Retry` |"), defaults(Retry.__init__))
    triggers, *others = rows(BLOCKS, "| `BreakerRules` |")
    expected = defaults(BreakerRules.__init__)
    del expected["triggers"]
    check_settings(others, expected)
    assert eval(names(triggers[1])[0], vars(breaker)) == BreakerRules().triggers  # noqa: S307 - the page is ours


def test_the_fields_are_those_of_a_task() -> None:
    expected = {field.name: field.default for field in msgspec.structs.fields(Task)}
    table = {names(row[0])[0]: row[1] for row in rows(SUBMITTING, "## A task's fields")}
    assert set(table) == set(expected)
    for name, told in table.items():
        default = expected[name]
        if name == "task_id":
            assert told == "generated"
        elif default is msgspec.NODEFAULT:
            assert told == ""
        else:
            shown = f"Priority.{default.name}" if name == "priority" else repr(default).replace("'", '"')
            assert told == f"`{shown}`"


def test_the_events_are_those_that_there_are() -> None:
    told = {
        names(row[0])[0]: (names(row[1])[0], names(row[2])) for row in rows(EVENTS, "Every event has `kind`, `time`")
    }
    expected = {
        event.__name__: (event.kind, [name for name in event.__struct_fields__ if name not in ("at", "time")])
        for event in events.Event.__subclasses__()
    }
    assert told == expected


def test_the_errors_are_those_that_there_are() -> None:
    headings = ("**Mistakes**", "**Sagas**", "**Outcomes**", "**In processes**", "**The store**", "**Shared state**")
    listed = {names(row[0])[0] for heading in headings for row in rows(ERRORS, heading)}
    expected = {
        name
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, errors.ForebayError) and kind is not errors.ForebayError
    }
    assert listed == expected


def test_the_counts_of_statistics_are_all_told() -> None:
    (row,) = (row for row in rows(PRIORITIES, "| call | returns |") if row[0] == "`statistics()`")
    assert set(names(row[1])) == set(supervisor.Statistics.__struct_fields__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(ANY_BLOCK.sub("", page.read_text())):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the usual hosts make them."""
    headings = re.findall(r"^#+ (.*)$", ANY_BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\- ]", "", heading.lower()).strip()) for heading in headings}


def test_the_design_names_tests_that_there_are() -> None:
    cited = TEST.findall(DESIGN.read_text())
    assert cited
    for path, test in cited:
        source = ROOT / path
        assert source.exists(), path
        assert not test or f"def {test}(" in source.read_text(), f"{path}::{test}"


def test_every_value_of_limited_by_has_a_page() -> None:
    parts = {"concurrency", "breaker", "outage", "budget", "deadline", "queue", "retry-after", "overflow", "host"}
    source = "\n".join(path.read_text() for path in (ROOT / "src" / "forebay").rglob("*.py"))
    assert {part for part in parts if f'"{part}"' not in source} == set()
    index = (OPERATE / "index.md").read_text()
    listed = set(re.findall(r"\]\(([\w-]+)\.md\)", index))
    assert parts | {"pool", "worker", "shard", "upstream", "quota"} <= listed
    assert listed == {path.stem for path in OPERATE.glob("*.md")} - {"index"}


def test_the_methods_of_a_rate_limiter_are_those_that_there_are() -> None:
    for row in rows(DOCS / "quotas.md", "| method |"):
        name, arguments = re.fullmatch(r"(\w+)\((.*)\)", names(row[0])[0]).groups()  # type: ignore[union-attr]
        parameters = inspect.signature(getattr(RateLimiter, name)).parameters
        assert {re.split(r"=", argument)[0] for argument in arguments.split(", ")} <= set(parameters), name


def test_the_glossary_and_the_design_name_what_there_is() -> None:
    source = "\n".join(path.read_text() for path in (ROOT / "src" / "forebay").rglob("*.py"))
    classes = set(re.findall(r"^class (\w+)", source, re.MULTILINE))
    for page in (DOCS / "glossary.md", DESIGN):
        told = set(re.findall(r"`([A-Z][a-z]\w+)(?:\(.*?\))?`", ANY_BLOCK.sub("", page.read_text())))
        assert told - classes - vars(builtins).keys() == set(), page.name
    modules = re.findall(r"^`([\w.`, ]+)`$", DESIGN.read_text(), re.MULTILINE)
    for module in re.split(r"`, `", "`, `".join(modules)):
        path = ROOT / "src" / "forebay" / module.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").exists(), module


def test_the_steps_of_a_call_are_those_of_the_package_docstring() -> None:
    lists = [text for text in (inspect.getdoc(upstream) or "").split("\n\n") if text.startswith("1. ")]
    tables = [rows(CLIENTS, heading) for heading in ("## From a bound call to the socket", "## From the answer to the")]
    for text, table in zip(lists, tables, strict=True):
        items = [" ".join(item.split()) for item in re.split(r"\n(?=\d+\. )", text.replace("``", "`"))]
        assert [f"{number}. {step}: {effect}." for number, step, effect in table] == items
        for name, file in (names(step) for _, step, _ in table if names(step)):
            (source,) = (root / file for root in (PACKAGE, PACKAGE / "upstream") if (root / file).exists())
            assert re.search(rf"(?:def|class) {name.rpartition('.')[2]}\b", source.read_text()), name


@pytest.mark.slow
@pytest.mark.blocks
def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    pages = {path.relative_to(tmp_path).with_suffix("").as_posix() for path in tmp_path.rglob("*.html")}
    assert {page.relative_to(DOCS).with_suffix("").as_posix() for page in PAGES[1:]} <= pages
    for path in tmp_path.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe|link)\b[^>]*(?:src|href)="(https?:|//)[^"]*"', path.read_text())
        assert loaded == [], path
