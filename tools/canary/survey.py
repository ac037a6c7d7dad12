"""Looks at the Megatron that this process finds; prints what it found as one line of JSON behind `MARK`.

python -m tools.canary.survey facts < paths     what each dotted path, or flag, leads to; paths as a list in JSON
python -m tools.canary.survey replaced          what this project puts in the place of Megatron's
"""

import argparse
import ast
import hashlib
import importlib
import inspect
import json
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from .signatures import Parameter, parameters
from .uses import CONFIG

MARK = "canary:"
OWN = str(Path(__file__).resolve().parents[2] / "megatron" / "remoe")


def facts(paths: list[str]) -> dict[str, Any]:
    """What each path leads to.

    Returns:
        Path → `parameters`, `file`, `line` and `body` (a hash of what the code does) as far as it has them; `error`
        where there is nothing.
    """
    return {path: _fact(path) for path in paths}


def _fact(path: str) -> dict[str, Any]:
    if path.startswith("--"):
        return {} if path[2:] in _flags() else {"error": "there is no such flag"}
    try:
        found = _resolve(path)
    except Exception as error:  # whatever importing raises
        return {"error": _in_one_line(error)}
    if not (inspect.isroutine(found) or inspect.isclass(found)):
        return {}
    fact: dict[str, Any] = {}
    try:
        fact["parameters"] = parameters(found)
        plain = inspect.unwrap(found)
        lines, fact["line"] = inspect.getsourcelines(plain)
        fact["file"] = _from_megatron(str(inspect.getsourcefile(plain)))
        fact["body"] = _digest("".join(lines))
    except (TypeError, ValueError, OSError):
        pass  # built in, or made while importing
    return fact


def _resolve(path: str) -> Any:
    """What a path leads to; None for an attribute that objects of a class have.

    Raises:
        AttributeError, Exception: there is nothing, or importing it fails.
    """
    names = path.split(".")
    found, rest = _module(names)
    for name in rest:
        if inspect.isclass(found) and not hasattr(found, name) and _has_in_objects(found, name):
            return None
        found = getattr(found, name)
    return found


def _module(names: list[str]) -> tuple[ModuleType, list[str]]:
    """The longest part of a path that is a module, and the rest: a package may have a function of a module's name."""
    for place in range(len(names), 1, -1):
        name = ".".join(names[:place])
        try:
            return importlib.import_module(name), names[place:]
        except ModuleNotFoundError as error:
            if not error.name or not name.startswith(error.name):
                raise
    raise ModuleNotFoundError(f"there is no {'.'.join(names[:2])}")


def _has_in_objects(found: type, name: str) -> bool:
    """Whether a class of Megatron's gives its objects the attribute: as a field without default, or in a method."""
    if name in getattr(found, "__dataclass_fields__", {}):
        return True
    classes = [one for one in found.__mro__ if one.__module__.startswith("megatron.")]
    return any(re.search(rf"\bself\.{name}\b *(:[^=\n]+)?=[^=]", inspect.getsource(one)) for one in classes)


@cache
def _flags() -> set[str]:
    from megatron.training.arguments import add_megatron_arguments

    return {action.dest for action in add_megatron_arguments(argparse.ArgumentParser())._actions}


def _digest(source: str) -> str:
    """Of what code does: comments, docstrings and layout do not count."""
    tree = ast.parse(textwrap.dedent(source))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _from_megatron(file: str) -> str:
    return f"megatron{file.rpartition('/megatron')[2]}"


def _in_one_line(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    said = f"{type(error).__name__}: {error}".splitlines()[0]
    return f"{said} ({_from_megatron(frame.filename)}:{frame.lineno})" if "/megatron/" in frame.filename else said


def moe_settings() -> dict[str, str]:
    """The configuration's fields that are about MoE → file and line."""
    config = _resolve(CONFIG)
    lines, first = inspect.getsourcelines(config)
    file = _from_megatron(str(inspect.getsourcefile(config)))
    places = {found[1]: place for place, line in enumerate(lines, first) if (found := re.match(r" +(\w+) *:", line))}
    return {name: f"{file}:{places[name]}" for name in config.__dataclass_fields__ if "moe" in name and name in places}


def replaced() -> dict[str, Any]:
    """What the patches and the CPU part put in the place of Megatron's.

    Returns:
        `replaced`: path → parameters of what stands there, None for an object that is called. `failed`: what a patch
        changes → why it cannot be made. `patches`: how many there are.
    """
    from megatron.remoe.patches import PATCHES

    failed = {}
    for patch in PATCHES:
        try:
            patch.apply()
        except Exception as error:  # whatever another version raises
            failed[patch.changes] = _in_one_line(error)
    return {"replaced": dict(_replacements()), "failed": failed, "patches": len(PATCHES)}


def _replacements() -> Iterator[tuple[str, list[Parameter] | None]]:
    for name, module in sorted(sys.modules.items()):
        if not name.startswith(("megatron.core.", "megatron.training.")):
            continue
        owners = {name: module} | {
            f"{name}.{word}": value
            for word, value in vars(module).items()
            if inspect.isclass(value) and value.__module__ == name
        }
        for path, owner in owners.items():
            for word, value in list(vars(owner).items()):
                if function := _own_function(value):
                    yield f"{path}.{word}", parameters(function, follow_wrapped=False)
                elif type(value).__module__.startswith("megatron.remoe.") and not isinstance(value, ModuleType):
                    yield f"{path}.{word}", None


def _own_function(value: Any) -> Callable[..., Any] | None:
    """This project's part of a function, where decorators stand around it or it stands around another."""
    value = getattr(value, "__func__", value)
    while inspect.isfunction(value):
        inner = [cell.cell_contents for cell in value.__closure__ or ()]
        for function in [value, *filter(inspect.isfunction, inner)]:
            if function.__code__.co_filename.startswith(OWN):
                return function
        value = getattr(value, "__wrapped__", None)
    return None


def main() -> None:
    """Answer one question."""
    if sys.argv[1] == "facts":
        found = facts(json.load(sys.stdin))
        modules = {name: str(importlib.import_module(f"megatron.{name}").__file__) for name in ("core", "training")}
        answer = {"facts": found, "modules": modules, "moe_settings": moe_settings()}
    else:
        from ..common.on_cpu import megatron_on_cpu

        megatron_on_cpu()
        answer = replaced()
    print(f"{MARK}{json.dumps(answer)}")


if __name__ == "__main__":
    main()
