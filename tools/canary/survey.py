"""Looks at the Megatron that this process finds, and at what this project puts in the place of parts of it.

python -m tools.canary.survey LOOK < PATHS     PATHS: a list in JSON; LOOK: the file to write, a pickled `Look`
"""

import argparse
import ast
import hashlib
import importlib
import inspect
import json
import os
import pickle
import re
import sys
import textwrap
import traceback
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from .facts import Fact, Look
from .signatures import signature
from .uses import CONFIG

OWN = str(Path(__file__).resolve().parents[2] / "megatron" / "remoe")


def survey(paths: list[str]) -> Look:
    """What each path leads to, and what else is there.

    Args:
        paths: dotted, from `megatron` on; or flags.
    """
    modules = {name: str(importlib.import_module(f"megatron.{name}").__file__) for name in ("core", "training")}
    facts = {path: _fact(path) for path in paths}
    settings = _moe_settings()
    before = _all_there()
    patches, failed = _patch()
    changed = {path: value for path, value in _all_there().items() if value is not before.get(path)}
    own = {path: part for path, value in changed.items() if (part := _own_part(value)) is not None}
    return Look(
        modules=modules,
        facts=facts | {path: _fact_of(before.get(path, changed[path])) for path in own},
        moe_settings=settings,
        replaced={path: signature(part, False) if inspect.isfunction(part) else None for path, part in own.items()},
        failed=failed,
        patches=patches,
    )


def _fact(path: str) -> Fact:
    if path.startswith("--"):
        return Fact(error="" if path[2:] in _flags() else "there is no such flag")
    try:
        return _fact_of(_resolve(path))
    except Exception as error:  # whatever importing raises
        return Fact(error=_in_one_line(error))


def _fact_of(found: Any) -> Fact:
    if not (inspect.isroutine(found) or inspect.isclass(found)):
        return Fact()
    fact: dict[str, Any] = {}
    try:
        fact["signature"] = signature(found)
        plain = inspect.unwrap(found)
        lines, first = _source(plain)
        fact["place"] = f"{_from_megatron(str(inspect.getsourcefile(plain)))}:{first}"
        fact["body"] = _digest("".join(lines))
    except (TypeError, ValueError, OSError):
        pass  # built in, or made while importing
    return Fact(**fact)


_source = cache(inspect.getsourcelines)


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
    return any(re.search(rf"\bself\.{name}\b *(:[^=\n]+)?=[^=]", "".join(_source(one)[0])) for one in classes)


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
    return f"megatron/{file.rpartition('/megatron/')[2]}"


def _in_one_line(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    said = f"{type(error).__name__}: {error}".splitlines()[0]
    return f"{said} ({_from_megatron(frame.filename)}:{frame.lineno})" if "/megatron/" in frame.filename else said


def _moe_settings() -> dict[str, str]:
    config = _resolve(CONFIG)
    lines, first = _source(config)
    file = _from_megatron(str(inspect.getsourcefile(config)))
    places = {found[1]: place for place, line in enumerate(lines, first) if (found := re.match(r" +(\w+) *:", line))}
    return {name: f"{file}:{places[name]}" for name in config.__dataclass_fields__ if "moe" in name and name in places}


def _patch() -> tuple[int, dict[str, str]]:
    """Make all changes of Megatron, those for the CPU included; how many, and which cannot be made and why."""
    from megatron.remoe.patches import PATCHES

    from ..common.on_cpu import megatron_on_cpu

    failed = {}
    megatron_on_cpu()
    for patch in PATCHES:
        try:
            patch.apply()
        except Exception as error:  # whatever another version raises
            failed[patch.changes] = _in_one_line(error)
    return len(PATCHES), failed


def _all_there() -> dict[str, Any]:
    """What Megatron's modules, and the classes in them, have under each path."""
    there = {}
    for name, module in list(sys.modules.items()):
        if name.startswith(("megatron.core.", "megatron.training.")):
            for word, value in vars(module).items():
                there[f"{name}.{word}"] = value
                if inspect.isclass(value) and value.__module__ == name:
                    there |= {f"{name}.{word}.{inner}": found for inner, found in vars(value).items()}
    return there


def _own_part(value: Any) -> Any:
    """What of it is this project's: a function, decorated or around another, or an object; None where nothing is."""
    if type(value).__module__.startswith("megatron.remoe.") and not isinstance(value, ModuleType):
        return value
    value = getattr(value, "__func__", value)
    while inspect.isfunction(value):
        for function in (value, *(cell.cell_contents for cell in value.__closure__ or ())):
            if inspect.isfunction(function) and function.__code__.co_filename.startswith(OWN):
                return function
        value = getattr(value, "__wrapped__", None)
    return None


def main() -> None:
    """Write it."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # Megatron decorates functions when it is imported, which loads a compiler
    Path(sys.argv[1]).write_bytes(pickle.dumps(survey(json.load(sys.stdin))))


if __name__ == "__main__":
    main()
