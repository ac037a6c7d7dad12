"""List changes in another Megatron that affect this project, by reading its sources without running them.

    python -m tests.megatron_changes FOLDER

FOLDER holds another Megatron: pip install --no-deps --target FOLDER megatron-core==0.20.0 (or the path of a checkout
instead). The exit code is 1 if a name is gone, a signature breaks, or a method of ours does not accept what Megatron
may pass. "Another body" is a note: check that the new code still does what this project assumes.
"""

import argparse
import ast
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import griffe

from tools.console.places import ROOT

PACKAGES = ("megatron.core", "megatron.training")
OURS = ("megatron/remoe", "tools", "benchmarks")


def load(folder: Path) -> griffe.ModulesCollection:
    """Read Megatron's sources in a folder."""
    loader = griffe.GriffeLoader(search_paths=[folder], allow_inspection=False)
    for package in PACKAGES:
        loader.load(package, try_relative_path=False)
    loader.resolve_aliases(implicit=True, external=False)
    return loader.modules_collection


def find(modules: griffe.ModulesCollection, path: str) -> griffe.Object | None:
    """Return the object at a dotted path, through imports and base classes; None if there is none."""
    try:
        owner, _, name = path.rpartition(".")
        found = modules[path] if owner in PACKAGES else find_member(modules, owner, name)
        return found.final_target if found.is_alias else found
    except (KeyError, AttributeError, griffe.AliasResolutionError, griffe.CyclicAliasError):
        return None


def find_member(modules: griffe.ModulesCollection, owner: str, name: str) -> griffe.Object | griffe.Alias:
    """Return a member of a class, including inherited ones."""
    return modules[owner].all_members[name]


def sources() -> list[Path]:
    """Return this project's files that may use Megatron, except its tests."""
    return sorted([*ROOT.glob("*.py"), *(path for name in OURS for path in (ROOT / name).rglob("*.py"))])


def imported(tree: ast.Module) -> dict[str, str]:
    """Return name in the file → dotted path in Megatron."""
    return {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(tuple(f"{name}." for name in PACKAGES))
        for alias in node.names
    }


def overrides(tree: ast.Module, names: dict[str, str]) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield the dotted path in Megatron and our method, for each method of a class derived from Megatron's."""
    for node in ast.walk(tree):
        for base in node.bases if isinstance(node, ast.ClassDef) else ():
            if isinstance(base, ast.Name) and base.id in names:
                methods = [inner for inner in node.body if isinstance(inner, ast.FunctionDef)]
                yield from ((f"{names[base.id]}.{method.name}", method) for method in methods)


def not_taken(ours: ast.arguments, theirs: griffe.Function) -> list[str]:
    """Return the parameters of Megatron's method that ours does not accept, by position or by name."""
    positional = [*ours.posonlyargs, *ours.args]
    own = {one.arg for one in (*positional, *ours.kwonlyargs)}
    if ours.kwarg is not None:
        return []
    given = [one for one in theirs.parameters if not one.kind.value.startswith("variadic")]
    return [one.name for place, one in enumerate(given) if one.name not in own and place >= len(positional)]


def look_at(old: griffe.ModulesCollection, new: griffe.ModulesCollection) -> Iterator[tuple[bool, str]]:
    """Yield for each change whether it breaks something, and its description."""
    used: dict[str, str] = {}
    words = {"__init__"}  # all attributes and strings; a member that is not among them is not used
    for file in sources():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names, where = imported(tree), file.relative_to(ROOT)
        words |= {name.rpartition(".")[2] for name in names.values()}
        words |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        words |= {str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        used |= dict.fromkeys(names.values(), str(where))
        for path, method in overrides(tree, names):
            then, now = find(old, path), find(new, path)
            if isinstance(then, griffe.Function) and not isinstance(now, griffe.Function):
                yield True, f"{path} is gone; {where}:{method.lineno} overrides it"
            elif isinstance(then, griffe.Function) and isinstance(now, griffe.Function):
                if lacking := set(not_taken(method.args, now)) - set(not_taken(method.args, then)):
                    yield True, f"{where}:{method.lineno} does not take {', '.join(sorted(lacking))} of {path}"
                if then.source != now.source:
                    yield False, f"another body: {path}, which {where}:{method.lineno} overrides"
    canonical: dict[str, str] = {}
    for path, where in sorted(used.items()):
        then = find(old, path)
        if then is not None and find(new, path) is None:
            yield True, f"{path} is gone; {where} uses it"
        if then is not None and not then.is_module:
            canonical[then.path] = where
    for package in PACKAGES:
        for change in griffe.find_breaking_changes(old[package], new[package]):
            owner = change.obj.path
            while owner and owner not in canonical:
                owner = owner.rpartition(".")[0]
            is_field = change.obj.parent is not None and "dataclass" in change.obj.parent.labels  # passed by name
            if is_field and change.kind is griffe.BreakageKind.PARAMETER_MOVED:
                continue
            if owner and change.obj.name in words:
                said = re.sub(r"\x1b\[\d+m", "", change.explain(griffe.ExplanationStyle.ONE_LINE))
                yield True, f"{change.obj.path}: {said.partition(': ')[2]}; {canonical[owner]} uses it"


def main() -> int:
    """Print the changes; return 1 if one of them breaks something."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds megatron/core and megatron/training")
    options = parser.parse_args()
    if not (options.folder / "megatron" / "core").is_dir():
        parser.error(f"{options.folder}: there is no megatron/core. Install a Megatron there: pip install --target.")
    breaks, number = False, 0
    for is_breaking, text in look_at(load(Path(sysconfig.get_paths()["purelib"])), load(options.folder.resolve())):
        print(("BREAKS  " if is_breaking else "        ") + text)
        breaks, number = breaks or is_breaking, number + 1
    print(f"{number} changes in what this project takes from Megatron")
    return int(breaks)


if __name__ == "__main__":
    sys.exit(main())
