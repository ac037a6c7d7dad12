"""Test lists of runs: the paper's, names, flags, refusals, tuning, and folders of runs."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from tests.scripts.launching import command, value
from tests.tools.sweeping import TEXT, final, finish_run, line, sweep, write_run
from tests.training_runs import REPOSITORY
from tools.console.flags import group_by_flag
from tools.experiments import compare, results, run_folders
from tools.experiments.arms import ARMS, SETTINGS
from tools.experiments.run import Run, check_flags, run_from_fields
from tools.experiments.run_folders import Grid, make_run_folder
from tools.recipes.layout import RecipeError
from tools.text.corpora import dataset


def paper_runs(*words: str, **environment: str) -> dict[str, list[str]]:
    """Return run name → the words of its printed command."""
    lines, _ = sweep("--output-dir", "/nowhere/runs", *words, **environment)
    commands = [shlex.split(line) for line in lines.splitlines()]
    assert all(words[0] == "env" and words[1].startswith("OUTPUT_DIR=/nowhere/runs/") for words in commands)
    return {Path(words[1]).name: words[2:] for words in commands}


def test_the_papers_figures() -> None:
    """The default list has the paper's 32 runs, as calls of the launch scripts with the paper's defaults."""
    expected = [f"182m_dense.sh 8 60000  {expansion}" for expansion in (1, 8)]
    expected += [f"{size}_dense.sh 8 60000  1" for size in ("469m", "978m")]
    for routing in ("moe", "remoe"):
        expected += [f"{size}_{routing}.sh 8 60000  8 1" for size in ("182m", "469m", "978m")]
        expected += [f"182m_{routing}.sh 8 60000  {experts} 1" for experts in (4, 16, 32, 64, 128)]
        expected += [f"182m_{routing}.sh 8 60000  8 {granularity}" for granularity in (2, 4, 8, 16, 32, 64)]
    expected = [f"bash {REPOSITORY}/scripts/train_llama_{words} -- --seed 1234" for words in expected]
    assert sorted(" ".join(words) for words in paper_runs().values()) == sorted(expected)


def test_printed_commands_are_calls_of_launch_scripts() -> None:
    """EP is lowered to divide the experts, dense models get no --moe flags, and each script accepts its command."""
    options = "--figures lr --lrs 2 --routings dense moe --micro-batch-size 4 -- --moe-z-loss-coeff 1 --clip-grad 0.5"
    dense, moe = paper_runs(*options.split(), EP="12").values()
    rate = "-- --lr 0.001 --min-lr 0.0001 --seed 1234"
    assert " ".join(dense[2:]) == f"8 60000 4 1 {rate} --clip-grad 0.5"
    assert moe[0] == "EP=4" and " ".join(moe[3:]) == f"8 60000 4 8 1 {rate} --moe-z-loss-coeff 1 --clip-grad 0.5"
    for script, words in (("182m_dense", dense[2:]), ("182m_moe", moe[3:])):
        assert value(command(script, *words), "--lr") == "0.001"


def test_finished_runs_of_launch_scripts_are_collected(tmp_path: Path) -> None:
    options = ["--figures", "size", "--sizes", "469m", "--output-dir", str(tmp_path)]
    dense, moe, remoe = (tmp_path / name for name in paper_runs(*options[:4]))
    sweep(*options, "--collect", code=1)
    write_run(dense, 60000, line(60000), final(60000, 3.0))
    write_run(moe, 60000, line(60000), final(60000, 2.5))
    write_run(remoe, 60000, line(50))
    output, _ = sweep(*options, "--collect")
    assert f"| 469m_moe_e8g1k1_gpu_steps60000 | {2.5:.4f} |" in output
    assert f"{remoe.name}: not finished, at iteration 50 of 60000" in output
    assert [f"OUTPUT_DIR={folder} " in sweep(*options)[0] for folder in (dense, moe, remoe)] == [False, False, True]


@pytest.mark.parametrize(("words", "names"), [
    ("--figures size --sizes 469m", "469m_dense_ffn1 469m_moe_e8g1k1 469m_remoe_e8g1k1"),
    ("--figures experts --routings dense", "182m_dense_ffn1 182m_dense_ffn8"),
    ("--figures experts granularity --routings remoe --experts 4 8 --granularities 1 2",
     "182m_remoe_e4g1k1 182m_remoe_e8g1k1 182m_remoe_e8g2k1"),
    ("--figures l1-init --l1-inits 1e-16 1e-8", "182m_remoe_e8g1k1_l1-init1e-16 182m_remoe_e8g1k1"),
    ("--figures aux-coeff --routings moe-sigmoid remoe --granularities 2 --aux-coeffs 1e-3",
     "182m_moe-sigmoid_e8g2k1_aux-coeff0.001"),
    ("--figures lr --lrs 2 --routings dense moe", "182m_dense_ffn1_lr2 182m_moe_e8g1k1_lr2"),
    ("--figures size --sizes 182m --routings moe --seeds 1 2", "182m_moe_e8g1k1 182m_moe_e8g1k1"),
])  # fmt: skip
def test_narrowed_lists(words: str, names: str) -> None:
    listed = [re.sub(r"_gpu_steps\d+_seed\d+", "", name) for name in paper_runs(*words.split())]
    assert listed == names.split()


@pytest.mark.parametrize(("words", "facts"), [
    ("--experts 1", "--experts: '1'"),
    ("--train-iters many", "'many'"),
    ("--l1-inits 0", "--l1-inits: '0'"),
    ("--tokens subwords", "--tokens --tiny"),
    ("-- --num-experts 4", "--num-experts"),
    ("--figures gate -- --moe-router-topk-scaling-factor 2", "--moe-router-topk-scaling-factor _gate2"),
    ("--figures lr --lrs 2 -- --lr 1e-3", "--lr _lr2"),
    ("--figures gate --routings remoe", "--figures gate --routings remoe"),
])  # fmt: skip
def test_bad_values_are_named(words: str, facts: str, tmp_path: Path) -> None:
    _, errors = sweep("--output-dir", str(tmp_path), *words.split(), code=2)
    assert all(fact in errors for fact in facts.split()), errors


@pytest.mark.parametrize("words", ["--train-iters 403", "--train-iters 120", "--tuning-iters 15"])
def test_bad_lengths_of_a_comparison(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare.parse_arguments(words.split())
    assert words in capsys.readouterr().err


def test_flags_that_runs_set_themselves_are_refused() -> None:
    for flag in "--lr-warmup-iters --split --seed --train-samples --vocab-file".split():
        with pytest.raises(RecipeError, match=flag):
            check_flags([flag, "1"], [Run("moe", steps=400, is_wsd=True)])
    check_flags(["--lr-warmup-iters", "1"], [Run("moe")])


def test_runs_have_their_own_names_and_are_read_back() -> None:
    base = Run("remoe")
    changed = {
        "arm": "moe", "seed": 1, "steps": 400, "size": "469m", "experts": 32, "granularity": 2, "topk": 2,
        "rate": 0.5, "warmup": 12, "is_wsd": True, "is_tuning": True, "is_tiny": False, "tokens": dataset.SUBWORDS,
    }  # fmt: skip
    runs = [base, base.vary("l1-init", 1e-4), *(replace(base, **{name: value}) for name, value in changed.items())]
    runs += [Run("dense"), Run("dense", expansion=8)]
    assert len({run.name for run in runs}) == len(runs)
    assert base.vary("l1-init", 1e-8) == base and Run("dense", experts=32) == Run("dense")
    for run in runs:
        assert run_from_fields(json.loads(json.dumps(vars(run))) | {"later": 1}) == run


def test_flags_of_tiny_runs() -> None:
    def flags(arm: str, *given: str, **fields: Any) -> dict[str, tuple[str, ...]]:
        return group_by_flag(Run(arm, **fields).tiny_flags(TEXT, given))

    plain = flags("dense", "--moe-z-loss-coeff", "1")
    assert not any(flag.startswith("--moe") for flag in plain) and plain["--seed"] == ("1234",)
    assert plain["--train-data-path"][::2] == ("30", "10") and "--full-validation" in plain
    assert flags("dense", expansion=8)["--ffn-hidden-size"] == ("1024",)
    assert flags("moe", size="469m")["--hidden-size"] == ("80",)
    bounds = {"topk": 2, "experts": 16}, {"granularity": 4}, {"experts": 2}
    assert [flags("remoe-capped", **fields)["--moe-relu-max-experts"][0] for fields in bounds] == ["8", "4", "2"]
    tuning = flags("moe", steps=400, rate=2, warmup=40, is_wsd=True, is_tuning=True)
    assert (tuning["--lr"], tuning["--min-lr"], tuning["--lr-warmup-iters"]) == (("0.008",), ("0.0008",), ("40",))
    assert tuning["--lr-decay-style"] == ("WSD",) and tuning["--lr-wsd-decay-iters"] == ("80",)
    assert "--valid-data-path" not in tuning and tuning["--split"] == ("95,5,0",)
    assert (tuning["--save-retain-interval"], tuning["--save-interval"]) == (("320",), ("160",))
    assert flags("moe", steps=6230, is_wsd=True)["--save-interval"] == ("997",), "4985 is 5 * 997"


def test_every_arm_and_setting_is_documented() -> None:
    text = (REPOSITORY / "docs" / "baselines.md").read_text()
    assert set(re.findall(r"^\| `([a-z0-9-]+)` \|", text, re.MULTILINE)) == {*ARMS, *SETTINGS}
    for name, setting in SETTINGS.items():
        [row] = re.findall(rf"^\| `{name}` \|.*\| (.*) \| `--{name}s` \|$", text, re.MULTILINE)
        [base] = re.findall(r"\*\*(.*)\*\*", row)
        assert [float(value.strip("*")) for value in row.split()] == [*setting.values] and float(base) == setting.base


def test_a_run_is_done_when_its_folder_has_its_settings_and_loss(tmp_path: Path) -> None:
    grid, run = Grid(tmp_path, TEXT), Run("moe", steps=20)
    assert make_run_folder(run, grid).read_loss() is None
    assert finish_run(grid, run).read_loss() == 2.0
    moved = replace(TEXT, folder=Path("elsewhere"))
    assert make_run_folder(run, replace(grid, text=moved)).read_loss() == 2.0, "the same text in a different place"
    changed = {"text": replace(TEXT, inputs="later")}, {"flags": ("--lr", "1e-3")}, {"flags": ("--bf16",)}
    for change in changed:
        other = make_run_folder(run, replace(grid, **change))
        assert other.read_loss() is None
        with pytest.raises(RecipeError, match="text was text and is now later|--lr was 4e-3 and is now 1e-3|--bf16"):
            run_folders.check_conflicts([other])


def test_a_longer_run_goes_on_from_the_decay_of_a_shorter_one(tmp_path: Path) -> None:
    text = replace(TEXT, folder=tmp_path, train_tokens={"code": 100_000, "docs": 100_000})
    grid, run = Grid(tmp_path, text), Run("moe", is_wsd=True)
    run_folders.write_text(tmp_path / "manifest.json", '{"inputs": "text"}')
    for steps in (20, 40, 60):
        folder = finish_run(grid, replace(run, steps=steps))
        start = folder.run.decay_start
        (folder.path / "checkpoints" / f"iter_{start:07}").mkdir()
    finish_run(grid, replace(run, steps=80, seed=1))
    with (tmp_path / replace(run, steps=40).name / "checkpoints" / "metrics.jsonl").open("a") as log:
        log.write("{damaged\n")
    longer = make_run_folder(replace(run, steps=45), grid)
    saves = longer.path / "checkpoints"
    (saves / "iter_0000030").mkdir(parents=True)  # left by an interrupted copy
    run_folders.prepare(longer, grid)
    assert (saves / "latest_checkpointed_iteration.txt").read_text() == "30" and (saves / "iter_0000030").exists()
    lines = [json.loads(line) for line in (saves / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["iteration"] == 30 and {line["kind"] for line in lines} == {"start", "log"}
    for steps in (15, 50):
        other = make_run_folder(replace(run, steps=steps), grid)
        run_folders.prepare(other, grid)
        assert not other.has_checkpoint(), "others have decayed by step 15; 50 steps read the text more than once"
    run_folders.write_text(tmp_path / "manifest.json", '{"inputs": "later"}')
    with pytest.raises(run_folders.ToolError):
        run_folders.prepare(other, grid)


def test_each_arm_has_its_own_rate_and_warmup(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = "--arms dense moe --experts 4 8 --train-iters 40 --seeds 1 2 --lr-factors 1 2 --warmups 4 8"
    words += " --tuning-iters 20"
    args = compare.parse_arguments([*words.split(), "--output-dir", str(tmp_path)])
    rows: list[results.Row] = []
    for run in compare.tuning_runs(args):  # made-up results: rate 2 is best for dense and top-k, 1 for ReMoE
        best = 1.0 if run.routing == "remoe" else 2.0
        rows.append((run, results.Result(20, loss=2.0 + abs(run.rate - best) + (run.warmup or 0) / 1000)))
    assert len(rows) == 4 * (2 * 2 + 1), "dense is tuned once for all numbers of experts"
    tuned = compare.choose_rates(args, dict(rows))
    assert tuned == {(0, "dense"): (2.0, 4)} | {
        (experts, arm): (2.0 if arm == "moe" else 1.0, 4) for experts in (4, 8) for arm in ("moe", "remoe")
    }  # fmt: skip
    pairs = [pair for experts in args.experts for pair in compare.pair_runs(args, tuned, experts)]
    runs = [*dict.fromkeys(run for run, _ in pairs)]
    assert len(runs) == 2 * (2 * 2 + 1) and runs[0].arm == "remoe"
    assert compare.choose_rates(args, {}) == {} and [*compare.pair_runs(args, {}, 8)] == []
    for run in runs:
        loss = {"dense": 2.0, "moe": 1.6, "remoe": 1.5}[run.arm] + run.seed / 100
        flops = 1e9 if run.arm != "remoe" else 1.5e9
        rows.append((run, results.Result(40, loss=loss, flops=flops, step_flops=2.5e7)))
        if run.arm != "remoe":
            result = results.Result(60, loss=loss - 0.05, flops=1.5e9, step_flops=2.5e7)
            rows.append((replace(run, steps=60), result))
    files = [tmp_path / "tuning.json", tmp_path / "points.json"]
    for file, part in zip(files, (rows[:20], rows[20:]), strict=True):
        results.write_results(file, part)
    kept = [row for file in files for row in results.read_results(file)]
    assert [(run, one and one.loss) for run, one in kept] == [(run, one.loss) for run, one in rows if one]
    folder = tmp_path / "mixed"
    given = [*words.split(), "--output-dir", str(tmp_path)]
    assert compare.main([*given, "--results", *map(str, files)]) == 0
    printed = capsys.readouterr().out
    assert "- moe tuned, loss by factor on the learning rate and warm-up: 1 and 4: 3.0040," in printed
    row = r"\| 40 \| moe \| 1\.6150 ± .* \| \+0\.1000 ± \S+ \(2\) \| higher \| \+0\.0500 ± \S+ \(2\) \|"
    assert re.search(row, printed)
    assert imread(folder / "results.png").std() > 0.05 and not (folder / "results.json").exists()
    assert compare.main([*given, "--lr-factors", "1", "--results", *map(str, files)]) == 0
    assert "the runs of dense, moe have different flags" in capsys.readouterr().out
    (tmp_path / "old.json").write_text('{"a": 1}')
    for wrong in ("--collect --corpus broad", f"--results {files[1]} --size 4x256", f"--results {tmp_path}/old.json"):
        assert compare.main([*given, *wrong.split()]) == 1
