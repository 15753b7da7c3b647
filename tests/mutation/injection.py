"""Ways to inject a bug into a class or a function, named by symbol: type checkers and rename tools see each name.

A bug either replaces a method, or makes a small change to the syntax tree of a function, which is compiled again.
Nothing here knows source text, so a bug survives a rename, and says so when its place is gone. Only the scripts of
what is on Redis, which are no Python, are changed by their text.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

from forebay.overflow import redis
from forebay.state import redis as state_redis

Function = Callable[..., Any]
Change = Callable[[ast.AST], ast.AST | list[ast.stmt] | None]  # None: this node stays as it is


class NothingToChange(LookupError):
    """The function no longer has what the bug changes, or has it more than once: rewrite the bug."""


def replace(owner: type, method: Function, by: Function) -> None:
    """Put `by` in the place of a method of `owner`."""
    name = method.__name__
    if getattr(owner, name) is not method:
        raise NothingToChange(f"{owner.__name__} has no such method: {method.__qualname__}")
    setattr(owner, name, by)


def always(owner: type, method: Function, *, returns: Any) -> None:
    """Let a method of `owner` do nothing, and return the same value whatever it is given."""
    if inspect.iscoroutinefunction(method):

        async def later(*_: Any, **__: Any) -> Any:
            return returns

        replace(owner, method, later)
    else:
        replace(owner, method, lambda *_, **__: returns)


def swap(function: Function, old: type[ast.AST], new: type[ast.AST]) -> None:
    """Swap one operator for another, such as ``>=`` for ``>``, in the only place of `function` that has it."""

    def change(node: ast.AST) -> ast.AST | None:
        return new() if isinstance(node, old) else None

    _rewrite(function, change)


def skip(function: Function, callee: Function) -> None:
    """Leave out the only statement of `function` that is a call of `callee`."""

    def change(node: ast.AST) -> ast.AST | None:
        value = node.value if isinstance(node, ast.Expr) else None
        value = value.value if isinstance(value, ast.Await) else value
        return ast.Pass() if value is not None and _calls(value, callee) else None

    _rewrite(function, change)


def edit_redis_script(old: str, new: str, *, of: ModuleType = redis) -> None:
    """Put `new` in the only place of the script of a module, by default the task store on Redis, that has `old`."""
    of._SCRIPT, of._SHA = _edited(of._SCRIPT, old, new)  # type: ignore[attr-defined]


def edit_state_script(old: str, new: str) -> None:
    """Put `new` in the only place of the script that writes entries of shared state on Redis that has `old`."""
    scripts = state_redis._SCRIPTS
    scripts["write"], state_redis._WRITE_SHA = _edited(scripts["write"], old, new)


def _edited(script: str, old: str, new: str) -> tuple[str, str]:
    """Return a script with `new` in the only place that has `old`, and the name that Redis gives it."""
    if script.count(old) != 1:
        raise NothingToChange(f"the script has {old!r} not once")
    script = script.replace(old, new)
    return script, hashlib.sha1(script.encode()).hexdigest()  # noqa: S324 - as Redis does


def pause_before(function: Function, callee: Function) -> None:
    """Let the event loop turn before each statement of a coroutine function that assigns what `callee` returns."""

    def change(node: ast.AST) -> list[ast.stmt] | None:
        if isinstance(node, ast.Assign) and _calls(node.value, callee):
            return [*ast.parse("await __import__('asyncio').sleep(0)").body, node]
        return None

    _rewrite(function, change, places=range(1, 10))


def _rewrite(function: Function, change: Change, *, places: range = range(1, 2)) -> None:
    """Compile `function` again, changed in so many places, for everybody who has it."""
    assert isinstance(function, FunctionType)
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef)
    definition.decorator_list = []
    changes = 0

    class Editor(ast.NodeTransformer):
        def generic_visit(self, node: ast.AST) -> Any:
            nonlocal changes
            super().generic_visit(node)
            changed = change(node)
            changes += changed is not None
            return node if changed is None else changed

    tree = ast.fix_missing_locations(Editor().visit(tree))
    if changes not in places:
        raise NothingToChange(f"{function.__qualname__} has {changes} places to change: rewrite this bug")
    names: dict[str, Any] = {}
    code = compile(tree, inspect.getsourcefile(function) or "?", "exec", annotations.compiler_flag)
    exec(code, function.__globals__, names)  # noqa: S102 - a function of ours
    function.__code__ = names[function.__name__].__code__


def _calls(node: ast.AST, callee: Function) -> bool:
    called = node.func if isinstance(node, ast.Call) else None
    name = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else None
    return name == callee.__name__
