"""List changes in another Megatron that affect this project, by reading its sources without running them.

    python -m tests.megatron_changes FOLDER [--before RELEASE]

FOLDER holds another Megatron: pip install --no-deps --target FOLDER megatron-core==0.20.0 (or the path of a checkout
instead). Each change has a label:

    BREAKS  a name that we use is gone, a call of ours fails, or a method of ours does not accept what Megatron passes
    BEHIND  a name or parameter is gone, and RELEASE, an earlier one, lacks it too: FOLDER is older than a backport
    (none)  our calls still work, but positions or parameters changed; or a function that we override or replace has
            another body: check that its code still does what this project assumes

The exit code is 1 if something BREAKS.
"""

import argparse
import ast
import re
import sys
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import griffe

from tools.console.places import ROOT

PACKAGES = ("megatron.core", "megatron.training")
OURS = ("megatron/remoe", "tools", "benchmarks", "examples")
BREAKS, BEHIND, NOTE = "BREAKS", "BEHIND", ""


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
        found = modules[path] if owner in PACKAGES else modules[owner].all_members[name]
        return found.final_target if found.is_alias else found
    except (KeyError, AttributeError, griffe.AliasResolutionError, griffe.CyclicAliasError):
        return None


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


def refused_parameters(ours: ast.arguments, theirs: griffe.Function) -> list[str]:
    """Return the parameters of Megatron's method that ours does not accept, by position or by name."""
    positional = [*ours.posonlyargs, *ours.args]
    own = {one.arg for one in (*positional, *ours.kwonlyargs)}
    if ours.kwarg is not None:
        return []
    given = [one for one in theirs.parameters if not one.kind.value.startswith("variadic")]
    return [one.name for place, one in enumerate(given) if one.name not in own and place >= len(positional)]


def calls(tree: ast.Module, names: dict[str, str]) -> Iterator[tuple[str, ast.Call]]:
    """Yield the last name of each called function or class, and the call; for `super().__init__`, each base's name."""
    bases = {ast.unparse(base) for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for base in node.bases}
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = ast.unparse(node.func).rpartition(".")[2]
        for one in bases if name == "__init__" else (name,):
            yield names.get(one, one).rpartition(".")[2], node


def breaks_a_call(change: griffe.Breakage, was: griffe.Object | None, ours: list[ast.Call], words: set[str]) -> bool:
    """Return whether a changed signature breaks one of our calls, or a field that we use is gone."""
    kinds = griffe.BreakageKind
    if change.kind not in (kinds.PARAMETER_MOVED, kinds.PARAMETER_REMOVED) or not isinstance(was, griffe.Function):
        return True
    name = change.old_value.name
    place = [one.name for one in was.parameters if one.name != "self"].index(name)
    if any(len(call.args) > place for call in ours):  # *arguments are those that Megatron gave to our method
        return True
    is_named = name in words or any(keyword.arg == name for call in ours for keyword in call.keywords)
    return change.kind is kinds.PARAMETER_REMOVED and is_named


def find_changes(
    old: griffe.ModulesCollection, new: griffe.ModulesCollection, before: griffe.ModulesCollection | None = None
) -> Iterator[tuple[str, str]]:
    """Yield the label and the description of each change from `old` to `new`; `before` is an earlier release."""

    def gone(path: str, parameter: str = "") -> str:
        was = find(before, path) if before is not None else find(old, path)
        is_there = isinstance(was, griffe.Function) and parameter in [one.name for one in was.parameters]
        return BREAKS if was is not None and (is_there or not parameter) else BEHIND

    used: dict[str, str] = {}
    made = defaultdict[str, list[ast.Call]](list)  # last name of a function or class → our calls
    words = {"__init__"}  # all attributes and strings; a member that is not among them is not used
    for file in sources():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names, where = imported(tree), file.relative_to(ROOT)
        words |= {name.rpartition(".")[2] for name in names.values()}
        words |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        words |= {str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        used |= dict.fromkeys(names.values(), str(where))
        for name, call in calls(tree, names):
            made[name].append(call)
        for path, method in overrides(tree, names):
            then, now = find(old, path), find(new, path)
            if isinstance(then, griffe.Function) and not isinstance(now, griffe.Function):
                yield gone(path), f"{path} is gone; {where}:{method.lineno} overrides it"
            elif isinstance(then, griffe.Function) and isinstance(now, griffe.Function):
                if lacking := set(refused_parameters(method.args, now)) - set(refused_parameters(method.args, then)):
                    yield BREAKS, f"{where}:{method.lineno} does not accept {', '.join(sorted(lacking))} of {path}"
                if then.source != now.source:
                    yield NOTE, f"another body: {path}, which {where}:{method.lineno} overrides"
    canonical: dict[str, str] = {}
    for path, where in sorted(used.items()):
        then = find(old, path)
        if then is not None and find(new, path) is None:
            yield gone(path), f"{path} is gone; {where} uses it"
        if then is not None and not then.is_module:
            canonical[then.path] = where
    for package in PACKAGES:
        for change in griffe.find_breaking_changes(old[package], new[package]):
            owner = change.obj.path
            while owner and owner not in canonical:
                owner = owner.rpartition(".")[0]
            is_field = change.obj.parent is not None and "dataclass" in change.obj.parent.labels  # passed by name
            is_moved_field = is_field and change.kind is griffe.BreakageKind.PARAMETER_MOVED
            if owner and change.obj.name in words and not is_moved_field:
                said = re.sub(r"\x1b\[\d+m", "", change.explain(griffe.ExplanationStyle.ONE_LINE))
                path = change.obj.path
                ours = made[path.removesuffix(".__init__").rpartition(".")[2]]
                label = BREAKS if find(new, path) else gone(path)
                if change.kind is griffe.BreakageKind.PARAMETER_REMOVED:
                    label = gone(path, change.old_value.name)
                if label is BREAKS and not breaks_a_call(change, find(old, path), ours, words):
                    label = NOTE
                yield label, f"{path}: {said.partition(': ')[2]}; {canonical[owner]} uses it"


def main() -> int:
    """Print the changes; return 1 if one of them breaks something."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds megatron/core and megatron/training")
    parser.add_argument("--before", type=Path, metavar="RELEASE", help="an earlier release, installed the same way")
    options = parser.parse_args()
    if not (options.folder / "megatron" / "core").is_dir():
        parser.error(f"{options.folder}: there is no megatron/core. Install a Megatron there: pip install --target.")
    before = load(options.before.resolve()) if options.before else None
    installed, numbers = load(Path(sysconfig.get_paths()["purelib"])), Counter[str]()
    for label, text in find_changes(installed, load(options.folder.resolve()), before):
        print(f"{label:8}{text}")
        numbers[label] += 1
    print(f"{numbers[BREAKS]} changes break this project, {numbers[BEHIND]} are backports, {numbers[NOTE]} are notes")
    return int(numbers[BREAKS] > 0)


if __name__ == "__main__":
    sys.exit(main())
