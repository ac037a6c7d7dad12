"""The last words of a training that failed: what happened, and where it is known, what to do."""

import gc
import os
import re
import signal
import sys
import traceback
from typing import NoReturn

from torch.distributed.checkpoint.api import CheckpointException

REMEDIES: tuple[tuple[str, str], ...] = (
    (
        r"OptimizerParamScheduler: class input value",
        "Give the learning-rate flags that the checkpoint was saved with, or --override-opt_param-scheduler to follow "
        "the flags, or --use-checkpoint-opt_param-scheduler to follow the checkpoint.",
    ),
    (r"EADDRINUSE|address already in use", "Another program listens there: choose another MASTER_PORT, or unset RANK."),
    (
        r"DistStoreError|DistNetworkError|timed out|Timeout",
        "Not all ranks reached each other: start as many as WORLD_SIZE says, and see to it that MASTER_ADDR and "
        "MASTER_PORT of the first node can be reached from all.",
    ),
    (
        r"Connection (reset|closed) by peer|remote process exited|NCCL.*(abort|remote|unhandled system)",
        "Another rank has ended: its last words, or its exit code in torchrun's report, tell why.",
    ),
    (
        r"out of memory|can't allocate memory",
        "Take a smaller --micro-batch-size, more devices, or --recompute-granularity full with its flags.",
    ),
    (
        r"No space left on device|Disk quota exceeded|File too large",
        "Make room for what is saved: the last whole checkpoint is still there, and the same command goes on from it.",
    ),
    (
        r"Failed to write dataset materials",
        "Megatron keeps the order of the samples beside the data: give a folder that can be written with "
        "--data-cache-path.",
    ),
    (
        r"found (NaN|Inf) in|nan.*(loss|grad)|(loss|grad).*nan",
        "If it is the first iteration after --load, the checkpoint's weights are not finite: go back with --ckpt-step. "
        "Otherwise lower --lr, or look at the data.",
    ),
    (
        r"Global shape mismatch|size mismatch|Missing key|not found in (the )?(checkpoint|sharded)|unexpected key",
        "The checkpoint under --load is that of another model: give its flags, or another --load.",
    ),
    (r"integrity verification failed", "Give an earlier iteration with --ckpt-step."),
    (r"Found no NVIDIA driver|no kernel image|CUDA driver", "Without a working GPU, train with --cpu."),
)
LENGTH = 400


def end_with_last_words(error: BaseException) -> NoReturn:
    """Print the error's traceback and one short message below it, and end with exit code 1."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which torchrun sends as soon as another rank has ended
    traceback.print_exception(error)
    # Half-built objects complain when they are freed: now, not below the message.
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    sys.stdout.flush()
    print(last_words(error, os.environ.get("RANK") if several else None), file=sys.stderr, flush=True)
    raise SystemExit(1)


def last_words(error: BaseException, rank: str | None = None) -> str:
    """One short message about an error: its kind, its first line and the remedy.

    Args:
        error: what ended the training.
        rank: that of this process, where there are several.
    """
    while isinstance(error, CheckpointException) and error.failures:  # its own text is a traceback of some rank's
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, CheckpointException):
        error = RuntimeError("the checkpoint could not be read or written, for a reason that another rank tells.")
    text = str(error).strip()
    lines = text.splitlines()
    if len(lines) > 1 and lines[0].endswith(":"):
        lines[0] += f" {lines[1].strip()}"
    reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    whole = f"{type(error).__name__}: {text}"
    remedy = next((remedy for pattern, remedy in REMEDIES if re.search(pattern, whole, re.IGNORECASE)), None)
    short = reason if len(reason) <= LENGTH else reason[:LENGTH] + " ..."
    where = f"rank {rank}: " if rank is not None else ""
    return f"pretrain_gpt.py: error: {where}{short}" + (f"\n{remedy}" if remedy else "")
