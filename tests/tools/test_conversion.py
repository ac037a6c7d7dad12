"""Test the conversion of dense and top-k checkpoints to ReMoE: the loss at once, further training, and refusals."""

import argparse
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

from megatron.remoe.start.checkpoint_index import read_index
from tests.tiny_model import RELU, TOPK
from tests.training_runs import REPOSITORY, TINY, run, series
from tools.models import checkpoints
from tools.models.convert import models
from tools.models.convert.command import main as command
from tools.models.convert.command import training_command
from tools.models.hf.opening import open_run
from tools.models.hf.settings import complete

pytestmark = [pytest.mark.usefixtures("process_groups"), pytest.mark.filterwarnings("ignore")]
STEPS_BEFORE, STEPS_AFTER = 80, 50
# As docs/conversion.md recommends.
LAMBDA = "--moe-relu-l1-reg-coeff-init 1e-2 --moe-relu-l1-reg-coeff-multiplier 1.05"
GENTLE = [*LAMBDA.split(), "--lr-warmup-iters", "10"]
SETTING = [*TINY, *"--micro-batch-size 8 --lr 2e-3 --min-lr 2e-3 --lr-decay-style constant --eval-iters 8".split()]


def train(data: Path, *arguments: str, processes: int = 1) -> str:
    return run([*SETTING, "--data-path", str(data), *arguments], processes)


def source(data: Path, folder: Path, *routing: str) -> str:
    words = f"--train-iters {STEPS_BEFORE} --eval-interval {STEPS_BEFORE} --save {folder} --no-save-optim".split()
    return train(data, *routing, *words, "--save-interval", str(STEPS_BEFORE // 2))


@pytest.fixture(scope="module")
def dense(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("dense")
    return folder, source(data, folder)


def validation_loss(output: str) -> float:
    """Return the loss of the first evaluation, which reads the same text in every run."""
    match = re.search(r"validation loss at iteration \d+ \| lm loss value: (\S+)", output)
    assert match
    return float(match[1])


def measured(output: str) -> tuple[float, float, float]:
    """Return the loss before, the loss after and the sparsity that the conversion printed."""
    match = re.search(r"loss (\S+) before, (\S+) after .*\n.* sparsity ([\d.]+), target", output)
    assert match, output
    return float(match[1]), float(match[2]), float(match[3])


def main(*arguments: object) -> int:
    return command([*map(str, arguments)])


def train_converted(data: Path, converted: Path, *arguments: str, steps: int = STEPS_AFTER, processes: int = 1) -> str:
    words = f"--pretrained-checkpoint {converted} --train-iters {steps} --eval-interval {steps}".split()
    started = train(data, *RELU, *GENTLE, *words, *arguments, processes=processes)
    assert f"loading release distributed checkpoint from {converted}" in started
    assert len(series(started, "lm loss")) == steps
    return started


def check_start(output: str, before: str, sparsity: float) -> None:
    """Assert that training starts at `sparsity` and near the source's last training loss."""
    assert series(output, "sparsity")[0] == pytest.approx(sparsity, abs=0.05)
    assert 0.75 < series(output, "lm loss")[0] / series(before, "lm loss")[-1] < 1.15, "far from the source's last loss"


def test_from_dense(data: Path, dense: tuple[Path, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, before = dense
    words = ["--load", str(folder), "--save", str(tmp_path / "remoe"), "--num-experts", "8"]
    result = run(["convert", *words], script=REPOSITORY / "tools" / "__main__.py")
    loss_before, loss_after, sparsity = measured(result)
    assert loss_after < loss_before * 1.01 and sparsity > 0.5 and LAMBDA in result
    printed = shlex.split(next(line for line in result.splitlines() if line.startswith("remoe-pretrain")))[1:]
    more = f"--train-iters {STEPS_AFTER} --eval-interval {STEPS_AFTER} --log-interval 1 --lr-warmup-iters 10 --cpu"
    output = run([*(str(tmp_path / "run") if word == "RUN" else word for word in printed), *more.split()])
    check_start(output, before, sparsity)
    assert sum(series(output, "sparsity")[-10:]) / 10 == pytest.approx(0.875, abs=0.04)
    assert validation_loss(output) < validation_loss(before)
    assert main("--load", tmp_path / "remoe", "--save", tmp_path / "again", "--num-experts", "8") == 1
    assert "a checkpoint of a ReMoE already" in capfd.readouterr().err


def test_from_dense_with_normalized_gates(dense: tuple[Path, str], tmp_path: Path, capfd) -> None:
    words = ["--num-experts", "8", "--moe-relu-normalize"]
    assert main("--load", dense[0], "--save", tmp_path / "remoe", *words) == 0
    printed = capfd.readouterr().out
    loss_before, loss_after, sparsity = measured(printed)
    assert loss_after < loss_before * 1.01 and sparsity > 0.4 and "--moe-relu-normalize" in printed
    model = open_run(tmp_path / "remoe", None).model
    assert all(float(layer.mlp.router.gate_scale.scale) > 0.1 for layer in model.decoder.layers)


def test_the_command_leaves_out_what_full_validation_computes(dense: tuple[Path, str]) -> None:
    args = complete(checkpoints.find(dense[0], None).args)
    vars(args).update(num_experts=8, full_validation=True, multiple_validation_sets=True, eval_iters=[11, 10])
    words = training_command(args, Path("OUT"))
    assert "--full-validation" in words and "--eval-iters" not in words


def test_from_topk_into_two_processes(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = source(data, tmp_path / "topk", *TOPK)
    places = ["--load", tmp_path / "topk", "--save", tmp_path / "remoe"]
    assert main(*places, "--num-experts", "16") == 1
    assert "--num-experts: --load is a top-k checkpoint" in capfd.readouterr().err
    assert main(*places) == 0
    loss_before, loss_after, sparsity = measured(capfd.readouterr().out)
    assert loss_after < loss_before * 1.05 and sparsity > 0.5
    layout = "--expert-model-parallel-size 2 --micro-batch-size 4".split()
    check_start(train_converted(data, tmp_path / "remoe", *layout, steps=11, processes=2), before, sparsity)


def test_layout_and_speed_of_the_source_are_free(dense: tuple[Path, str]) -> None:
    """Settings that ReLU routing refuses in a run do not stop a conversion if they do not change the weights."""
    saved = checkpoints.find(dense[0], None).args
    free = {"tensor_model_parallel_size": 2, "fp8": "e4m3", "cuda_graph_impl": "full_iteration"}
    given = argparse.Namespace(num_experts=4, moe_router_topk=None, moe_relu_normalize=None)
    target = models.target_args(complete(argparse.Namespace(**(vars(saved) | free))), given)
    assert target.moe_relu_routing and target.tensor_model_parallel_size == 2


REFUSED = [
    ([], "--num-experts"),
    (["--num-experts", "8", "--moe-router-topk", "8"], "--moe-router-topk 8"),
    (["--num-experts", "8", "--ckpt-step", "7"], "iter_0000007"),
    (["--num-experts", "8", "--data-path", "/nowhere/text"], "/nowhere/text.idx"),
    (["--num-experts", "2", "--tokens", "256", "--loss-bound", "0"], "bound 0.00%): nothing was written"),
    (["--num-experts", "8", "--tokens", "99999999"], "--tokens"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refusals(arguments: list[str], message: str, dense: tuple[Path, str], tmp_path: Path, capfd) -> None:
    assert main("--load", dense[0], "--save", tmp_path / "remoe", *arguments) == 1
    errors = capfd.readouterr().err
    assert message in errors and errors.count("\n") <= 3 and "Traceback" not in errors
    assert not any(tmp_path.iterdir())


def test_damaged_checkpoints(dense: tuple[Path, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(dense[0], broken)
    for file in broken.glob(f"iter_{STEPS_BEFORE:07d}/*.distcp"):
        os.truncate(file, file.stat().st_size // 2)
    assert main("--load", broken, "--save", tmp_path / "remoe", "--num-experts", "8") == 1
    error = capfd.readouterr().err
    assert f"it is truncated. --ckpt-step {STEPS_BEFORE // 2} is complete." in error and error.count("\n") == 1

    # A conversion to a different model class reads while it writes. The error must name the folder that is read.
    whole = broken / f"iter_{STEPS_BEFORE // 2:07d}"
    place = next(place for piece, place in read_index(whole).storage_data.items() if piece.fqn == checkpoints.EMBEDDING)
    with (whole / place.relative_path).open("r+b") as file:
        file.seek(place.offset)
        file.write(bytes(64))
    hybrid = ["--model", "hybrid", "--save", tmp_path / "hybrid", "--ckpt-step", STEPS_BEFORE // 2]
    assert main("--load", broken, *hybrid) == 1
    error = capfd.readouterr().err
    assert str(whole) in error and "--save" not in error and error.count("\n") == 1

    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]
