"""The rules of the house that no linter knows."""

from __future__ import annotations

import ast
import re
import textwrap
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "forebay").rglob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LONGEST = 400  # lines of a file
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|raise NotImplementedError)\b")
PYTHON_BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


# Who starts a thread: engines and the writer give theirs to run_in_executor, which a virtual loop runs in line; the
# heartbeat and the watch have none in virtual time; the portal and the edges of the house are real by their nature.
THREAD = re.compile(r"\b(Thread|ThreadPoolExecutor|ProcessPoolExecutor)\(")
THREADED = re.compile(r"(engine|sim|cli)/.*|storage/sqlite\.py|supervisor/(leases|watch|portal)\.py")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def compiles(code: str) -> bool:
    """Whether `code` is Python, at the top of a module or inside an async function."""
    for candidate in (code, "async def page():\n" + textwrap.indent(code, "    ")):
        try:
            compile(candidate, "page", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        except SyntaxError:
            continue
        return True
    return False


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_a_file_is_short_and_finished(path: Path) -> None:
    lines = path.read_text().splitlines()
    length = len(lines)
    assert length <= LONGEST
    unfinished = [line for line in lines if UNFINISHED.search(line)]
    assert unfinished == []


def test_nothing_blocks_beside_the_seam_that_a_simulation_runs_in_line() -> None:
    room = ROOT / "src" / "forebay"
    threaded = {str(path.relative_to(room)) for path in SOURCES if THREAD.search(path.read_text())}
    assert [path for path in sorted(threaded) if not THREADED.fullmatch(path)] == []


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_the_python_on_a_page_is_python(path: Path) -> None:
    blocks = [textwrap.dedent(block) for _, block in PYTHON_BLOCK.findall(path.read_text())]
    assert [block for block in blocks if not compiles(block)] == []


def test_the_changelog_begins_with_the_version_of_the_package() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    entries = re.findall(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert entries[0] == version
