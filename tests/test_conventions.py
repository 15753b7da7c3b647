"""Conventions of this repository that no linter checks: finished code, import cycles, words, docstrings, pages."""

from __future__ import annotations

import ast
import re
import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
SOURCES = sorted((SOURCE / "forebay").rglob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|raise NotImplementedError)\b")
PYTHON_BLOCK = re.compile(r"^( *)```python[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


# The files that may start a thread. Engines and the SQLite writer pass theirs to run_in_executor, which a virtual loop
# runs inline; the heartbeat and the loop monitor start none in virtual time; the portal and the command line use real
# time.
STARTS_THREAD = re.compile(r"\b(Thread|ThreadPoolExecutor|ProcessPoolExecutor)\(")
MAY_START_THREADS = re.compile(
    r"_threads\.py|(engine|simulation|cli)/.*|storage/(commit_watch|redis_listener)\.py|state/redis_invalidations\.py|"
    r"supervisor/(.*/)?(leases|loop_monitor|portal)\.py|upstream/shared/leases/exchange_loop\.py"
)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


# --- finished code ---------------------------------------------------------------------------------------------------


def test_no_source_file_has_an_unfinished_marker() -> None:
    found = [
        f"{name(path)}:{number}: {line.strip()}"
        for path in SOURCES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if UNFINISHED.search(line)
    ]
    assert not found, "\n" + "\n".join(found)


def test_only_listed_files_start_threads() -> None:
    package = SOURCE / "forebay"
    threaded = [str(path.relative_to(package)) for path in SOURCES if STARTS_THREAD.search(path.read_text())]
    found = [path for path in threaded if not MAY_START_THREADS.fullmatch(path)]
    assert not found, (
        f"{found} start threads of their own, which a virtual event loop cannot run. Pass the executor to "
        "loop.run_in_executor, which a virtual loop runs inline, and add the file to MAY_START_THREADS."
    )


# --- import cycles ---------------------------------------------------------------------------------------------------


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, modules: Mapping[str, Path]) -> Iterator[str]:
    """Yield the modules of `modules` that a file imports, wherever the import statement is."""
    package = module_name(path).split(".")
    if path.stem != "__init__":
        package = package[:-1]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                submodule = f"{source}.{alias.name}"
                if submodule in modules:
                    yield submodule
                elif source in modules:
                    yield source


def import_graph() -> dict[str, set[str]]:
    modules = {module_name(path): path for path in SOURCES}
    return {module: set(imports(path, modules)) - {module} for module, path in modules.items()}


def strongly_connected(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components of a graph (R. Tarjan, 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    components: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for successor in sorted(graph[node]):
            if successor not in index:
                visit(successor)
                low[node] = min(low[node], low[successor])
            elif successor in stack:
                low[node] = min(low[node], index[successor])
        if low[node] == index[node]:
            start = stack.index(node)
            components.append(sorted(stack[start:]))
            del stack[start:]

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return components


def test_no_module_is_part_of_an_import_cycle() -> None:
    """Imports for type checking and inside functions count."""
    graph = import_graph()
    largest = max(strongly_connected(graph), key=len)
    edges = [f"  {module} -> {', '.join(sorted(graph[module] & set(largest)))}" for module in largest]
    assert len(largest) == 1, f"an import cycle of {len(largest)} modules:\n" + "\n".join(edges)


# --- words -----------------------------------------------------------------------------------------------------------

# Words of an earlier vocabulary of this project, which readers from outside cannot know; docs/glossary.md has the words
# that are used now. A word counts wherever it is a part of an identifier: `_house`, `QueueDesks`. Only words without a
# second, ordinary meaning in this code are listed: "line", "turn", "room" and "gate" are not.
PRIVATE_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
    amid anew buried bury desk desks door doors fates foreseen foretell foretells foretold heard hears heeded
    heeds house houses inquiry journey journeys knock knocked knocks ladder ladders loosen loosened mend mended
    mends plant planted plants purse purses rouse roused rung rungs seam seams stretch stretched stretches
    tending tighten tightened till tills unrecord warden wardens
    """,
    )
)
PRIVATE_PHRASES = (
    "be meant",
    "draw on",
    "draws on",
    "for ever",
    "last watch",
    "let go",
    "let in",
    "lets in",
    "of no use",
    "of use",
    "put back",
    "refused by us",
    "set aside",
    "shuts out",
    "tell of",
    "tells of",
    "told of",
    "turned away",
    "turns away",
)
FRAGMENT = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
PHRASE = re.compile(rf"(?<![a-z])(?:{'|'.join(PRIVATE_PHRASES).replace(' ', '[ _]')})(?![a-z])", re.IGNORECASE)

# Lines that may hold a listed word: a part of the line, and why.
ALLOWED: dict[str, str] = {}

DIRECTORIES = ("src", "tests", "bench", "demo", "deploy", "examples", "docs")
SUFFIXES = {".py", ".md", ".toml", ".tpl", ".txt", ".yaml"}
FILES = ("README.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml")
DEFINE_WORDS = {"docs/glossary.md", "CHANGELOG.md", "tests/test_conventions.py"}


def searched_files() -> list[Path]:
    in_directories = [path for top in DIRECTORIES for path in (ROOT / top).rglob("*") if path.suffix in SUFFIXES]
    return sorted(in_directories) + [ROOT / name for name in FILES]


def private_words(line: str) -> list[str]:
    words = {fragment.lower() for fragment in FRAGMENT.findall(line)} & PRIVATE_WORDS
    return sorted(words | {phrase.lower() for phrase in PHRASE.findall(line)})


def test_no_private_word_is_used() -> None:
    found = []
    for path in searched_files():
        shown = name(path)
        if shown in DEFINE_WORDS:
            continue
        if words := private_words(shown):
            found.append(f"{shown}: the file's name has {words}")
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if (words := private_words(line)) and not any(part in line for part in ALLOWED):
                found.append(f"{shown}:{number}: {', '.join(words)}: {line.strip()[:100]}")
    assert not found, f"{len(found)} lines with private words (see docs/glossary.md):\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("supervisor._house.close()", ["house"]),
        ("class QueueDesks:", ["desks"]),
        ("wait_for_ever, in a warehouse", ["for_ever"]),
        ("an ordinary line with a planter and a backdoor", []),
    ],
)
def test_private_words_are_found_in_identifiers(line: str, words: list[str]) -> None:
    assert private_words(line) == words


# --- docstrings ------------------------------------------------------------------------------------------------------

NO_HEAD = re.compile(r"(What|Whether|Who|Whose|Which|How|Of|That|Where|When)\b")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(parse(path)):
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
            yield node.body[0].lineno, text.partition("\n")[0]


def test_docstrings_begin_with_a_verb_or_with_what_it_is() -> None:
    heads = [(path, line, head) for path in SOURCES for line, head in docstrings(path)]
    found = [f"{name(path)}:{line}: {head}" for path, line, head in heads if NO_HEAD.match(head)]
    assert found == []


# --- pages -----------------------------------------------------------------------------------------------------------


def compiles(code: str) -> bool:
    """Return True if `code` is Python at the top of a module, or inside an async function."""
    for candidate in (code, "async def page():\n" + textwrap.indent(code, "    ")):
        try:
            compile(candidate, "page", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        except SyntaxError:
            continue
        return True
    return False


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_the_python_on_a_page_is_python(path: Path) -> None:
    blocks = [textwrap.dedent(block) for _, block in PYTHON_BLOCK.findall(path.read_text())]
    assert [block for block in blocks if not compiles(block)] == []


def test_the_changelog_begins_with_the_version_of_the_package() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    entries = re.findall(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert entries[0] == version
