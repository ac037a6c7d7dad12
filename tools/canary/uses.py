"""What this project takes from Megatron, read from its sources."""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from inspect import Signature
from pathlib import Path

from ..common.places import ROOT
from .signatures import signature_of

CONFIG = "megatron.core.transformer.transformer_config.TransformerConfig"
# Things that are known by their name alone, and what they are; a flag's path is its spelling.
KNOWN = {"config": f"{CONFIG}.", "args": "--"}


@dataclass(frozen=True)
class Use:
    """One use.

    Attributes:
        path: dotted, from `megatron` on; or a flag.
        where: file and line in this project.
        call: number of positional values and the keywords of a call whose arguments are all written out.
        override: signature of the method that takes the place of this one.
    """

    path: str
    where: str
    call: tuple[int, tuple[str, ...]] | None = None
    override: Signature | None = None


def sources() -> list[Path]:
    """Every file of this project that may touch Megatron, but for its tests."""
    folders = (ROOT / name for name in ("megatron/remoe", "tools", "benchmarks"))
    return sorted([*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))])


def uses(files: Iterable[Path]) -> list[Use]:
    """All uses; some of their paths lead nowhere, where a name is not what it looks like."""
    return [use for path in files for use in _Reader(path).uses()]


class _Reader:
    def __init__(self, path: Path) -> None:
        self._name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        self._tree = ast.parse(path.read_text(encoding="utf-8"))
        self._imported: dict[str, str] = {}

    def uses(self) -> Iterator[Use]:
        for node in ast.walk(self._tree):
            if isinstance(node, ast.ImportFrom) and _is_megatrons(node.module):
                for alias in node.names:
                    self._imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                    yield Use(f"{node.module}.{alias.name}", self._at(node))
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Attribute) and (path := self._path(node)):
                yield Use(path, self._at(node))
            elif isinstance(node, ast.Call):
                yield from self._call(node)
            elif isinstance(node, ast.ClassDef):
                yield from self._class(node)

    def _at(self, node: ast.stmt | ast.expr) -> str:
        return f"{self._name}:{node.lineno}"

    def _path(self, node: ast.expr) -> str | None:
        if isinstance(node, ast.Name):
            return self._imported.get(node.id)
        if not isinstance(node, ast.Attribute):
            return None
        owner = node.value
        known = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
        if known in KNOWN:
            return KNOWN[known] + node.attr
        return f"{path}.{node.attr}" if (path := self._path(owner)) else None

    def _call(self, node: ast.Call, path: str | None = None, bound: int = 0) -> Iterator[Use]:
        if path := path or self._path(node.func):
            keywords = tuple(keyword.arg for keyword in node.keywords if keyword.arg)
            if len(keywords) == len(node.keywords) and not any(isinstance(item, ast.Starred) for item in node.args):
                yield Use(path, self._at(node), call=(len(node.args) + bound, keywords))
        elif isinstance(node.func, ast.Name) and node.func.id == "Refusal" and isinstance(node.args[0], ast.Constant):
            # Refused settings are looked up by name, so that one which has another name now would be taken.
            for prefix in KNOWN.values():
                yield Use(prefix + str(node.args[0].value), self._at(node))

    def _class(self, node: ast.ClassDef) -> Iterator[Use]:
        methods = [inner for inner in node.body if isinstance(inner, ast.FunctionDef)]
        own = {method.name for method in methods}
        for base in filter(None, map(self._path, node.bases)):
            for method in methods:
                yield Use(f"{base}.{method.name}", self._at(method), override=signature_of(method.args))
            for inner in ast.walk(node):
                if isinstance(inner, ast.Attribute) and _is_theirs(inner, own):
                    yield Use(f"{base}.{inner.attr}", self._at(inner))
                elif (
                    isinstance(inner, ast.Call)
                    and isinstance(inner.func, ast.Attribute)
                    and _is_theirs(inner.func, own)
                ):
                    yield from self._call(inner, f"{base}.{inner.func.attr}", bound=1)


def _is_theirs(node: ast.Attribute, own: set[str]) -> bool:
    """Whether it is an attribute of `super()`, or one of `self` that is not this class's own method."""
    owner = node.value
    if isinstance(owner, ast.Call):
        return isinstance(owner.func, ast.Name) and owner.func.id == "super"
    return isinstance(owner, ast.Name) and owner.id == "self" and node.attr not in own


def _is_megatrons(module: str | None) -> bool:
    return f"{module}.".startswith(("megatron.core.", "megatron.training."))
