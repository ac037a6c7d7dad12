"""Test SAVE/metrics.jsonl: its lines, those that a resumed run removes, and that it never ends a training run."""

import argparse
import json
import logging
import math
import resource
from pathlib import Path
from typing import Any

import pytest

from megatron.remoe.training.run_log import RunLog, read_run_log
from tests.tiny_model import RELU
from tests.training_runs import TINY, logged, records, run

FILE = "metrics.jsonl"


def make_log(folder: Path, iteration: int = 0) -> RunLog:
    return RunLog(argparse.Namespace(save=str(folder), iteration=iteration, train_iters=100, device=object()))


def tell(log: RunLog, *messages: Any) -> None:
    for message in messages:
        log.emit(logging.makeLogRecord({"msg": message}))


def line(iteration: int, **figures: Any) -> dict[str, Any]:
    return {"kind": "log", "iteration": iteration, "lm_loss": 2.5, **figures}


def validation(iteration: int, **figures: Any) -> dict[str, Any]:
    return {"kind": "validation", "iteration": iteration, "lm_loss": 2.0, **figures}


def iterations(folder: Path, kind: str = "log") -> list[int]:
    return [record["iteration"] for record in logged(folder, kind)]


def test_a_line_of_the_log_with_the_figures_that_belong_to_it(tmp_path: Path) -> None:
    routing = {"sparsity": 0.5, "l1_loss": math.nan, "layer_sparsity": {1: 0.25, 3: 0.75}}
    log = make_log(tmp_path)
    tell(log, routing, line(20, grad_norm=math.inf), line(40))
    first, actual, next_one = read_run_log(tmp_path / FILE)
    assert first["kind"] == "start" and first["iteration"] == 0
    assert first["args"]["train_iters"] == 100 and "device" not in first["args"], "what JSON can hold"
    assert actual.pop("time") >= first["time"]
    assert actual == line(20) | {"sparsity": 0.5, "layer_sparsity": {"1": 0.25, "3": 0.75}}
    assert "sparsity" not in next_one


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    tell(make_log(tmp_path), *(line(iteration) for iteration in (18, 19, 20, 21)))
    with (tmp_path / FILE).open("a") as file:
        file.write('{"kind": "log", "iter')  # cut off in the middle
    resumed = make_log(tmp_path, iteration=20)
    assert iterations(tmp_path) == [18, 19, 20, 21], "nothing is taken out before the training goes on"
    tell(resumed, line(21), line(22))
    assert iterations(tmp_path) == [18, 19, 20, 21, 22]
    assert iterations(tmp_path, "start") == [0, 20]


def test_a_run_from_its_start_keeps_the_former_one_beside_it(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        tell(make_log(tmp_path), line(step))
    assert iterations(tmp_path) == [3]
    for name, expected in (("old", [0, 1]), ("old.1", [0, 2])):
        assert [record["iteration"] for record in read_run_log(tmp_path / f"metrics.{name}.jsonl")] == expected
    log, limits = make_log(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.warns(UserWarning, match="File too large"):
            tell(log, line(4), line(5))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    tell(log, line(6))
    assert iterations(tmp_path, "start") == [0] and iterations(tmp_path) == [6]
    assert len([*tmp_path.iterdir()]) == 4, "renamed once, although two lines could not be written"


def test_running_sums_go_on(tmp_path: Path) -> None:
    def sums(pairs: int, tokens: int) -> dict[str, int]:
        return {"total_active_pairs": pairs, "total_layer_tokens": tokens}

    tell(make_log(tmp_path), line(10, **sums(40, 10)), {"kind": "checkpoint", "iteration": 15, **sums(50, 15)})
    tell(make_log(tmp_path, iteration=15), sums(5, 5), line(20))
    assert logged(tmp_path, "log")[-1]["total_active_pairs"] == 55
    assert logged(tmp_path, "log")[-1]["total_layer_tokens"] == 20

    # The steps between 15 and 17 were not counted. No sum is better than a wrong one.
    tell(make_log(tmp_path, iteration=17), line(20, **sums(5, 5)))
    assert "total_active_pairs" not in logged(tmp_path, "log")[-1]


def test_a_run_that_has_nothing_to_do_adds_what_its_last_evaluation_lacks(tmp_path: Path) -> None:
    tell(make_log(tmp_path), line(100), validation(100, set="code"))
    before = (tmp_path / FILE).read_text()
    log = make_log(tmp_path, iteration=100)
    tell(log, validation(100, set="code"))
    assert (tmp_path / FILE).read_text() == before
    tell(log, validation(100, set="docs"), validation(100, set="docs"))
    assert [record["set"] for record in logged(tmp_path, "validation")] == ["code", "docs"]
    assert (tmp_path / FILE).read_text().startswith(before)


OTHER_LINES = ["[1, 2]", "7", "{}", '{"kind": "log"}', '{"kind": "log", "iteration": "7"}', "[" * 10**5]


def test_lines_that_are_no_records_are_left_out(tmp_path: Path) -> None:
    tell(make_log(tmp_path), line(1))
    log = make_log(tmp_path, iteration=1)
    with (tmp_path / FILE).open("ab") as file:
        file.write("\n".join(OTHER_LINES).encode() + b"\n\xff\xfe\x00")
    assert iterations(tmp_path) == [1]
    tell(log, line(2), line(3, figure=object()))
    assert iterations(tmp_path) == [1, 2, 3]
    with (tmp_path / FILE).open("a") as file:
        file.write('{"kind": "log", "iter')
    tell(log, line(4))
    assert iterations(tmp_path) == [1, 2, 3, 4], "a line after one that was cut off is whole"
    tell(make_log(tmp_path, iteration=4), line(5))
    assert all(isinstance(json.loads(each), dict) for each in (tmp_path / FILE).read_text().splitlines())


SPLIT = ["--split", "80,10,10"]
EVALUATED = [*SPLIT, "--eval-iters", "1"]


def train(data: Path, folder: Path, *arguments: str, **options: Any) -> str:
    saving = ["--save", str(folder), "--load", str(folder), "--data-path", str(data)]
    return run([*TINY, *RELU, *saving, "--save-interval", "100", *SPLIT, *arguments], **options)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Train eight steps, log every two, evaluate after four and at the end; return the folder and the output."""
    folder = tmp_path_factory.mktemp("whole")
    flags = "--log-interval 2 --eval-interval 4 --log-params-norm".split()
    return folder, train(data, folder, *flags, *EVALUATED)


def test_a_training_run_writes_numbers(whole: tuple[Path, str]) -> None:
    folder, printed = whole
    lines = logged(folder, "log")
    assert [each["iteration"] for each in lines] == [*records(printed)] == [1, 2, 4, 6, 8]
    counted = int(printed.partition("number of parameters on")[2].splitlines()[0].rpartition(":")[2])
    assert [each.get("parameters") for each in lines] == [counted, *[None] * 4]
    names = {"lm loss", "l1 loss", "sparsity", "lowest layer sparsity", "learning rate", "global batch size"}
    names |= {"consumed samples", "loss scale", "number of skipped iterations", "number of nan iterations"}
    for each, fields in zip(lines, records(printed).values(), strict=True):
        for name in names:
            assert each[name.replace(" ", "_")] == pytest.approx(float(fields[name]), rel=1e-6, abs=1e-6), name
        for name in ("grad norm", "params norm"):
            assert each[name.replace(" ", "_")] == pytest.approx(float(fields[name]), abs=5e-4), name
        assert each["tokens_per_second"] == pytest.approx(8 * 64 / each["seconds_per_iteration"], rel=1e-3)
    values = [float(part.partition(" ")[0]) for part in printed.split(" elapsed time per iteration (ms): ")[1:]]
    assert [1000 * each["seconds_per_iteration"] for each in lines] == pytest.approx(values, abs=0.051)
    actual = [(each["iteration"], each.get("set"), each.get("final")) for each in logged(folder, "validation")]
    assert actual == [(4, None, None), (8, None, None), (8, None, True), (8, "test", True)]
    assert {each["tokens"] for each in logged(folder, "validation")} == {8 * 64}, "one batch"


def test_parts_and_a_missing_last_evaluation(data: Path, whole: tuple[Path, str], tmp_path: Path) -> None:
    """A run that stops between two lines has the sums of a whole one. Starts after its end add one evaluation."""
    train(data, tmp_path, "--log-interval", "2", "--exit-interval", "3")
    train(data, tmp_path, "--log-interval", "2")
    assert iterations(tmp_path, "checkpoint") == [3, 8] and not iterations(tmp_path, "validation")
    expected, lines = logged(whole[0], "log")[-1], logged(tmp_path, "log")[-1]
    assert expected["total_layer_tokens"] == 8 * 8 * 64 * 2, "steps, sequences, tokens, MoE layers"
    assert all(lines[name] == expected[name] for name in ("total_active_pairs", "total_layer_tokens"))
    saved = {file: file.stat().st_mtime_ns for file in tmp_path.glob("iter_0000008/*")}
    for _ in range(2):
        train(data, tmp_path, "--log-interval", "2", *EVALUATED)
        assert iterations(tmp_path, "validation") == [8, 8], "each set once"
    assert saved == {file: file.stat().st_mtime_ns for file in tmp_path.glob("iter_0000008/*")}, "no save in place"
    assert iterations(tmp_path)[-1] == 8 and iterations(tmp_path, "start") == [0, 3]
