"""Test the plans of experiments: runs, names, flags, refusals, tuning, and jobs for Slurm."""

import json
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from tests.tools.sweeping import TEXT, final, finish_run, line, sweep, write_run
from tests.training_runs import REPOSITORY
from tools.console.flags import group_by_flag
from tools.experiments import compare, jobs, results
from tools.experiments.arms import ARMS, SETTINGS
from tools.experiments.run import Run, check_flags, run_from_fields
from tools.recipes.layout import RecipeError
from tools.text.corpora import dataset


def paper_runs(*words: str, **environment: str) -> dict[str, list[str]]:
    """Return run name → launch command, read from the output of a dry run."""
    output, _ = sweep("--dry-run", "--output-dir", "/nowhere/runs", *words, **environment)
    *lines, last = output.splitlines()
    assert last == f"# to train: {len(lines) // 2} runs"
    heads = [head.removeprefix("# ").removesuffix(": not started") for head in lines[::2]]
    return dict(zip(heads, map(shlex.split, lines[1::2]), strict=True))


def test_the_papers_figures() -> None:
    """The default list has the paper's 32 runs, as calls of the launch scripts with the paper's defaults."""
    commands = paper_runs()
    expected = [f"182m_dense.sh 8 60000  {expansion}" for expansion in (1, 8)]
    expected += [f"{size}_dense.sh 8 60000  1" for size in ("469m", "978m")]
    for routing in ("moe", "remoe"):
        expected += [f"{size}_{routing}.sh 8 60000  8 1" for size in ("182m", "469m", "978m")]
        expected += [f"182m_{routing}.sh 8 60000  {experts} 1" for experts in (4, 16, 32, 64, 128)]
        expected += [f"182m_{routing}.sh 8 60000  8 {granularity}" for granularity in (2, 4, 8, 16, 32, 64)]
    expected = [f"{REPOSITORY}/scripts/train_llama_{words} -- --seed 1234" for words in expected]
    assert sorted(" ".join(words[2:]) for words in commands.values()) == sorted(expected)
    assert all(words[:2] == [f"OUTPUT_DIR=/nowhere/runs/{name}", "bash"] for name, words in commands.items())


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
    planned = [re.sub(r"_gpu_steps\d+_seed\d+", "", name) for name in paper_runs(*words.split())]
    assert planned == names.split()


@pytest.mark.parametrize(("words", "facts"), [
    ("--experts 1", "--experts: '1'"),
    ("--train-iters many", "'many'"),
    ("--l1-inits 0", "--l1-inits: '0'"),
    ("--slurm --tiny", "--slurm --tiny"),
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


@pytest.mark.parametrize("flag", "--lr-warmup-iters --split --seed --train-samples --vocab-file".split())
def test_flags_that_runs_set_themselves_are_refused(flag: str) -> None:
    with pytest.raises(RecipeError, match=flag):
        check_flags([flag, "1"], [Run("moe", steps=400, is_wsd=True)])
    check_flags(["--lr-warmup-iters", "1"], [Run("moe")])
    check_flags(["--vocab-file", "1"], [Run("moe", is_tiny=False)])


def test_errors_of_the_scripts_stop_it_before_the_first_run(tmp_path: Path) -> None:
    _, errors = sweep("--output-dir", str(tmp_path), code=2, DATA_PATH="")
    assert errors.startswith("sweep: error: 182m_dense_ffn1_gpu") and "set DATA_PATH" in errors
    _, errors = sweep("--output-dir", str(tmp_path), code=2, TP="x")
    assert "TP is 'x'" in errors


# ---------------------------------------------------------------- runs


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
    grid, run = jobs.Grid(tmp_path, text=TEXT), Run("moe", steps=20)
    assert jobs.make_job(run, grid).loss is None
    assert finish_run(grid, run).loss == 2.0
    moved = replace(TEXT, folder=Path("elsewhere"))
    assert jobs.make_job(run, replace(grid, text=moved)).loss == 2.0, "the same text in a different place"
    changed = {"text": replace(TEXT, inputs="later")}, {"flags": ("--lr", "1e-3")}, {"flags": ("--bf16",)}
    for change in changed:
        other = jobs.make_job(run, replace(grid, **change))
        assert other.loss is None
        with pytest.raises(RecipeError, match="text was text and is now later|--lr was 4e-3 and is now 1e-3|--bf16"):
            jobs.check_conflicts([other])


def test_a_longer_run_goes_on_from_the_decay_of_a_shorter_one(tmp_path: Path) -> None:
    text = replace(TEXT, folder=tmp_path, train_tokens={"code": 100_000, "docs": 100_000})
    grid, run = jobs.Grid(tmp_path, text=text), Run("moe", is_wsd=True)
    jobs.write_text(tmp_path / "manifest.json", '{"inputs": "text"}')
    for steps in (20, 40, 60):
        job = finish_run(grid, replace(run, steps=steps))
        start = job.run.decay_start
        (job.folder / "checkpoints" / f"iter_{start:07}").mkdir()
    finish_run(grid, replace(run, steps=80, seed=1))
    with (tmp_path / replace(run, steps=40).name / "checkpoints" / "metrics.jsonl").open("a") as log:
        log.write("{damaged\n")
    longer = jobs.make_job(replace(run, steps=45), grid)
    saves = longer.folder / "checkpoints"
    (saves / "iter_0000030").mkdir(parents=True)  # left by an interrupted copy
    jobs.prepare(longer, grid)
    assert (saves / "latest_checkpointed_iteration.txt").read_text() == "30" and (saves / "iter_0000030").exists()
    lines = [json.loads(line) for line in (saves / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["iteration"] == 30 and {line["kind"] for line in lines} == {"start", "log"}
    for steps in (15, 50):
        other = jobs.make_job(replace(run, steps=steps), grid)
        jobs.prepare(other, grid)
        assert not other.has_checkpoint, "others have decayed by step 15; 50 steps read the text more than once"
    jobs.write_text(tmp_path / "manifest.json", '{"inputs": "later"}')
    with pytest.raises(jobs.ToolError):
        jobs.prepare(other, grid)


def test_each_arm_has_its_own_rate_and_warmup(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = (
        "--arms dense moe --experts 4 8 --train-iters 40 --seeds 1 2 1 --lr-factors 1 2 --warmups 4 8 --tuning-iters 20"
    )
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
    pairs = [pair for experts in args.experts for pair in compare.planned_runs(args, tuned, experts)]
    planned = [*dict.fromkeys(run for run, _ in pairs)]
    assert len(planned) == 2 * (2 * 2 + 1) and planned[0].arm == "remoe"
    assert compare.choose_rates(args, {}) == {} and [*compare.planned_runs(args, {}, 8)] == []
    for run in planned:
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


def test_a_layout_is_no_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_PATH", "pile")
    monkeypatch.setenv("MODEL", "hybrid")
    one = jobs.make_job(Run("remoe", size="182m", is_tiny=False), jobs.Grid(tmp_path)).stamp
    monkeypatch.setenv("PP", "2")
    assert jobs.make_job(Run("remoe", size="182m", is_tiny=False), jobs.Grid(tmp_path)).stamp == one


# ---------------------------------------------------------------- Slurm


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """Return a folder with stubs: sbatch records its arguments, squeue prints the file `queue` or fails without it."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    commands = {
        "sbatch": "n=$(cat count 2>/dev/null || echo 100)\necho $((n + 1)) | tee count\n"
        '{ echo "$OUTPUT_DIR ${EP-} ${REHEARSE-}"; printf "%s\\n" "$@"; } >job.$((n + 1))',
        "squeue": '[[ -f queue ]] || { echo "Unable to contact slurm controller" >&2; exit 1; }\ncat queue',
    }
    for name, text in commands.items():
        (folder / name).write_text(f"#!/bin/bash\ncd {folder}\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


def test_slurm_jobs_are_submitted_once(cluster: Path, tmp_path: Path) -> None:
    output_dir, path = tmp_path / "sweep", f"{cluster}{os.pathsep}{os.environ['PATH']}"
    options = f"--figures experts --experts 4 --routings moe remoe --output-dir {output_dir} --train-iters 50".split()
    options += ["--slurm=--nodes 2 --comment='a b'", "--", "--lr", "1e-3"]

    def submit(code: int = 0) -> tuple[str, str]:
        return sweep(*options, code=code, PATH=path, EP="8", TP="2", REHEARSE="1")

    (cluster / "queue").touch()
    output, _ = submit()
    moe, remoe = (output_dir / f"182m_{arm}_e4g1k1_gpu_steps50_seed1234" for arm in ("moe", "remoe"))
    assert f"{moe.name}: Slurm job 101\n" in output and f"{remoe.name}: Slurm job 102\n" in output
    scripts = REPOSITORY / "scripts"
    assert (cluster / "job.102").read_text().splitlines() == [
        f"{remoe} 4 0",
        *("--parsable", f"--job-name={remoe}", f"--output={remoe}/slurm-%j.out", "--gpus-per-node=8"),
        *("--nodes", "2", "--comment=a b", f"{scripts}/slurm/train.sbatch", f"{scripts}/train_llama_182m_remoe.sh"),
        *("8", "50", "", "4", "1", "--", "--seed", "1234", "--lr", "1e-3"),
    ]
    # One is still queued; the other is gone without a result.
    (cluster / "queue").write_text(f"    7 of another\n102 {remoe}\n")
    output, _ = submit()
    assert "queued or running as Slurm job 102" in output and f"{moe.name}: Slurm job 103\n" in output
    # One has finished and is still listed.
    write_run(remoe, 50, line(50), final(50, 4.0))
    (cluster / "queue").write_text(f"102 {remoe}\n103 {moe}\n")
    output, _ = submit()
    assert f"{remoe.name}: finished" in output and sorted(cluster.glob("job.*"))[-1].name == "job.103"
    (cluster / "queue").unlink()
    assert "squeue failed: Unable to contact slurm controller" in submit(code=1)[1]
