"""The canary, on the installed Megatron's own files and on a copy in which two signatures are changed."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tools.canary import checks, command, report
from tools.canary.candidate import candidate, installed
from tools.canary.checks import Result
from tools.canary.comparison import Change, Comparison
from tools.canary.signatures import shown_change, signature, wrong_with_call, wrong_with_replacement
from tools.common.errors import ToolError

INSTALLED = Path(sysconfig.get_paths()["purelib"])
QUICK = ["imports", "settings", "signatures", "patches"]
# File of Megatron: a line of it, what that is replaced with, and what is to be said of this project.
DOCTORED = {
    "megatron/core/transformer/moe/token_dispatcher.py": (
        "self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor\n    ):\n"
        '        """Prepares hidden states and probabilities for dispatch.',
        "self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor, capacity\n    ):\n"
        '        """',
        "does not take capacity",
    ),
    "megatron/core/transformer/moe/moe_utils.py": (
        "probs: torch.Tensor,\n    tokens_per_expert: torch.Tensor,\n    total_num_tokens: int",
        "scores: torch.Tensor,\n    tokens_per_expert: torch.Tensor,\n    total_num_tokens: int",
        "missing a required argument: 'scores'",
    ),
}


def main(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["canary", *map(str, arguments)])
    return command.main()


@pytest.mark.slow
def test_changed_signatures_are_told_with_file_and_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(INSTALLED / "megatron", tmp_path / "megatron", ignore=shutil.ignore_patterns("__pycache__"))
    places = {}
    for file, (old, new, _) in DOCTORED.items():
        before, found, rest = (tmp_path / file).read_text().partition(old)
        assert found and old not in rest
        (tmp_path / file).write_text(before + new + rest)
        places[file] = before.count("\n")  # the line before, which names the function

    assert main(monkeypatch, INSTALLED, tmp_path, "--checks", *QUICK) == 1
    whole, changed = capsys.readouterr().out.split("+checkout")
    assert whole.count(" passes ") == len(QUICK) and "takes from Megatron: 0" in whole, whole
    assert changed.count(" passes ") == len(QUICK) - 1, changed
    for file, (_, _, reason) in DOCTORED.items():
        said = next((line for line in changed.splitlines() if reason in line), changed)
        assert f"{file}:{places[file]}" in said and "megatron/remoe/" in said, said


def test_no_check_passes_without_having_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip\ndef test_skipped(): pass\n"
    )
    comparison = Comparison([], installed(), installed())
    found = {word: checks.tests(str(file), "-k", word)(comparison) for word in ("good or skipped", "bad", "skipped")}
    assert found["good or skipped"] == Result([], "1 tests, 1 skipped")
    (problem,) = found["bad"].problems
    assert problem.endswith("test_some::test_bad: assert 1 == 2")  # after folders, by where pytest finds its root
    assert found["skipped"].state == "did not run"
    assert checks.tests(str(file), "-k", "nothing")(comparison).state == "fails", "pytest ran none"

    monkeypatch.setattr(command, "CHECKS", {"one": lambda _: found["good or skipped"], "other": lambda _: Result()})
    monkeypatch.setattr(Comparison, "changes", lambda _: [])
    assert main(monkeypatch, INSTALLED) == 1 and "did not run" in capsys.readouterr().out
    assert main(monkeypatch, INSTALLED, "--checks", "one") == 0

    capsys.readouterr()
    assert main(monkeypatch, INSTALLED, file, "--checks", "one") == 1
    told = capsys.readouterr()
    assert "is neither a Megatron-LM checkout" in told.err and told.out == "", "before what takes long"


def test_a_checkout_a_wheel_and_neither(tmp_path: Path) -> None:
    core = tmp_path / "checkout" / "megatron" / "core"
    (core / "datasets").mkdir(parents=True)
    (core / "package_info.py").write_text("MAJOR = 0\nMINOR = 20\nPATCH = 1\nPRE_RELEASE = 'rc0'\n")
    (core / "datasets" / "helpers.cpp").write_text("another source")
    git = ["git", "-C", str(tmp_path / "checkout"), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "m", "--date", "2026-01-02T00:00:00"]):
        subprocess.run(
            [*git, *words], check=True, env={"GIT_COMMITTER_DATE": "2026-01-02T00:00:00Z", "PATH": "/usr/bin"}
        )
    found = candidate(tmp_path / "checkout", tmp_path / "first")
    assert found.version.startswith("0.20.1rc0+") and found.date == "2026-01-02"
    assert not (tmp_path / "first" / ".git").exists() and not list((tmp_path / "first").rglob("*.so"))

    wheel = tmp_path / "megatron_core-0.20.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.write(core / "datasets" / "helpers.cpp", "megatron/core/datasets/helpers.cpp")
        file.writestr("megatron_core-0.20.2.dist-info/METADATA", "Name: megatron-core\nVersion: 0.20.2\n")
    assert candidate(wheel, tmp_path / "second").version == "0.20.2"

    other = tmp_path / "other-1.0-py3-none-any.whl"
    with zipfile.ZipFile(other, "w") as file:
        file.writestr("other-1.0.dist-info/METADATA", "Name: other\nVersion: 1.0\n")
    for place in (tmp_path, tmp_path / "nowhere", other):
        with pytest.raises(ToolError, match=f"{place} is neither a Megatron-LM checkout"):
            candidate(place, tmp_path / "third")


def test_what_goes_in_the_place_of_what() -> None:
    def theirs(self, logits, mask=None, *, name=None): ...
    def renamed(self, tensor, mask=None, **_rest): ...
    def shorter(self, logits, mask=None): ...
    def asks(self, logits, mask, more, *, name=None): ...
    def has_own(self, logits, mask=None, own=None, *, name=None): ...
    def grown(self, logits, mask=None, new=None, *, name=None): ...

    stock = signature(theirs)
    assert wrong_with_replacement(signature(renamed), stock) == ""
    assert wrong_with_replacement(signature(shorter), stock) == "does not take name"
    assert wrong_with_replacement(signature(asks), stock) == "asks for more, which is not given"
    assert wrong_with_replacement(signature(has_own), stock) == ""
    assert wrong_with_replacement(signature(has_own), signature(grown)) == "does not take new"
    assert wrong_with_call(stock, 3, ("name",)) == "" and "too many" in wrong_with_call(stock, 4, ())
    assert "unexpected keyword" in wrong_with_call(stock, 2, ("names",))
    change = shown_change(signature(shorter), stock)
    assert change == "(self, logits, mask=None) → (self, logits, mask=None, *, name=None)"


def test_the_page_has_versions_side_by_side() -> None:
    fine, broken = Result([], "3 names"), Result(["a.py:1: gone"])
    change = Change("megatron.core.one", "(a) → (a, b)", "megatron/core/one.py:2")
    first, second = (installed().__class__(None, version, "2026-01-02") for version in ("0.19.0", "0.20.0+abc"))
    page = report.markdown(installed(), [(first, {"imports": fine}, []), (second, {"imports": broken}, [change])])
    assert "| check | 0.19.0, 2026-01-02 | 0.20.0+abc, 2026-01-02 |" in page
    assert "| imports | passes: 3 names | **fails** |" in page and "- 0.20.0+abc, imports: a.py:1: gone" in page
    assert "| `core.one` | (a) → (a, b) | megatron/core/one.py:2 | 0.20.0+abc |" in page
