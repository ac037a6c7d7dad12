"""The acceptance on a GPU, rehearsed; and what it does when a part fails, lasts too long, or was done before."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainings import REPOSITORY
from tools.golden_run import GOLDEN
from tools.gpu_acceptance import command, launched, report
from tools.gpu_acceptance.parts import PARTS, Part, Work
from tools.gpu_acceptance.programs import NotRehearsed, PartError


def acceptance(out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script's exit code and what it printed."""
    script = ["bash", str(REPOSITORY / "scripts" / "gpu_acceptance.sh"), "--out", str(out), *arguments]
    plain = {name: value for name, value in os.environ.items() if name not in ("REHEARSE", "DRY_RUN")}
    return subprocess.run(script, env=plain | environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch is built for CPUs alone, and CUDA is what is played")
def test_rehearsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch command has the memory and the waits that tools/rehearse told; `launched.py` renews these."""
    parts = ["--parts", "environment", "golden", "launch"]
    printed = acceptance(tmp_path, *parts, REHEARSE="1")
    assert printed.returncode == 0, printed.stdout + printed.stderr
    assert all(line.startswith("rehearsal:") for line in printed.stdout.splitlines())
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["rehearsal"] and list(found["parts"]) == parts[1:]
    figures = {name: result["figures"] for name, result in found["parts"].items()}
    assert figures["environment"]["card"].endswith("(rehearsal)")
    assert list(figures["golden"]["found"]) == ["1", "5"]
    for stage, rehearsed in json.loads(launched.EXPECTED.read_text()).items():
        peak = figures["launch"][stage]["peak_allocated_gib"]
        assert peak == pytest.approx(rehearsed["peak_allocated_gib"], rel=0.05), stage
        waits = sum(wait["times"] for wait in rehearsed["host_syncs"])
        assert figures["launch"][stage]["waits"] == pytest.approx(waits, rel=0.1), stage

    again = acceptance(tmp_path, *parts, REHEARSE="1")
    assert again.returncode == 0 and "[1/" not in again.stdout, "all parts have their result"
    assert json.loads((tmp_path / "results.json").read_text()) == found

    page = tmp_path / "gpu.md"
    page.write_text((REPOSITORY / "docs" / "gpu.md").read_text())
    monkeypatch.setattr(report, "DOCS", page)
    assert command.main(["--out", str(tmp_path), "--write-docs"]) == 0
    assert (
        f"| dense: GiB allocated at most | {figures['launch']['dense']['peak_allocated_gib']:.2f} |" in page.read_text()
    )
    (tmp_path / "results.json").write_text(json.dumps(found | {"rehearsal": False}))
    assert command.main(["--out", str(tmp_path), "--write-docs"]) == 0
    measured = page.read_text().split("## Measured")[1].split("## Rehearsed")[0]
    last, expected = list(json.loads(GOLDEN.read_text()).items())[-1]
    assert "| dense: tokens/s | " in measured and f"| {last} | nan | {expected['lm loss']:g} | " in measured


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    printed = acceptance(tmp_path)
    assert printed.returncode == 2 and "finds no GPU here. REHEARSE=1" in printed.stderr
    assert not list(tmp_path.iterdir())


def test_limits_are_a_quarter_of_an_hour() -> None:
    assert sum(part.limit for part in PARTS.values()) == 900 and PARTS.keys() == report.SAYS.keys()


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Part]:
    """Parts in the place of the real ones; "slow" would sleep for a minute, in a process of its own."""
    sleeper, marker = tmp_path / "sleeper.py", tmp_path / "awake"
    sleeper.write_text(f"import time, pathlib; print('asleep'); time.sleep(60); pathlib.Path({str(marker)!r}).touch()")

    def fail(_work: Work) -> dict[str, Any]:
        raise PartError("no kernel image")

    def not_here(_work: Work) -> dict[str, Any]:
        raise NotRehearsed("there are no numbers")

    def sleep(work: Work) -> dict[str, Any]:
        return {"printed": work.python(sleeper, on_gpu=False)}

    def count(work: Work) -> dict[str, Any]:
        return {"before": list(work.before), "failures": []}

    found: dict[str, Callable[[Work], dict[str, Any]]] = {"bad": fail, "absent": not_here, "slow": sleep, "good": count}
    made = {name: Part(name, 1, run) for name, run in found.items()}
    for module in (command, report):
        monkeypatch.setattr(module, "PARTS", made)
    monkeypatch.setattr(command, "machine", lambda _: {"card": "one"})  # sources that nobody edits meanwhile
    monkeypatch.setattr(command, "SLOWER", 1)
    monkeypatch.setattr(report, "SAYS", {name: lambda figures, _: str(figures) for name in made})
    return made


def run(out: Path, *names: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the results of parts that are rehearsed."""
    options = command.parse_arguments(["--out", str(out), *(["--parts", *names] if names else [])])
    code = command.Acceptance(options, {}).run()
    return code, json.loads((out / "results.json").read_text())["parts"]


def test_what_fails_is_recorded_and_the_next_goes_on(
    parts: dict[str, Part], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, results = run(tmp_path / "out")
    assert code == 1
    states = {name: result["state"] for name, result in results.items()}
    assert states == {"bad": "error", "absent": "not rehearsed", "slow": "out of time", "good": "passed"}
    assert results["bad"]["error"] == "no kernel image"
    assert results["slow"]["error"] == "sleeper.py was ended at the part's limit" and results["slow"]["seconds"] < 30
    assert results["good"]["figures"]["before"] == ["bad", "absent", "slow"]
    assert not (tmp_path / "awake").exists() and "asleep" in (tmp_path / "out" / "log.txt").read_text()
    printed = capsys.readouterr().out
    assert "slow         OUT OF TIME" in printed and "[3/4] slow" in printed

    assert run(tmp_path / "out", "absent", "good")[0] == 0, "what passed before is not run again"
    assert "[1/" not in capsys.readouterr().out


def test_results_of_other_sources_are_kept_aside(
    parts: dict[str, Part], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, "good")
    first = (tmp_path / "results.json").read_text()
    monkeypatch.setattr(command, "machine", lambda _: {"card": "another"})
    assert run(tmp_path, "good")[0] == 0
    kept = [path for path in tmp_path.glob("results-*.json")]
    assert [path.read_text() for path in kept] == [first]


def test_a_program_that_fails_leaves_its_last_words(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text("raise SystemExit('CUDA error: no kernel image')")
    programs = command.Programs(tmp_path / "log.txt", None, lambda _: None)
    programs.deadline = float("inf")
    with pytest.raises(PartError, match=r"broken.py ended with code 1:\nCUDA error: no kernel image"):
        programs.python(str(script))


def test_a_table_has_the_line_that_tells_the_error() -> None:
    result = {"error": "x.py ended with code 1:\nTraceback\nx.py: error: RuntimeError: a | b\nTake another."}
    assert report.words("golden", result, False) == "x.py ended with code 1: x.py: error: RuntimeError: a / b"
    assert report.words("golden", {"error": "pytest is not installed"}, False) == "pytest is not installed"
