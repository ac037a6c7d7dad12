"""Train a tiny model with the project's entry, and read the logs."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron.remoe.training.run_log import read_run_log
from tests.entry import shared_entry
from tests.tiny_model import BYTES, SIZES, TRAINING
from tools.console.places import ROOT as REPOSITORY
from tools.runs.log_reader import read_log

ENTRY = REPOSITORY / "pretrain_gpt.py"
# Without a limit on activations, dense routing needs no chunks, and a step takes half of the time. The golden run, the
# parity runs and those of the launch scripts have the default limit.
TINY = [
    *TRAINING,
    *"--micro-batch-size 4 --moe-relu-activation-limit 0".split(),
    *"--lr 4e-3 --min-lr 4e-4 --lr-decay-style cosine --train-iters 8 --log-interval 1".split(),
    *"--make-vocab-size-divisible-by 192 --split 90,10,0".split(),
]
# For the launch scripts, after their own flags.
SMALL = [*SIZES, *BYTES, *"--global-batch-size 4 --make-vocab-size-divisible-by 8 --log-interval 1 --cpu".split()]

# Timings, and the memory fields that another rank can print into the same line.
VOLATILE = "elapsed time per iteration (ms),time left (h),allocated,max allocated,reserved,max reserved".split(",")


def popen(command: list[str], **options: Any) -> subprocess.Popen[str]:
    """Start a program whose errors go to its output, which is piped."""
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def start(arguments: list[str], processes: int = 1, script: Path = ENTRY, **environment: str) -> subprocess.Popen[str]:
    """Start the entry, or a script around it, under torchrun for more than one process."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return popen([*launcher, str(script), *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)


def run(
    arguments: list[str], processes: int = 1, expect: int | None = 0, fresh=False, script=ENTRY, **environment: str
) -> str:
    """Run the entry, or a script around it, to its end and return what it printed.

    Args:
        expect: the exit code to assert; None: any.
        fresh: start a new process, as a user does, instead of a fork that has imported Megatron. Imports read some
            variables of `environment` only then. On a GPU the process is always new, because forks cannot use it.
    """
    if fresh or torch.cuda.is_available():
        process = start(arguments, processes, script, **environment)
        output, _ = communicate(process, 240)
        code: int | None = process.returncode
    else:
        code, output = shared_entry().run(arguments, environment, processes=processes, script=script, limit=240)
    assert expect is None or code == expect, f"exit code {code}\n{output[-4000:]}"
    return output


def in_another_process(lines: str, folder: Path, expect: int | None = 0) -> str:
    """Run Python code with a Megatron that is patched for the CPU only; return the output."""
    script = folder / "lines.py"
    script.write_text("from megatron.remoe import cpu\ncpu.install()\n" + lines)
    return run([], expect=expect, script=script)


def records(output: str) -> dict[int, dict[str, str]]:
    """Return iteration → field → text of the value from Megatron's log lines, without timings and memory."""
    return {step: {name: one[name] for name in one if name not in VOLATILE} for step, one in read_log(output).items()}


def series(output: str, field: str) -> list[float]:
    """Return the values of a field in order of iteration."""
    return [float(record[field]) for _, record in sorted(records(output).items())]


def without(words: list[str], *flags: str) -> list[str]:
    """Return the words without these flags and the value after each."""
    return [word for flag, word in zip(["", *words], words, strict=False) if not {flag, word} & {*flags}]


def logged(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Return the lines of a kind in a run's metrics.jsonl."""
    return [line for line in read_run_log(folder / "metrics.jsonl") if line["kind"] == kind]


def step_losses(output: str) -> list[float]:
    """Return each step's loss. The second line after a start has the mean of the first two."""
    losses = series(output, "lm loss")
    losses[1] = 2 * losses[1] - losses[0]
    return losses


def last_error(output: str) -> str:
    """Return the output from the entry's last error message on."""
    assert "pretrain_gpt.py: error: " in output, output[-3000:]
    return output[output.rindex("pretrain_gpt.py: error: ") :]


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Assert that tensors are equal bit for bit."""
    assert actual.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(actual[key], expected[key])] == []


def figures(folder: Path, interval: int) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl at multiples of `interval`, without starts, timings and parameter counts."""
    left_out = ("time", "seconds_per_iteration", "tokens_per_second", "parameters")
    lines = [line for line in read_run_log(folder / "metrics.jsonl") if line["kind"] != "start"]
    lines = [line for line in lines if line["iteration"] % interval == 0]
    return [{name: value for name, value in line.items() if name not in left_out} for line in lines]


def wait_until(holds: Callable[[], object], process: subprocess.Popen[Any] | None = None) -> None:
    """Wait for a condition; fail after two minutes, or when the process ends first."""
    deadline = time.monotonic() + 120
    while not holds():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def communicate(process: subprocess.Popen[str], seconds: float) -> tuple[str, str]:
    """Wait for a process, and return its output and errors; terminate it if it takes longer."""
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its ranks
        raise


def finish(process: subprocess.Popen[str], code: int) -> tuple[str, str]:
    """Return a tool's output and errors; assert its exit code and that there is no traceback or terminal code."""
    output, errors = communicate(process, 500)
    assert process.returncode == code, output + errors
    assert "Traceback" not in output + errors and "\x1b" not in output + errors
    return output, errors


def weights(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Return all tensors of a distributed checkpoint, including the optimizer's."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    loaded = _load_state_dict_from_keys(storage_reader=FileSystemReader(folder / f"iter_{iteration:07d}"))
    return {key: value for key, value in loaded.items() if isinstance(value, torch.Tensor)}
