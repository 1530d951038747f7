"""Functions that a user names as `package.module:function`: imported here, and what they raise in one line."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from dtl.errors import UserError
from dtl.text import nearest


def import_function(name: str, what: str) -> Callable[..., Any]:
    """The function, from a module in the working directory or on the path. UserError, which begins with `what`, where there is none."""
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:
        # A launcher puts the script's own folder on the path, and the user's modules lie in the working directory.
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"{what}: cannot import {module_name!r} ({error}); give it as package.module:function") from error
    except (Exception, SystemExit) as error:  # the module's own code; a script without a main guard may even end the process
        raise UserError(f"{what}: importing {module_name!r} raised {raised(error)}") from error
    function: Callable[..., Any] | None = getattr(module, function_name, None)
    if not callable(function):
        near = nearest(function_name, [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")])
        raise UserError(f"{what}: {module_name} has no function {function_name!r}{near}")
    return function


def raised(error: BaseException) -> str:
    """An error of the user's code in one line: its type, its text and the last line of code outside torch and dtl."""
    torch = importlib.util.find_spec("torch")
    places = [*((torch and torch.submodule_search_locations) or ()), os.path.dirname(os.path.dirname(__file__)), importlib.__path__[0]]
    libraries = ("<frozen ", *(place + os.sep for place in places))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(libraries)]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{' '.join(f'{type(error).__name__}: {error}'.split())}{place}"


def code_sha256(name: str, what: str) -> str:
    """Of the files of the module that is named, and of that which defines the function if it is another one. UserError as `import_function`."""
    function = import_function(name, what)
    files = set()
    for defined in (importlib.import_module(name.partition(":")[0]), inspect.unwrap(function)):
        with suppress(TypeError):  # an object that can be called, or a builtin
            files.add(inspect.getsourcefile(defined))
    digest = hashlib.sha256()
    for file in sorted(file for file in files if file is not None):
        with suppress(OSError):
            digest.update(hashlib.sha256(Path(file).read_bytes()).digest())
    return digest.hexdigest()
