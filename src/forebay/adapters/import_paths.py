"""Import paths: how an object is named so that another process finds it, ``"package.module:name"``."""

from __future__ import annotations

import importlib
import inspect
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from forebay.errors import NotImportable

#: What the program's own file is called where another process imports it, so that its ``__main__`` guard holds.
GUEST_MAIN = "__forebay_main__"


def import_path_of(obj: Any, *, worker: str, what: str) -> str:
    """The import path of `obj`, a function or class of a module; a string is taken as one.

    An object of the program's own file is named by that file: ``"/where/app.py:name"``.

    Args:
        obj: what another process is to find.
        worker: whose it is, for messages.
        what: which setting of the worker's it is, for messages.

    Raises:
        NotImportable: it has none; the message says what to do.
    """
    if isinstance(obj, str):
        module, _, name = obj.rpartition(":")
        if not module or not name:
            raise NotImportable(
                worker=worker, what=what, got=f"{obj!r}", why='it is not of the form "package.module:name"'
            )
        return obj
    kind = type(obj).__name__
    if not (inspect.isfunction(obj) or inspect.isclass(obj)):
        raise NotImportable(worker=worker, what=what, got=f"a {kind}", why="only functions and classes know theirs")
    module, name = obj.__module__, obj.__qualname__
    if name.endswith("<lambda>"):
        raise NotImportable(worker=worker, what=what, got="a lambda", why="it has no name")
    if "<locals>" in name:
        raise NotImportable(worker=worker, what=what, got=f"{name!r}", why="it was made inside of a function")
    _check_found(obj, module, name, worker=worker, what=what)
    return f"{_module_path(module, worker=worker, what=what, name=name)}:{name}"


def _check_found(obj: Any, module: str, name: str, *, worker: str, what: str) -> None:
    """Whether the name leads to the very object. One that a decorator has yet to bind may lead nowhere for now."""
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, obj)
    if found is not obj:
        why = f"{module}:{name} is another object (was it wrapped by a decorator?)"
        raise NotImportable(worker=worker, what=what, got=f"{name!r}", why=why)


def _module_path(module: str, *, worker: str, what: str, name: str) -> str:
    if module != "__main__":
        return module
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:  # python -m package.module
        return str(spec.name)
    file = getattr(main, "__file__", None)
    if file is None or not Path(file).is_file():
        why = "it was typed in, and stands in no file"
        raise NotImportable(worker=worker, what=what, got=f"{name!r}", why=why)
    return str(Path(file).resolve())


def import_object(path: str) -> Any:
    """The object that an import path names.

    Raises:
        Whatever importing its module raises; AttributeError if there is no such name in it.
    """
    module_path, _, name = path.rpartition(":")
    found: Any = _load_file(module_path) if module_path.endswith(".py") else importlib.import_module(module_path)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _load_file(path: str) -> ModuleType:
    if GUEST_MAIN in sys.modules:
        return sys.modules[GUEST_MAIN]
    spec = spec_from_file_location(GUEST_MAIN, path)
    if spec is None or spec.loader is None:
        message = f"{path} is no Python file"
        raise ImportError(message)
    module = module_from_spec(spec)
    # What the program's file defines calls itself a part of __main__, there and here.
    sys.modules[GUEST_MAIN] = sys.modules["__main__"] = module
    spec.loader.exec_module(module)
    return module
