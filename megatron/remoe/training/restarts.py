"""Train again in the same process after an error: --inprocess-restart, with NVIDIA's resiliency extension (NVRx)."""

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack

import torch

from megatron.remoe.files.errors import UsageError
from megatron.remoe.start.environment import check_environment
from megatron.remoe.start.messages import last_words, usage_errors
from megatron.training import arguments, inprocess_restart

Attempt = Callable[[ExitStack, torch.distributed.Store], None]


def run_with_restarts(attempt: Attempt) -> None:
    """Call `attempt`, and call it again on all ranks if one of them fails with an error.

    Megatron 0.19.2 restarts only `pretrain`, which needs arguments that its own clean-up has removed, and it ignores
    --inprocess-max-iterations. Here each attempt begins with the flags, and there are at most that many.

    Args:
        attempt: its arguments are a stack that is closed after the attempt, and the store in which its ranks meet.

    Raises:
        UsageError: NVRx is not installed, there is no free port for its stores, or --load is not --save.
        Exception: the error of the last attempt.
    """
    with usage_errors():
        restart = _nvrx_wrapper(attempt)
    try:
        restart()
    except _LastAttempt as end:
        raise end.error from None


class _LastAttempt(BaseException):
    """End this rank: NVRx restarts after an `Exception` only, and clears causes."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _nvrx_wrapper(attempt: Attempt) -> Callable[[], None]:
    check_environment()
    args = arguments.parse_args(ignore_unknown_args=True)
    if args.save and args.load != args.save:
        raise UsageError(
            f"--inprocess-restart with --save {args.save} needs --load {args.save}: a restart continues from there.",
            "REMOE-E210",
        )
    try:
        from nvidia_resiliency_ext.inprocess import CallWrapper
    except ImportError as error:
        raise UsageError(
            f"--inprocess-restart needs nvidia-resiliency-ext ({error}): pip install nvidia-resiliency-ext, or leave "
            "the flag out.",
            "REMOE-E210",
        ) from error
    if not 1024 <= int(os.environ["MASTER_PORT"]) <= 65533:
        raise UsageError(
            "--inprocess-restart needs the two ports after MASTER_PORT: start the training with torchrun.", "REMOE-E210"
        )
    store = torch.distributed.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]) + 1, args.world_size, args.rank == 0
    )

    def run(call: CallWrapper | None = None) -> None:  # NVRx fills in the argument of this type
        assert call is not None
        try:
            with ExitStack() as after_attempt:
                attempt(after_attempt, torch.distributed.PrefixStore(str(call.iteration), store))
        except Exception as error:
            limit = args.inprocess_max_iterations
            if isinstance(error, UsageError) or (limit is not None and call.iteration + 1 >= limit):
                raise _LastAttempt(error) from error
            print(f"{last_words(error, os.environ['RANK'])}\nTraining again in the same process.", file=sys.stderr)
            raise

    return inprocess_restart.inprocess_restart(run, args)
