"""Test the sweep over the scaling figures: the runs that it plans, and the jobs that it submits to Slurm."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.data_sets import write_small_corpus
from tests.tools.sweeping import final, line, sweep, write_run
from tests.trainings import REPOSITORY
from tools.console.flags import parse, words_of
from tools.experiments.sweep import plan, tiny
from tools.experiments.sweep.arguments import parse_arguments
from tools.experiments.sweep.plan import Run
from tools.experiments.sweep.settings import planned_flags
from tools.recipes.layout import RecipeError
from tools.text.corpora.dataset import MIXED

# ---------------------------------------------------------------- planned runs


def test_the_full_list(tmp_path: Path) -> None:
    output, _ = sweep("--dry-run", "--output-dir", str(tmp_path / "all"))
    *lines, cost = output.splitlines()
    heads, commands = lines[::2], [shlex.split(line) for line in lines[1::2]]
    scripts = REPOSITORY / "scripts"
    expected = [f"{scripts}/train_llama_{size}_dense.sh 8 60000 " for size in ("182m", "469m", "978m")]
    expected.append(f"{scripts}/train_llama_182m_dense.sh 8 60000  8")
    for routing in ("moe", "remoe"):
        for size in ("182m", "469m", "978m"):
            expected.append(f"{scripts}/train_llama_{size}_{routing}.sh 8 60000  8 1")
        for experts in (4, 16, 32, 64, 128):
            expected.append(f"{scripts}/train_llama_182m_{routing}.sh 8 60000  {experts} 1")
        for granularity in (2, 4, 8, 16, 32, 64):
            expected.append(f"{scripts}/train_llama_182m_{routing}.sh 8 60000  8 {granularity}")
    assert sorted(" ".join(words[2:]) for words in commands) == sorted(expected)
    assert all(head.endswith(": not started") for head in heads)
    for head, words in zip(heads, commands, strict=True):
        name = head.removeprefix("# ").partition(":")[0]
        assert words[:2] == [f"OUTPUT_DIR={tmp_path}/all/{name}", "bash"]
    assert cost.startswith("# to train: 32 runs, ")
    assert not (tmp_path / "all").exists()


def test_narrowed_lists() -> None:
    def names(*figures: str, routings: tuple[str, ...] | None = None, **more: Any) -> list[str]:
        values: dict[str, list[Any]] = {"size": ["469m"], "experts": [4, 8], "granularity": [1, 2]}
        return [run.name for run in plan.plan(figures, values | more, routings)]

    assert names("size") == ["llama_469m_dense_ffn4", "llama_469m_moe_e8g1", "llama_469m_remoe_e8g1"]
    assert names("experts", "granularity", routings=("remoe",)) == [
        f"llama_182m_remoe_{shape}" for shape in ("e4g1", "e8g1", "e8g2")
    ]
    assert names("experts", "granularity").count("llama_182m_dense_ffn4") == 1
    assert names("experts", routings=("dense",)) == ["llama_182m_dense_ffn4", "llama_182m_dense_ffn32"]
    base = "llama_182m_remoe_e8g1"
    l1 = {"l1-init": [1e-16, 1e-8, 1.0], "l1-multiplier": [1.05, 1.2], "granularity": [1]}
    assert names("l1-init", "l1-multiplier", **l1) == [
        f"{base}_init1e-16", base, f"{base}_init1", f"{base}_multiplier1.05"
    ]  # fmt: skip
    assert names("aux-coeff", routings=("moe-post", "remoe", "moe"), **{"aux-coeff": [1e-2, 1e-3]}) == [
        "llama_182m_moe_e8g1", "llama_182m_moe_e8g1_coeff0.001", "llama_182m_moe_e8g2_post",
        "llama_182m_moe_e8g2_post_coeff0.001", "llama_182m_moe_e8g2", "llama_182m_moe_e8g2_coeff0.001",
    ]  # fmt: skip
    assert names("lr", granularity=[1], lr=[2]) == [
        f"llama_182m_{kind}_lr2" for kind in ("dense_ffn4", "moe_e8g1", "remoe_e8g1")
    ]
    assert names("warmup-length", granularity=[1], **{"warmup-length": [500]}) == [
        "llama_182m_moe_e8g1_warmup_length500"
    ]
    assert not names("gate", routings=("remoe",))
    assert names("variable-k", granularity=[2]) == [
        f"llama_182m_{kind}" for kind in (
            "moe_e8g2", "remoe_e8g2", "moe_e8g2_topp", "moe_e8g2_threshold", "moe_e8g2_null", "moe_e8g2_sequence",
            "moe_e8g2_routingfree", "moe_e8g2_quantile",
        )
    ]  # fmt: skip
    for run in plan.plan(["variable-k"], {}, None):  # the default granularity
        assert run.granularity == 2 and "variable-k" in plan.figures_of(run)
    for name in names(*plan.FIGURES, *plan.AXES, *plan.GROUPS):
        run = Run.from_name(name)
        assert run is not None and run.name == name
    for name in ("checkpoints", "llama_182m_dense_ffn6", f"{base}_other", f"{base}_lr2-1", f"{base}_hash"):
        assert (Run.from_name(name) is None) == (name != f"{base}_hash")


def test_flags_for_megatron_and_expert_parallelism(tmp_path: Path) -> None:
    arguments = "--figures experts --experts 4 16 --gpus-per-node 8 --train-iters 100 --micro-batch-size 4".split()
    flags = "-- --moe-z-loss-coeff 1e-3 --lr 1e-3".split()
    output, _ = sweep(*arguments, "--output-dir", str(tmp_path), *flags, DRY_RUN="1", EP="8")
    dense, wide, few, _, many, _ = output.splitlines()[1:-1:2]
    assert dense.endswith("train_llama_182m_dense.sh 8 100 4 -- --lr 1e-3")
    assert wide.endswith("train_llama_182m_dense.sh 8 100 4 8 -- --lr 1e-3")
    assert few.endswith("train_llama_182m_moe.sh 8 100 4 4 1 -- --moe-z-loss-coeff 1e-3 --lr 1e-3")
    assert " EP=4 " in few and " EP=" not in many + dense  # 8 does not divide 4 experts


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        ("--experts 1", "--experts: '1'"),
        ("--train-iters many", "--train-iters: 'many'"),
        ("--l1-inits 0", "--l1-inits: '0'"),
        ("--sizes 7b", "--sizes: '7b'"),
        ("--sbatch-flags=--nodes", "--sbatch-flags --slurm"),
        ("--slurm --sbatch-flags=-Mfar", "--sbatch-flags -Mfar"),
        ("-- --num-experts 4", "--num-experts --experts"),
        ("-- --save=x", "--save --output-dir"),
        ("--figures gate -- --moe-router-topk-scaling-factor 2", "--moe-router-topk-scaling-factor _gate2"),
        ("--figures gate --routings remoe", "--figures gate --routings remoe"),
        ("-- --eval-iters 0", "--eval-iters 0"),
        ("--dry-run --figures lr --lrs 0.5 -- --weight-decay 0 --lr abc", "--lr abc"),
        ("--figures experts -- --ffn-hidden-size", "--ffn-hidden-size"),
        ("-- --split 90,0,10", "--split 90,0,10"),
        ("--collect", "--output-dir"),
    ],
)
def test_bad_values_are_named(words: str, facts: str, tmp_path: Path) -> None:
    _, errors = sweep("--output-dir", str(tmp_path), *words.split(), code=2)
    assert all(fact in errors for fact in facts.split()), errors


def test_flags_of_other_protocols_and_l1_coefficients(tmp_path: Path) -> None:
    figures = "--figures granularity l1-init l1-multiplier --granularities 2 --l1-inits 1e-16 --l1-multipliers 1.5"
    routings = "--routings remoe moe-warmup"
    output, _ = sweep("--dry-run", "--output-dir", str(tmp_path), *figures.split(), *routings.split())
    *lines, _ = output.splitlines()
    l1 = "-- --moe-relu-l1-reg-coeff"
    flags = ["", "-- --moe-warmup-topk 6 --moe-warmup-steps 100", f"{l1}-init 1e-16", f"{l1}-multiplier 1.5"]
    assert [command.partition("8 60000 '' 8 2")[2].strip() for command in lines[1::2]] == flags


def test_errors_of_the_scripts_stop_it_before_the_first_run(tmp_path: Path) -> None:
    _, errors = sweep("--output-dir", str(tmp_path), code=2, DATA_PATH="")
    assert errors.startswith("sweep: error: llama_182m_dense_ffn4: no data: set DATA_PATH")
    _, errors = sweep("--output-dir", str(tmp_path), code=2, TP="8")
    assert "TP=8 does not divide the 12 attention heads" in errors


def test_what_follows_from_flags_for_all(tmp_path: Path) -> None:
    options = ["--dry-run", "--output-dir", str(tmp_path), "--routings", "dense", "--figures"]
    output, _ = sweep(*options, "lr", "--lrs", "0.5", "--", "--lr", "4e-3")
    assert output.splitlines()[1].endswith(" -- --lr 4e-3 --lr 0.002 --min-lr 2.5e-05")
    output, _ = sweep(*options, "experts", "--experts", "8", "--tiny")
    _, plain, _, wide, cost = output.splitlines()
    assert "train_llama_182m_dense.sh 1 1200 32 -- --cpu " in plain and "--ffn-hidden-size 128 " in plain
    assert wide.endswith(" --ffn-hidden-size 1024") and "train_llama_182m_dense.sh 1 1200 32 8 -- --cpu " in wide
    assert cost.startswith("# to train: 2 runs, ")
    output, _ = sweep(*options, "size", "--tiny", "--", "--lr", "1e-3")
    sizes = [parse(shlex.split(line)) for line in output.splitlines()[1:-1:2]]
    assert [(of["--num-layers"], of["--hidden-size"], of["--ffn-hidden-size"], of["--lr"]) for of in sizes] == [
        (("2",), ("64",), ("128",), ("1e-3",)),
        (("4",), ("80",), ("160",), ("1e-3",)),
        (("4",), ("128",), ("256",), ("1e-3",)),
    ]
    with pytest.raises(RecipeError, match="no text in .*Leave out --dry-run, which makes none, or set DATA_PATH"):
        tiny.text_in(tmp_path)
    for domain, size in (("code", 20), ("docs", 10)):
        (tmp_path / f"train_{domain}_text_document.bin").write_bytes(bytes(size))
    prefixes = (f"{tmp_path}/train_{domain}_text_document" for domain in ("code", "docs"))
    assert tiny.text_in(tmp_path)["DATA_PATH"] == "20 {}\n10 {}".format(*prefixes)
    assert tiny.environment({"DATA_DIR": "data"}, "mixed") == {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(("value", "is_on"), [("", False), ("0", False), ("1", True)])
def test_a_dry_run_is_asked_for_as_in_launch_scripts(value: str, is_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRY_RUN", value)
    assert parse_arguments([]).dry_run == is_on


def test_the_text_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "ROOT", tmp_path)
    said: list[str] = []
    tiny.make_text({"DATA_PATH": "pile"}, MIXED, said.append)
    assert not [*tmp_path.iterdir()]
    write_small_corpus(tmp_path / "runs" / "quickstart" / "corpus")
    tiny.make_text({}, MIXED, said.append)
    assert {Path(line.split()[1]).name for line in tiny.environment({}, MIXED)["DATA_PATH"].splitlines()} == {
        "train_code_text_document", "train_docs_text_document"
    }  # fmt: skip
    (tmp_path / "runs" / "quickstart" / "corpus").rename(tmp_path / "elsewhere")
    tiny.make_text({}, MIXED, said.append)
    assert not (tmp_path / "runs" / "quickstart" / "corpus").exists()


@pytest.mark.parametrize("options", [["--tiny"], ["--", "--hybrid-layer-pattern", "*E*E"]], ids=["tiny", "given"])
def test_hybrid_models(options: list[str], tmp_path: Path) -> None:
    """Dense hybrid models have no experts in their pattern."""
    figure = "--figures granularity --granularities 1".split()
    output, _ = sweep("--dry-run", "--output-dir", str(tmp_path), *figure, *options, MODEL="hybrid")
    commands = [parse(shlex.split(line)) for line in output.splitlines()[1:-1:2]]
    assert [command["--hybrid-layer-pattern"] for command in commands] == [("*-*-",), ("*E*E",), ("*E*E",)]
    assert not any("--num-layers" in command for command in commands)


EVERYTHING = ["--figures", *plan.FIGURES, *plan.AXES, *plan.GROUPS, "--routings", *plan.KINDS]


GIVEN = "--lr 1e-3 --moe-z-loss-coeff 1e-3 --ffn-hidden-size 512 --moe-ffn-hidden-size 512"


@pytest.mark.parametrize("flags", ["--", f"-- {GIVEN}", "--tiny --", f"--tiny -- {GIVEN}"])
@pytest.mark.parametrize("model", ["gpt", "hybrid"])
def test_runs_of_one_sweep_compare(flags: str, model: str, tmp_path: Path) -> None:
    output, errors = sweep("--dry-run", "--output-dir", str(tmp_path), *EVERYTHING, *flags.split(), MODEL=model)
    assert output.count(": not started") > 100 and errors == ""


def test_runs_of_other_settings_are_named(tmp_path: Path) -> None:
    """A sweep names earlier runs in its folder with other settings; --collect names runs that differ there."""
    options = ["--dry-run", "--output-dir", str(tmp_path), "--routings", "dense", "remoe", "--figures"]

    def start(run: Run, *flags: str) -> None:
        write_run(tmp_path / run.name, 20, line(20), final(20, 4.5))
        with patch.dict(os.environ, DATA_PATH="pile"):
            settings = planned_flags(plan.Launch(tmp_path, 8, 20, None, flags), run, anywhere=False)
        (tmp_path / run.name / "command.sh").write_text(f"python pretrain_gpt.py {shlex.join(words_of(settings))}")

    flags = ["--lr", "5e-3", "--moe-z-loss-coeff", "1"]
    start(Run("182m", "remoe", 16, 1), *flags)
    start(Run("182m", "dense"), *flags)
    call = [*options, "experts", "--experts", "32", "--train-iters", "20", "--"]
    assert sweep(*call, *flags)[1] == "" and "not compare" not in sweep("--collect", "--output-dir", str(tmp_path))[0]
    shutil.rmtree(tmp_path / Run("182m", "dense").name)
    _, errors = sweep(*call)
    assert "--lr is 5e-3 in llama_182m_remoe_e16g1, 5e-4 in " in errors and "--moe-z-loss-coeff is 1 in " in errors
    start(Run("182m", "remoe", 8, 1))
    output, _ = sweep("--collect", "--output-dir", str(tmp_path))
    for text in (output, (tmp_path / "results.md").read_text()):
        assert "--lr is 5e-3 in llama_182m_remoe_e16g1, 5e-4 in llama_182m_remoe_e8g1; " in text


# ---------------------------------------------------------------- Slurm


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """Return a folder with stubs of Slurm: sbatch records what it is called with, squeue prints the file `queue`."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    commands = {
        "sbatch": "n=$(cat count 2>/dev/null || echo 100)\necho $((n + 1)) | tee count\n"
        '{ echo "$OUTPUT_DIR ${EP-}"; printf "%s\\n" "$@"; } >job.$((n + 1))',
        "squeue": '[[ -f queue ]] || { echo "Unable to contact slurm controller" >&2; exit 1; }\ncat queue',
    }
    for name, text in commands.items():
        (folder / name).write_text(f"#!/bin/bash\ncd {folder}\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


def test_slurm_jobs_are_submitted_once(cluster: Path, tmp_path: Path) -> None:
    output_dir, path = tmp_path / "sweep", f"{cluster}{os.pathsep}{os.environ['PATH']}"
    options = f"--figures experts --experts 4 --routings moe remoe --output-dir {output_dir} --train-iters 50".split()

    def submit(*more: str, code: int = 0) -> tuple[str, str]:
        return sweep(
            *options, "--slurm", "--sbatch-flags=--nodes 2 --comment='a b'", *more, code=code, PATH=path, EP="8", TP="2"
        )

    (cluster / "queue").touch()
    # An earlier attempt with other settings but no checkpoint does not prevent the job.
    write_run(output_dir / "llama_182m_moe_e4g1", 70, line(3))
    output, _ = submit("--", "--lr", "1e-3")
    assert [path.name for path in output_dir.rglob("metrics*")] == ["metrics.jsonl.old"]
    assert "llama_182m_moe_e4g1: Slurm job 101\n" in output and "llama_182m_remoe_e4g1: Slurm job 102\n" in output
    folder, scripts = output_dir / "llama_182m_remoe_e4g1", REPOSITORY / "scripts"
    assert (cluster / "job.102").read_text().splitlines() == [
        f"{folder} 4",
        *("--parsable", f"--job-name={folder}", f"--output={folder}/slurm-%j.out", "--gpus-per-node=8"),
        *("--nodes", "2", "--comment=a b", f"{scripts}/slurm/train.sbatch", f"{scripts}/train_llama_182m_remoe.sh"),
        *("8", "50", "", "4", "1", "--", "--lr", "1e-3"),
    ]
    assert "not started" in (output_dir / "results.md").read_text()

    # Queued jobs are not submitted again.
    other = output_dir / "llama_182m_moe_e4g1"
    (cluster / "queue").write_text(f"    7 of another\n101 {other}\n102 {folder}\n")
    output, _ = submit("--", "--lr", "1e-3")
    assert "0 finished; 2 queued or running as Slurm jobs; 0 to submit" in output
    assert sorted(path.name for path in cluster.glob("job.*")) == ["job.101", "job.102"]

    # One job is gone without a result; the other has its result and is still listed.
    (cluster / "queue").write_text(f"102 {folder}\n")
    write_run(folder, 50, line(50), final(50, 4.0))
    script = ["bash", f"{scripts}/train_llama_182m_remoe.sh", "8", "50", "", "4", "1", "--", "--lr", "1e-3"]
    environment = os.environ | {"DRY_RUN": "command", "PYTHON": sys.executable, "DATA_PATH": "pile"}
    command = subprocess.run(script, env=environment, capture_output=True, text=True, check=True).stdout
    (folder / "command.sh").write_text(command)
    output, _ = submit("--", "--lr", "1e-3")
    assert "1 finished; 1 to submit" in output and "llama_182m_moe_e4g1: Slurm job 103\n" in output

    (cluster / "queue").unlink()
    _, errors = submit("--", "--lr", "1e-3", code=1)
    assert "squeue failed: Unable to contact slurm controller" in errors
