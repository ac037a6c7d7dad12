"""Test real training runs: kinds of models, layouts, recomputation, saving and resuming."""

from pathlib import Path

import pytest

from tests.tiny_model import RELU, TOPK
from tests.training.conftest import L1
from tests.training_runs import REPOSITORY, TINY, assert_equal, logged, records, run, series, weights

ROUTING = "sparsity", "target sparsity", "l1 coefficient", "l1 loss", "lowest layer sparsity", "highest layer sparsity"


def train(data: Path, *arguments: str, processes: int = 1, **options) -> str:
    return run([*TINY, "--data-path", str(data), *arguments], processes, **options)


@pytest.fixture(scope="module")
def one_process(data: Path, initial: list[str]) -> str:
    return train(data, *L1, *initial, fresh=True)


def summary(output: str) -> str:
    """Return the line that describes the run before its first step; check its steps and tokens."""
    (line,) = (line for line in output.splitlines() if line.startswith("Training: "))
    assert "8 steps of 512 tokens, 4,096 tokens in all" in line
    return line


def test_log_line_tells_the_routing(one_process: str) -> None:
    actual = records(one_process)
    assert list(actual) == list(range(1, 9))
    assert "ReMoE, 468,288 parameters" in summary(one_process)
    for record in actual.values():
        assert set(ROUTING) <= set(record)
        lowest, mean, highest = (float(record[f"{which}sparsity"]) for which in ("lowest layer ", "", "highest layer "))
        assert lowest <= mean <= highest
        assert float(record["target sparsity"]) == 0.875
    coefficients = series(one_process, "l1 coefficient")
    for before, after, sparsity in zip(coefficients, coefficients[1:], series(one_process, "sparsity"), strict=False):
        assert after / before == pytest.approx(1.2 if sparsity < 0.875 else 1 / 1.2, rel=1e-5)


def test_console_is_free_of_unhelpful_warnings(one_process: str) -> None:
    lines = [line for line in one_process.splitlines() if "warn" in line.lower() and " ...." not in line]
    assert lines == []


WAYS = {  # in one process; tests/parity has several
    "full recompute": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split(),
    "MoE recompute": "--recompute-granularity selective --recompute-modules moe".split(),
    "loss per token": ["--calculate-per-token-loss"],
}


@pytest.mark.parametrize("way", WAYS)
def test_same_training_in_every_way(way: str, data: Path, initial: list[str], one_process: str) -> None:
    output = train(data, *L1, *WAYS[way], *initial)
    assert series(output, "lm loss") == pytest.approx(series(one_process, "lm loss"), rel=1e-4)
    assert series(output, "sparsity") == pytest.approx(series(one_process, "sparsity"), abs=1e-3)
    assert series(output, "l1 coefficient") == series(one_process, "l1 coefficient")
    assert series(output, "l1 loss") == pytest.approx(series(one_process, "l1 loss"), rel=1e-3)


def test_same_training_in_one_micro_batch(data: Path) -> None:
    """The L1 coefficient is small, because L_reg is defined per micro-batch."""
    output, expected = train(data, *RELU, "--micro-batch-size", "8"), train(data, *RELU)
    assert series(output, "lm loss") == pytest.approx(series(expected, "lm loss"), rel=1e-4)
    assert series(output, "sparsity") == pytest.approx(series(expected, "sparsity"), abs=1e-3)
    assert series(output, "l1 coefficient") == series(expected, "l1 coefficient")


EP2 = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --expert-model-parallel-size 2 --bf16"


def test_resume_is_bit_for_bit(data: Path, tmp_path: Path) -> None:
    def continued(folder: Path, *more: str) -> str:
        saving = ["--save", str(folder), "--load", str(folder), "--save-interval", "3", "--train-iters", "6"]
        return train(data, *RELU, *EP2.split(), *saving, *more, processes=2)

    whole = continued(tmp_path / "whole")
    continued(tmp_path / "parts", "--exit-interval", "3")
    second = continued(tmp_path / "parts")

    assert list(records(second)) == [4, 5, 6] and "468,288 parameters" in whole, "of both ranks"
    resumed, uninterrupted = records(second), records(whole)
    # The second line of a run has the mean loss of both iterations since its start.
    del resumed[5]["lm loss"], uninterrupted[5]["lm loss"]
    for iteration, record in resumed.items():
        assert record == uninterrupted[iteration]
    assert [record["iteration"] for record in logged(tmp_path / "parts", "log")] == list(range(1, 7))
    assert [record["iteration"] for record in logged(tmp_path / "parts", "start")] == [0, 3]
    expected, actual = weights(tmp_path / "whole", 6), weights(tmp_path / "parts", 6)
    assert any("l1_exponent" in key for key in actual)
    assert_equal(actual, expected)


@pytest.mark.parametrize(("kind", "arguments"), [("dense model, 123,200", []), ("top-k MoE, 468,288", TOPK)])
def test_without_relu_routing_it_is_megatrons_own_training(kind: str, arguments: list[str], data, tmp_path) -> None:
    output = train(data, *arguments, "--save", str(tmp_path), "--save-interval", "8")
    assert f"{kind} parameters" in summary(output)
    record = records(output)[8]
    assert not set(ROUTING) & set(record)
    assert ("load balancing loss" in record or "load_balancing_loss" in output) == bool(arguments)
    assert series(output, "lm loss")[-1] < series(output, "lm loss")[0]


def test_evaluation_leaves_the_training_as_it_is(data: Path, initial: list[str], one_process: str, tmp_path) -> None:
    same = [*L1, *initial, "--save", str(tmp_path), "--save-interval", "8"]
    output = train(data, *same, "--eval-interval", "2", "--eval-iters", "2")
    assert "validation loss at iteration 2" in output
    assert [record["iteration"] for record in logged(tmp_path, "validation")] == [2, 4, 6, 8, 8]
    assert records(output) == records(one_process)


def test_tensorboard_and_wandb_get_the_same_figures(data: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars = tmp_path / "scalars"
    output = train(
        data,
        *RELU,
        *f"--tensorboard-dir {scalars} --tensorboard-log-interval 2 --moe-per-layer-logging".split(),
        *f"--wandb-project remoe --wandb-exp-name test --wandb-save-dir {tmp_path}".split(),
        WANDB_MODE="offline",
    )
    events = EventAccumulator(str(scalars), size_guidance={"scalars": 0}).Reload()
    values = {event.step: event.value for event in events.Scalars("moe_relu/sparsity")}
    assert list(values) == [2, 4, 6, 8]
    printed = series(output, "sparsity")
    assert list(values.values()) == pytest.approx([printed[step - 1] for step in values], abs=1e-6)
    for name in ("target_sparsity", "l1_coefficient", "l1_loss", "lowest_layer_sparsity", "highest_layer_sparsity"):
        assert len(events.Scalars(f"moe_relu/{name}")) == 4
    load = [events.Scalars(f"moe_relu/tokens_per_expert_layer_1_expert_{e}")[-1].value for e in range(8)]
    layer = events.Scalars("moe_relu/sparsity_layer_1")[-1].value
    assert 1 - sum(load) / 8 == pytest.approx(layer, abs=1e-6)
    (run,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content, value = run.read_bytes(), str(events.Scalars("moe_relu/sparsity")[-1].value).encode()
    assert all(text in content for text in (b"moe_relu/sparsity", value))


@pytest.mark.parametrize("kind", ["context", "tensor_model", "expert_model"])
def test_two_ranks_compute_what_one_does(kind: str) -> None:
    """Routers, L1, S, λ, dispatch and cross entropy of two ranks equal those of one; ranks agree on their chunks."""
    output = run([kind], 2, script=REPOSITORY / "tests" / "split_sequence.py")
    assert "rank 0 ok" in output and "rank 1 ok" in output
