"""Test remoe compare: a small real experiment, matched FLOPs, resuming, and tables and pictures of made-up points."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pytest
from matplotlib.image import imread

from tests.data_sets import write_small_corpus
from tests.entry import shared_entry
from tests.tiny_model import EXPERTS, MODEL
from tests.trainings import REPOSITORY, finish, records
from tools.console.display import Display
from tools.console.errors import ToolError
from tools.console.flags import parse, words_of
from tools.experiments.compare import command, picture, plan, trunks
from tools.experiments.compare.experiment import Experiment
from tools.experiments.compare.plan import TUNING_SEED, Training, rounded, trunk_steps
from tools.experiments.compare.results import Results, markdown
from tools.experiments.compare.trunks import Point
from tools.recipes.flops import arguments_of, flops_per_sequence
from tools.text.corpora.dataset import MIXED, make_text


class Trained:
    """A replacement for `Processes.start` that trains in a fork of a process with Megatron imported."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []

    @contextmanager
    def __call__(self, words: list[str], environment: dict[str, str], log: IO[str]) -> Iterator[SimpleNamespace]:
        assert words[0] == sys.executable and words[1].endswith("pretrain_gpt.py")
        self.commands.append(words)
        code, printed = shared_entry().run(words[2:], limit=240)
        log.write(printed)
        yield SimpleNamespace(returncode=code)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an output folder with a small corpus."""
    folder = tmp_path_factory.mktemp("compare")
    write_small_corpus(folder / MIXED / "corpus")
    return folder


@pytest.mark.slow
def test_a_small_experiment(output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--arms moe --experts 4 --steps 20 --seeds 1 --lr-factors 1 2 --tuning-steps 20 --processes 1".split()
    words += ["--lr-warmup-iters", "4", "--output-dir", str(output)]
    tool, pipe = str(REPOSITORY / "tools"), subprocess.PIPE
    process = subprocess.Popen([sys.executable, tool, "compare", *words], stdout=pipe, stderr=pipe, text=True)
    while process.poll() is None and not [*output.glob("mixed/trainings/*/trunk/train.log")]:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert "The same command goes on from here" in finish(process, code=130)[1]

    trained = Trained()
    monkeypatch.setattr(trunks.Processes, "start", trained)
    assert command.main(words) == 0
    printed, calls = capsys.readouterr().out, len(trained.commands)
    results = json.loads((output / "mixed" / "results.json").read_text())

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

    (output / "mixed" / "results.json").unlink()
    assert command.main(words) == 0 and len(trained.commands) == calls, "everything is read from the trainings"
    assert json.loads((output / "mixed" / "results.json").read_text()).keys() == results.keys()

    decay = next((output / "mixed" / "trainings").glob("e4-moe-seed1-*")) / "decay-20"
    lines = map(json.loads, (decay / "metrics.jsonl").read_text().splitlines())
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert rates[-1] < max(rates)

    # The file of points is enough for the tables and the picture.
    points = output / "points.json"
    capsys.readouterr()
    assert command.main([*words, "--collect", "--points", str(points)]) == 0
    tables = capsys.readouterr().out
    assert "| 20 | remoe | " in tables and len(points.read_text().splitlines()) == len(results) + 2
    assert command.main([*words, "--results", str(points), "--picture", str(output / "gap.png")]) == 0
    assert capsys.readouterr().out == tables and imread(output / "gap.png").std() > 0.05

    shutil.rmtree(output / "mixed" / "trainings")
    assert command.main(words) == 0 and len(trained.commands) == calls, "results outlive their trainings"


@pytest.mark.slow
@pytest.mark.parametrize("arm", plan.ARMS)
def test_each_arm_trains(arm: str, output: Path) -> None:
    text = make_text(output / MIXED, MIXED, print)
    tokens = json.loads((text / "manifest.json").read_text())["tokens"]["train"]
    words = words_of(plan.flags_of(Training(4, arm, 1, is_tuning=True), text, tokens, 400))
    few = "--exit-interval 2 --eval-iters 1 --seq-length 32 --max-position-embeddings 32 --log-interval 1".split()
    code, printed = shared_entry().run([*words, *few], limit=120)
    assert code == 0, printed[-3000:]
    assert ("--num-experts" in words) == (arm != "dense") and list(records(printed)) == [1, 2]


def test_a_trunk_does_not_go_back(tmp_path: Path) -> None:
    runner = trunks.Runner(tmp_path, tmp_path, {"tokens": {}}, (tmp_path / "lock").open("w"))
    trunk = tmp_path / Training(8, "moe", 1).name / "trunk"
    trunk.mkdir(parents=True)
    (trunk / "latest_checkpointed_iteration.txt").write_text("40")
    with pytest.raises(ToolError, match="--steps 25 starts at 20"):
        runner.run(Training(8, "moe", 1), [25], {}, lambda _: None, [])


@pytest.mark.parametrize("pairs", [None, 150, 100])
def test_a_varying_number_of_experts_is_counted(
    pairs: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decay has `pairs` per 100 tokens (None: unknown, counts as k = 1). FLOPs for 50 steps with k = 1 are left."""
    training, wanted = Training(8, "moe-expert-threshold", 1), []
    runner = trunks.Runner(tmp_path, tmp_path, {"tokens": {}}, (tmp_path / "lock").open("w"))
    args = arguments_of(parse([*MODEL, *EXPERTS, "--vocab-size", "256"]))
    lines = [{"kind": "start", "iteration": 0, "args": vars(args) | {"global_batch_size": 4}}]
    for steps in (80, 100):
        lines.append({"kind": "log", "iteration": steps, "lm_loss": 2.0})
        lines[-1] |= (
            {} if pairs is None else {"total_active_pairs": 300 + pairs * steps, "total_layer_tokens": 100 * steps}
        )
    decay = tmp_path / training.name / "decay-100"
    decay.mkdir(parents=True)
    (decay / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    monkeypatch.setattr(runner, "_train", lambda _, steps, equal_to: wanted.append((steps, equal_to)))
    left = 50 * 4 * flops_per_sequence(args)
    runner.run(training, [100], {100: 1e9 + left}, lambda _: None, [Point(100, None, 2.0, 1e9)])
    more = (pairs or 100) / 100
    steps = left / (4 * flops_per_sequence(args, more))
    assert wanted == [(rounded(100 + steps), 100)] and (steps < 49) == (more > 1)


def test_a_matched_point_may_have_a_wanted_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = trunks.Runner(tmp_path, tmp_path, {"tokens": {}}, (tmp_path / "lock").open("w"))
    wanted: list[tuple[int, int | None]] = []

    def train(_: Training, steps: int, equal_to: int | None) -> Point:
        wanted.append((steps, equal_to))
        return Point(steps, equal_to, 2.0, 1e9 * steps)

    monkeypatch.setattr(runner, "_train", train)
    monkeypatch.setattr(runner, "_matched", lambda training, point, flops: 2 * point.steps)
    runner.run(Training(8, "moe", 1), [400, 800], {400: 8e11, 800: 16e11}, lambda _: None, [])
    assert wanted == [(400, None), (800, None), (800, 400), (1600, 800)]


def test_nothing_goes_to_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "key")
    (tmp_path / "train_code_text_document.bin").write_bytes(b"")
    settings = plan.flags_of(Training(8, "remoe", 1), tmp_path, {"code": 1}, 400)
    assert "--lr" in settings and not any(flag.startswith("--wandb") for flag in settings)


def test_arms_wait_for_their_reference(tmp_path: Path) -> None:
    """An arm is not trained if its ReMoE failed: it could train past the steps that have ReMoE's FLOPs."""
    seen: dict[tuple[str, int], dict[int, float]] = {}

    class Runner:
        processes = trunks.Processes((tmp_path / "lock").open("w"))

        def run(self, training: Training, wanted: list[int], reference: dict[int, float], done, found) -> None:
            if (training.arm, training.seed) == ("remoe", 2):
                raise ToolError("no space left")
            seen[training.arm, training.seed] = reference
            done(Point(steps=wanted[0], equal_to=None, loss=1.0, flops=7e9 * training.seed, seconds=1.0))

    args = command.parse_arguments("--arms moe --experts 4 4 --steps 400 400 --seeds 1 2 1 --lr-factors 1 1".split())
    with pytest.raises(ToolError) as raised:
        Experiment(args, Results(tmp_path / "results.json"), Runner(), Display()).run()  # type: ignore[arg-type]
    assert seen == {("remoe", 1): {}, ("moe", 1): {400: 7e9}}
    failed = {line.split(":")[0] for line in str(raised.value).splitlines()[1:]}
    assert failed == {Training(4, arm, 2).name for arm in ("remoe", "moe")}


def test_points() -> None:
    assert trunk_steps(400) == 320 and trunk_steps(12000) == 9600 and rounded(463.4) == 465 and rounded(1) == 5
    names = {Training(8, arm, seed, factor).name for arm in plan.ARMS for seed in (1, 2) for factor in (0.5, 1.0)}
    assert len(names) == 4 * len(plan.ARMS)
    assert Training(8, "moe", 1, warmup=12).name not in names


def test_sizes_are_kept_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each size has its own layers, its own learning rate, and its own table."""
    (tmp_path / "train_code_text_document.bin").write_bytes(b"")
    sizes = {"182m": (2, 64), "978m": (4, 128)}
    results = Results(tmp_path / "results.json")
    for size, shape in sizes.items():
        for arm in ("dense", "remoe"):
            settings = plan.flags_of(Training(8, arm, 1, size=size), tmp_path, {"code": 1}, 400)
            assert tuple(int(settings[flag][0]) for flag in ("--num-layers", "--hidden-size")) == shape
            for factor in (0.5, 1.0):
                loss = 1.0 + factor if size == "978m" else 3.0 - factor
                tuning = Training(8, arm, TUNING_SEED, factor, is_tuning=True, size=size)
                results.add(tuning, Point(1200, None, loss, 1e9))
                results.add(Training(8, arm, 1, factor, size=size), Point(400, None, loss, 1e9))
        expected = 0.5 if size == "978m" else 1.0
        assert results.rates(1200, 300, size) == {(8, "dense"): expected, (8, "remoe"): expected}
    for size, shown in (("182m", "2.0000"), ("978m", "1.5000")):
        words = ["--results", str(tmp_path / "results.json"), "--size", size, "--arms", "dense"]
        assert command.main(words) == 0
        printed = capsys.readouterr().out
        tuned = "0.5: 2.5000, 1: 2.0000" if size == "182m" else "0.5: 1.5000, 1: 2.0000"
        assert f"- dense tuned, loss by factor on the learning rate: {tuned}\n" in printed
        assert f"| 400 | dense | {shown} " in printed and ("4 layers of 128" in printed) == (size == "978m")


def test_gaps_by_hand(tmp_path: Path) -> None:
    def points(seed: int, *losses: tuple[int, int | None, float]) -> list[Point]:
        return [Point(steps, equal_to, loss, 1e9 * steps, 0.1, None, (0, seed)) for steps, equal_to, loss in losses]

    found = {
        "remoe": {1: points(1, (10, None, 1.50)), 2: points(2, (10, None, 1.52)), 3: points(3, (10, None, 1.51))},
        "moe": {
            1: points(1, (10, None, 1.60), (15, 10, 1.51)),
            2: points(2, (10, None, 1.62), (15, 10, 1.51)),
            3: points(3, (10, None, 1.61), (15, 10, 1.52)),
            4: points(4, (10, None, 9.99), (15, 10, 9.99)),  # ReMoE has no such seed
        },
    }
    lines = [*markdown(found, margin=0.05)]
    assert len(lines) == 8 and lines[2].startswith("| 10 | remoe | 1.5100 | 1e+10 |  | 0.0, 2.0 |")
    cells = [cell.strip() for cell in lines[3].split("|")]
    assert cells[7].startswith("+0.1000 ± ") and cells[7].endswith(" (3)") and cells[8] == "higher"
    assert cells[9].startswith("+0.0033 ± ") and cells[10] == "equivalent within 0.05"
    assert "2 comparisons" in lines[-1] and "10 steps: gaps differ by 0.0" in lines[-3]
    cells = [cell.strip() for cell in [*markdown(found, margin=0.05, reference="moe")][2].split("|")]
    assert [cells[place].split()[0] for place in (7, 9, 10)] == ["-0.1000", "-0.0033", "equivalent"]
    for experts in ({8: found}, {8: found, 32: found, 128: found}):
        for reference in found:
            picture.draw(tmp_path / "gap.png", experts, 0.05, reference)
        assert imread(tmp_path / "gap.png").shape[1] == (860 if len(experts) == 1 else 1590)


def test_a_file_of_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = REPOSITORY / "docs" / "compare" / "size-mixed.json"
    for place in (other, tmp_path / "nothing.json"):
        assert command.main(["--results", str(place)]) == 1
        assert str(place) in capsys.readouterr().err
    with pytest.raises(ToolError, match=r"size-mixed\.json"):
        Results(other)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "403"], "--steps 403"),
        (["--steps", "370"], "--lr-warmup-iters 300"),
        (["--tuning-steps", "15"], "--tuning-steps 15"),
        (["--seeds", str(TUNING_SEED)], f"--seeds {TUNING_SEED}"),
    ],
)
def test_bad_values_are_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse_arguments(words)
    assert message in capsys.readouterr().err
