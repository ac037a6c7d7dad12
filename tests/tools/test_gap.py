"""The gap to ReMoE by length: a small experiment for real, matched FLOPs, resuming, and the table by hand."""

import json
import sys
from pathlib import Path
from typing import IO

import pytest

from tests.entry import shared_entry
from tools.common.errors import ToolError
from tools.compare.trainings import TUNING_SEED
from tools.gap import command, plan, trunks
from tools.gap.plan import Training, rounded, trunk_steps
from tools.gap.table import markdown
from tools.gap.trunks import Point
from tools.sweep.plan import KINDS


class Trained:
    """In the place of `start`: trains in a fork of a Megatron that is imported already."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []

    def __call__(self, words: list[str], environment: dict[str, str], lock: IO[str], folder: Path, log: IO[str]):
        assert words[0] == sys.executable and words[1].endswith("pretrain_gpt.py")
        self.commands.append(words)
        self.code, printed = shared_entry().run(words[2:], limit=240)
        log.write(printed)
        return self

    def wait(self) -> int:
        return self.code


@pytest.mark.slow
def test_a_small_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = Trained()
    monkeypatch.setattr(trunks, "start", trained)
    words = "--arms moe --experts 4 --steps 20 --seeds 1 --lr-factors 1 2 --tuning-steps 20 --processes 1".split()
    words += ["--output-dir", str(tmp_path)]
    assert command.main(words) == 0
    printed, calls = capsys.readouterr().out, len(trained.commands)
    results = json.loads((tmp_path / "mixed" / "results.json").read_text())

    tuning = [entry for entry in results.values() if entry["is_tuning"]]
    assert [entry["seed"] for entry in tuning] == [TUNING_SEED] * 4
    best = {
        arm: min((entry["points"][0]["loss"], entry["factor"]) for entry in tuning if entry["arm"] == arm)[1]
        for arm in ("remoe", "moe")
    }
    of = {entry["arm"]: entry for entry in results.values() if not entry["is_tuning"]}
    assert {arm: entry["factor"] for arm, entry in of.items()} == best
    remoe, moe = ({(p["steps"], p["equal_to"]): p for p in of[arm]["points"]} for arm in ("remoe", "moe"))
    assert [*remoe] == [(20, None)]
    plain, matched = [p for key, p in moe.items() if not key[1]], {key[1]: p for key, p in moe.items() if key[1]}
    step = plain[0]["flops"] / 20
    assert [p["flops"] for p in plain] == pytest.approx([20 * step])
    assert matched[20]["steps"] > 20
    assert matched[20]["flops"] == pytest.approx(remoe[20, None]["flops"], abs=step * 5 / 2 + 1)
    assert "| 20 | moe | " in printed and "E = 4, mixed:" in printed

    (tmp_path / "mixed" / "results.json").unlink()
    assert command.main(words) == 0 and len(trained.commands) == calls, "everything is read from the trainings"
    assert json.loads((tmp_path / "mixed" / "results.json").read_text()).keys() == results.keys()
    assert command.main([*words, "--collect"]) == 0 and "| 20 | remoe | " in capsys.readouterr().out

    decay = next((tmp_path / "mixed" / "trainings").glob("e4-moe-seed1-*")) / "decay-20"
    rates = [json.loads(line).get("learning_rate") for line in (decay / "metrics.jsonl").read_text().splitlines()]
    assert rates[-1] is None or rates[-1] < max(rate for rate in rates if rate)


def test_a_trunk_does_not_go_back(tmp_path: Path) -> None:
    runner = trunks.Runner(tmp_path, tmp_path, {"tokens": {}}, (tmp_path / "lock").open("w"))
    trunk = tmp_path / Training(8, "moe", 1).name / "trunk"
    trunk.mkdir(parents=True)
    (trunk / "latest_checkpointed_iteration.txt").write_text("40")
    with pytest.raises(ToolError, match="--steps 25 starts at 20"):
        runner.run(Training(8, "moe", 1), [25], {}, lambda _: None, [])


def test_points() -> None:
    assert trunk_steps(400) == 320 and trunk_steps(12000) == 9600 and rounded(463.4) == 465 and rounded(1) == 5
    assert all(arm.kind in KINDS for arm in plan.ARMS.values())
    names = {Training(8, arm, seed, factor).name for arm in plan.ARMS for seed in (1, 2) for factor in (0.5, 1.0)}
    assert len(names) == 4 * len(plan.ARMS)


def test_gaps_by_hand() -> None:
    def points(*losses: tuple[int, int | None, float]) -> list[Point]:
        return [Point(steps, equal_to, loss, 1e9 * steps, 0.1) for steps, equal_to, loss in losses]

    lines = [
        *markdown(
            {
                "remoe": {1: points((10, None, 1.50)), 2: points((10, None, 1.52)), 3: points((10, None, 1.51))},
                "moe": {
                    1: points((10, None, 1.60), (15, 10, 1.51)),
                    2: points((10, None, 1.62), (15, 10, 1.51)),
                    3: points((10, None, 1.61), (15, 10, 1.52)),
                },
            },
            margin=0.05,
        )
    ]
    assert len(lines) == 6 and lines[2].startswith("| 10 | remoe | 1.5100 | 1e+10 |")
    cells = [cell.strip() for cell in lines[3].split("|")]
    assert cells[6].startswith("+0.1000 ± ") and cells[7] == "higher"
    assert cells[8].startswith("+0.0033 ± ") and cells[9] == "equivalent within 0.05"
    assert "2 comparisons" in lines[-1] and "6 degrees of freedom" in lines[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "403"], "--steps 403"),
        (["--steps", "15"], "--steps 15"),
        (["--seeds", str(TUNING_SEED)], f"--seeds {TUNING_SEED}"),
        (["--arms", "best"], "invalid choice: 'best'"),
    ],
)
def test_bad_values_are_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse_arguments(words)
    assert message in capsys.readouterr().err
