"""Test --full-validation: it reads each sequence of each set once, in any layout and with any micro-batch size."""

import inspect
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron.remoe.patches import validation
from megatron.training import training
from megatron.training.datasets.data_samplers import MegatronFullValidationSampler
from tests.data_sets import real_text, write_documents
from tests.test_patches import stock
from tests.tiny_model import RELU
from tests.training_runs import TINY, logged, run, without

MODEL = [*TINY, *RELU, "--num-layers", "4"]
LAYOUTS = {
    "DP2": (2, "--micro-batch-size 4"),
    "PP4": (4, "--micro-batch-size 2 --pipeline-model-parallel-size 4"),
    "TP2 + SP, smaller batches than in training": (
        2,
        "--micro-batch-size 8 --eval-micro-batch-size 4 --tensor-model-parallel-size 2 --sequence-parallel",
    ),
}


def evaluated(folder: Path, processes: int, *flags: str) -> dict[str, tuple[float, int]]:
    """Train one step; return set → printed loss and logged tokens."""
    words, run_folder = without(MODEL, "--split"), folder / "run"
    words += f"--train-data-path {folder}/long --valid-data-path {folder}/long {folder}/short --full-validation".split()
    words += f"--multiple-validation-sets --validation-set-names long short --load {folder}/start --finetune".split()
    words += f"--save {run_folder} --save-interval 1 --no-save-optim --train-iters 1 --lr-decay-iters 8".split()
    output = run([*words, *flags], processes)
    losses = dict(re.findall(r"validation-(\w+) loss at iteration 1 on .*\| lm loss value: (\S+)", output))
    lines = logged(run_folder, "validation")
    shutil.rmtree(run_folder)
    return {line["set"]: (float(losses[line["set"]]), line["tokens"]) for line in lines}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write sets of 35 and 3 sequences, and a checkpoint that all layouts start from."""
    folder = tmp_path_factory.mktemp("whole")
    text = b"".join(real_text())
    for name, sequences in (("long", 35), ("short", 3)):
        write_documents(folder / name, [text[: sequences * 64]])
    flags = ["--data-path", str(folder / "long"), "--split", "100,0,0", "--save", str(folder / "start")]
    run([*MODEL, *flags, "--train-iters", "1", "--save-interval", "1"])
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, tuple[float, int]]:
    return evaluated(folder, 1, "--micro-batch-size", "1")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(layout: str, folder: Path, expected: dict[str, tuple[float, int]]) -> None:
    processes, flags = LAYOUTS[layout]
    actual = evaluated(folder, processes, *flags.split())
    assert {name: tokens for name, (_, tokens) in actual.items()} == {"long": 35 * 64, "short": 3 * 64}
    for name, (loss, _) in expected.items():
        assert actual[name][0] == pytest.approx(loss, rel=1e-5), name


def test_a_blend_is_evaluated_whole(tmp_path: Path) -> None:
    """A set twice has the loss of the set once. A finished run evaluates again, with no training data left."""
    write_documents(tmp_path / "data", [document[:1000] for document in real_text()])
    words = [*without(MODEL, "--split"), *"--split 70,30,0 --full-validation --multiple-validation-sets".split()]
    words += "--train-iters 1 --lr-decay-iters 8 --save-interval 9 --lr 1e-30 --min-lr 0".split()
    for number in (1, 2, 2):
        saves = ["--save", f"{tmp_path}/{number}", "--load", f"{tmp_path}/{number}"]
        run([*words, "--data-path", *[f"{tmp_path}/data"] * number, *saves])
    once, twice = (logged(tmp_path / str(number), "validation")[-1] for number in (1, 2))
    assert twice["tokens"] == 2 * once["tokens"] and twice["tokens"] // 64 % 8
    assert twice["lm_loss"] == pytest.approx(once["lm_loss"], rel=1e-5)


def test_megatron_still_takes_one_sequence_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, args = MegatronFullValidationSampler, SimpleNamespace(validation_samples=[])
    args.eval_micro_batch_size, args.eval_global_batch_size = 2, 8
    for name in ("__init__", "__len__", "__iter__"):
        stock(monkeypatch, sampler, name)
    monkeypatch.setattr(validation, "get_args", lambda: args)
    assert [*sampler(5, 1, 2)] == [[1], [3]]
    build = inspect.unwrap(training.build_train_valid_test_data_iterators)
    assert "args.eval_iters = [None] *" in inspect.getsource(build), "of a stage without data"
    validation.fill_validation_batches()
    validation.fill_validation_batches()
    one, other = sampler(9, 0, 2), sampler(9, 1, 2)
    assert len(one) == len(other) == 2 and args.validation_samples == [9, 9]
    assert [*one] == [[0, 1], [4, 5], [8, None], [None, None]]
    assert [*other] == [[2, 3], [6, 7], [None, None], [None, None]]
