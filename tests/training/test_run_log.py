"""SAVE/metrics.jsonl: what goes into it, what a resumed run takes out, and how it stays small."""

import argparse
import logging
from pathlib import Path
from typing import Any

import pytest

from megatron.remoe.training.run_log import RunLog, read_run_log

LINE = (
    " [2026-01-01 00:00:00.000000] iteration {:8d}/     100 | consumed samples:          160 |"
    " elapsed time per iteration (ms): 250.0 | throughput per GPU (TFLOP/s/GPU): 1.5 | learning rate: 1.000000E-03 |"
    " global batch size:     8 | lm loss: 2.500000E+00 | loss scale: 1.0 | grad norm: inf | params norm: 3.500 |"
    " number of skipped iterations:   0 | number of nan iterations:   0 |"
)


def make_log(folder: Path, iteration: int = 0, train_iters: int = 100, **options: Any) -> RunLog:
    args = argparse.Namespace(
        save=str(folder), iteration=iteration, train_iters=train_iters, seq_length=64, log_interval=1, device=object()
    )
    return RunLog(args, **options)


def tell(log: RunLog, *messages: str | dict[str, Any]) -> None:
    for message in messages:
        log.emit(logging.makeLogRecord({"msg": message}))


def iterations(folder: Path, kind: str = "log") -> list[int]:
    return [record["iteration"] for record in read_run_log(folder / "metrics.jsonl") if record["kind"] == kind]


def test_a_line_of_the_log_with_the_figures_that_belong_to_it(tmp_path: Path) -> None:
    routing = {"sparsity": 0.5, "l1_loss": float("nan"), "layer_sparsity": {1: 0.25, 3: 0.75}}
    tell(make_log(tmp_path), routing, LINE.format(20), "-" * 20)
    start, line = read_run_log(tmp_path / "metrics.jsonl")
    assert start["kind"] == "start" and start["iteration"] == 0
    assert start["args"]["seq_length"] == 64 and "device" not in start["args"], "what JSON can hold"
    assert line.pop("time") >= start["time"]
    assert line == {
        "kind": "log",
        "iteration": 20,
        "consumed_samples": 160,
        "throughput_per_gpu_tflop_s_gpu": 1.5,
        "learning_rate": 1e-3,
        "global_batch_size": 8,
        "lm_loss": 2.5,
        "loss_scale": 1.0,
        "params_norm": 3.5,
        "number_of_skipped_iterations": 0,
        "number_of_nan_iterations": 0,
        "seconds_per_iteration": 0.25,
        "tokens_per_second": 2048.0,
        "sparsity": 0.5,
        "layer_sparsity": {"1": 0.25, "3": 0.75},
    }


def test_evaluations(tmp_path: Path) -> None:
    tell(
        make_log(tmp_path),
        " validation loss at iteration 10 | lm loss value: 2.5E+00 | lm loss PPL: 1.2E+01 | ",
        " validation-prose loss at iteration 10 | lm loss value: 2.0E+00 | lm loss PPL: 7.4E+00 | ",
        " validation loss at iteration 20 on validation set | lm loss value: 1.5E+00 | lm loss PPL: 4.5E+00 | ",
        " validation loss at iteration 20 on test set | lm loss value: 1.0E+00 | lm loss PPL: 2.7E+00 | ",
    )
    assert list(read_run_log(tmp_path / "metrics.jsonl"))[1:] == [
        {"kind": "validation", "iteration": 10, "lm_loss": 2.5},
        {"kind": "validation", "iteration": 10, "set": "prose", "lm_loss": 2.0},
        {"kind": "validation", "iteration": 20, "lm_loss": 1.5},
        {"kind": "validation", "iteration": 20, "set": "test", "lm_loss": 1.0},
    ]


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    tell(make_log(tmp_path), *(LINE.format(iteration) for iteration in (18, 19, 20, 21)))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "log", "iter')  # cut off in the middle
    resumed = make_log(tmp_path, iteration=20)
    assert iterations(tmp_path) == [18, 19, 20, 21], "nothing is taken out before the training goes on"
    tell(resumed, LINE.format(21), LINE.format(22))
    assert iterations(tmp_path) == [18, 19, 20, 21, 22]
    assert iterations(tmp_path, "start") == [0, 20]


def test_a_run_goes_on_with_another_log_interval(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    log._args.log_interval = 10
    tell(log, *(LINE.format(iteration) for iteration in (10, 20, 30)))
    tell(make_log(tmp_path, iteration=30), LINE.format(31), LINE.format(32))
    assert iterations(tmp_path) == [10, 20, 30, 31, 32]


def test_a_run_from_its_start_keeps_the_former_one_beside_it(tmp_path: Path) -> None:
    tell(make_log(tmp_path), LINE.format(1), LINE.format(10))
    tell(make_log(tmp_path), LINE.format(1))
    tell(make_log(tmp_path), LINE.format(2))
    tell(make_log(tmp_path), LINE.format(3))
    assert iterations(tmp_path) == [3]
    for name, expected in (("old", [0, 1, 10]), ("old.1", [0, 1]), ("old.2", [0, 2])):
        assert [record["iteration"] for record in read_run_log(tmp_path / f"metrics.{name}.jsonl")] == expected


def test_a_run_that_has_nothing_to_do_leaves_it(tmp_path: Path) -> None:
    tell(
        make_log(tmp_path, iteration=100), " validation loss at iteration 100 on validation set | lm loss value: 1.0 |"
    )
    assert not (tmp_path / "metrics.jsonl").exists()


def test_it_is_bounded(tmp_path: Path) -> None:
    limit, log = 20_000, make_log(tmp_path, train_iters=1001, limit=20_000)
    validation = " validation loss at iteration 7 | lm loss value: 2.5E+00 | "
    tell(log, validation)
    for iteration in range(1, 1002):
        tell(log, {"tokens_per_expert": {1: [0.125] * 8}}, LINE.format(iteration))
        assert (tmp_path / "metrics.jsonl").stat().st_size <= limit
    *kept, last = iterations(tmp_path)
    (step,) = {after - before for before, after in zip(kept, kept[1:], strict=False)}
    assert len(kept) >= 20 and kept[0] <= step and kept[-1] > 1000 - step, "evenly spread over all of the run"
    assert last == 1001 and last % step, "the run's last line"
    assert iterations(tmp_path, "validation") == [7]


def test_it_is_bounded_over_many_sessions(tmp_path: Path) -> None:
    """Each does eight lines, and the last six of it again."""
    limit, train_iters = 20_000, 1000
    for start in range(0, train_iters - 8, 8):
        log = make_log(tmp_path, iteration=start, train_iters=train_iters, limit=limit)
        log._args.flags = "x" * 500
        for iteration in range(start + 1, start + 15):
            tell(log, {"tokens_per_expert": {1: [0.125] * 8}}, LINE.format(iteration))
            assert (tmp_path / "metrics.jsonl").stat().st_size <= limit
    kept, starts = iterations(tmp_path), [one for one in read_run_log(tmp_path / "metrics.jsonl") if "version" in one]
    (step,) = {after - before for before, after in zip(kept, kept[1:], strict=False)}
    assert kept[0] <= step and kept[-1] > train_iters - 10 - step, "evenly spread over all of the run"
    assert [one["iteration"] for one in starts] == [*range(0, train_iters - 8, 8)]
    assert ["args" in one for one in starts] == [False] * (len(starts) - 4) + [True] * 4


def test_what_is_over_the_limit_without_lines_of_the_log(tmp_path: Path) -> None:
    log = make_log(tmp_path, train_iters=16, limit=100)
    tell(log, *(LINE.format(iteration) for iteration in range(1, 17)))
    assert iterations(tmp_path) == [16], "the last one, and an end of halving"


def test_a_training_outlives_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: .* The training goes on without this log"):
        tell(make_log(tmp_path, iteration=1), LINE.format(2))
