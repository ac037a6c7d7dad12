"""What is looked at, each in processes of its own in which the candidate is the Megatron that is found."""

import math
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from inspect import Signature
from pathlib import Path
from xml.etree import ElementTree

from ..common.data_sets import write_documents
from ..common.errors import ToolError
from ..common.log_reader import series
from ..common.places import ROOT
from ..common.tiny_model import RELU, TRAINING
from .candidate import Candidate
from .comparison import Comparison, Ended, last_words, run
from .signatures import wrong_with_call, wrong_with_replacement

STEPS = 4
FLAGS = [
    *TRAINING,
    *RELU,
    *f"--micro-batch-size 4 --lr 4e-3 --train-iters {STEPS} --split 100,0,0 --log-interval 1 --cpu".split(),
]
PYTEST = [*"-m pytest -q -p no:cacheprovider -o addopts=".split(), "--tb=line"]


@dataclass(frozen=True)
class Result:
    """Of one check.

    Attributes:
        problems: why it fails, one line each.
        said: what was looked at; empty where nothing was, which is no pass.
    """

    problems: list[str] = field(default_factory=list)
    said: str = ""

    @property
    def state(self) -> str:
        """passes, fails, or did not run."""
        return "fails" if self.problems else "passes" if self.said else "did not run"


def imports(comparison: Comparison) -> Result:
    """Whether all that is named is there, and comes from the candidate."""
    folder = comparison.other.folder
    problems = [
        f"megatron.{name} comes from {file}, not from the candidate"
        for name, file in comparison.now.modules.items()
        if folder is not None and not Path(file).is_relative_to(folder)
    ]
    return _all_there(comparison, {use.path for use in comparison.uses if use.path[0] != "-"}, "names", problems)


def settings(comparison: Comparison) -> Result:
    """Whether all flags that are read have the names that they are read by."""
    return _all_there(comparison, {use.path for use in comparison.uses if use.path[0] == "-"}, "flags", [])


def _all_there(comparison: Comparison, paths: set[str], what: str, problems: list[str]) -> Result:
    known = [path for path in sorted(paths) if comparison.is_known(path)]
    for path in known:
        if reason := comparison.now.facts[path].error:
            users = ", ".join(sorted({use.where for use in comparison.uses if use.path == path}))
            problems.append(f"{path} ({comparison.then.facts[path].place}): {reason}; used in {users}")
    return Result(problems, f"{len(known)} {what}" if known else "")


def signatures(comparison: Comparison) -> Result:
    """Whether Megatron takes our calls, and our methods and replacements what Megatron may give them."""
    problems, looked_at = [], 0
    own: list[tuple[str, Signature | None, str]] = [
        *((use.path, use.override, use.where) for use in comparison.uses),
        *((path, taken, "what is put in its place") for path, taken in comparison.now.replaced.items()),
    ]
    for use in comparison.uses:
        if use.call is not None and (found := comparison.signatures(use.path)):
            looked_at += 1
            if reason := wrong_with_call(found[1], *use.call):
                problems.append(comparison.told(use.path, f"{use.where}: {reason}"))
    for path, ours, where in own:
        if ours is not None and (found := comparison.signatures(path)):
            looked_at += 1
            then, now = (wrong_with_replacement(ours, theirs) for theirs in found)
            if now and now != then:  # constructors that we call ourselves ask for more than Megatron's
                problems.append(comparison.told(path, f"{where}: {now}"))
    return Result(problems, f"{looked_at} calls and methods" if looked_at else "")


def patches(comparison: Comparison) -> Result:
    """Whether each change of Megatron can be made, and those for the CPU have something to change."""
    now = comparison.now
    problems = [f"{what}: {reason}" for what, reason in now.failed.items()]
    problems += [f"{path} is not there to be replaced" for path in comparison.then.replaced if path not in now.replaced]
    return Result(problems, f"{now.patches} patches, {len(now.replaced)} replacements" if now.replaced else "")


def tests(*selection: str) -> Callable[[Comparison], Result]:
    """A check by tests of this project.

    Args:
        selection: files, or tests of them, and options of pytest.
    """

    def check(comparison: Comparison) -> Result:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            ended = run(comparison.other, [*PYTEST, f"--junitxml={report}", *selection])
            suite = ElementTree.parse(report).find("testsuite") if report.exists() else None
        if suite is None:
            return Result([last_words(ended)])
        failed = Counter(
            f"{case.get('classname')}::{name.partition('[')[0]}: {said.get('message', '').partition('\n')[0]}"
            for case in suite.iter("testcase")
            if (name := case.get("name", ""))
            for said in [*case.findall("failure"), *case.findall("error")]
        )
        skipped = int(suite.get("skipped", 0))
        passed = int(suite.get("tests", 0)) - skipped - failed.total()
        if ended.returncode and not failed:
            failed[last_words(ended)] = 1
        problems = [said if times == 1 else f"{said} ({times} cases)" for said, times in failed.items()]
        return Result(problems, f"{passed} tests" + (f", {skipped} skipped" if skipped else "") if passed else "")

    return check


def training(*flags: str) -> Callable[[Comparison], Result]:
    """A check by a tiny ReMoE on the CPU, with each Megatron: other losses are told, those not finite are a failure.

    Args:
        flags: besides `FLAGS`.
    """

    def check(comparison: Comparison) -> Result:
        ended, version = _train(comparison.other, flags), comparison.base.version
        found = series(ended.stdout, "lm loss")
        if ended.returncode or len(found) != STEPS:
            return Result([last_words(ended)])
        if not all(map(math.isfinite, found)):
            return Result([f"losses: {found}"])
        base = _train(comparison.base, flags)
        expected = series(base.stdout, "lm loss")
        if len(expected) != STEPS:
            raise ToolError(f"the same with the installed Megatron: {last_words(base)}")
        apart = max(abs(one - other) for one, other in zip(found, expected, strict=True))
        beside = f"up to {apart:.1e} from those of {version}" if apart else f"those of {version}"
        return Result([], f"{STEPS} steps to {found[-1]:.4f}, losses {beside}")

    return check


@cache
def _train(who: Candidate, flags: tuple[str, ...]) -> Ended:
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "text"
        write_documents(prefix, (ROOT / "LICENSE").read_bytes().split(b"\n\n"))
        return run(who, [str(ROOT / "pretrain_gpt.py"), *FLAGS, *flags, "--data-path", str(prefix)])


SPECIFICATIONS = (
    "tests/local/test_transformer_engine.py",
    "tests/local/test_fused_layers.py::test_specification_keeps_what_it_does_not_know",
)
CHECKS: dict[str, Callable[[Comparison], Result]] = {
    "imports": imports,
    "settings": settings,
    "signatures": signatures,
    "patches": patches,
    "patches still needed": tests("tests/test_patches.py", "-k", "still"),
    "layer specifications": tests(*SPECIFICATIONS),
    "router and controller": tests("tests/routing"),
    "dispatch and experts": tests("tests/moe"),
    "training, GPTModel": training(),
    "training, HybridModel": training("--hybrid-layer-pattern", "*E*E", "--num-layers", "4"),
}
