"""Import paths, ``"package.module:name"``: how one process names an object so that another process can import it."""

from __future__ import annotations

import importlib
import inspect
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from forebay.errors import NotImportable

#: The name under which another process imports the program's own file, so that its ``__main__`` guard holds there.
GUEST_MAIN = "__forebay_main__"


def import_path_of(obj: Any, *, worker: str, what: str) -> str:
    """Return the import path of `obj`, a function or class of a module; a string is taken as a path already.

    An object of the program's own file is named by that file: ``"/where/app.py:name"``.

    Args:
        obj: the object that another process is to import.
        worker: the worker's name, for messages.
        what: the setting of the worker that holds `obj`, for messages.

    Raises:
        NotImportable: it has no import path; the message says what to do.
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
        why = "only functions and classes have an import path"
        raise NotImportable(worker=worker, what=what, got=f"a {kind}", why=why)
    module, name = obj.__module__, obj.__qualname__
    if name.endswith("<lambda>"):
        raise NotImportable(worker=worker, what=what, got="a lambda", why="it has no name")
    if "<locals>" in name:
        raise NotImportable(worker=worker, what=what, got=f"{name!r}", why="it is defined inside a function")
    _check_found(obj, module, name, worker=worker, what=what)
    return f"{_module_path(module, worker=worker, what=what, name=name)}:{name}"


def _check_found(obj: Any, module: str, name: str, *, worker: str, what: str) -> None:
    """Check that the name leads to this very object; a name that a decorator has yet to bind may not exist yet."""
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
        why = "it was defined interactively, not in a file"
        raise NotImportable(worker=worker, what=what, got=f"{name!r}", why=why)
    return str(Path(file).resolve())


def import_object(path: str) -> Any:
    """Return the object that an import path names.

    Raises:
        Exception: any exception that importing its module raises.
        AttributeError: the module has no such name.
    """
    module_path, _, name = path.rpartition(":")
    found: Any = _import_file(module_path) if module_path.endswith(".py") else importlib.import_module(module_path)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _import_file(path: str) -> ModuleType:
    if GUEST_MAIN in sys.modules:
        return sys.modules[GUEST_MAIN]
    spec = spec_from_file_location(GUEST_MAIN, path)
    if spec is None or spec.loader is None:
        message = f"{path} is not a Python file"
        raise ImportError(message)
    module = module_from_spec(spec)
    # Objects that the program's file defines have __main__ as their module, there and here.
    sys.modules[GUEST_MAIN] = sys.modules["__main__"] = module
    spec.loader.exec_module(module)
    return module
