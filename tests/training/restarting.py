"""Train with errors in some steps, and restart in the same process after each: restarting.py nvrx|plain FLAGS.

With "nvrx", the program restarts with NVIDIA's resiliency extension, without the parts that need a GPU. With "plain",
this script does what NVRx does: it removes Megatron's state and calls the program's function again.
"""

import contextlib
import os
import socket
import sys
from pathlib import Path

import torch

from megatron.remoe import pretrain

FAULTY_STEPS = [5, 8]  # finished iterations before an error; checkpoints are saved at 2, 4, 6, ...
train = pretrain.train


def train_with_faults(*arguments: object, **options: object) -> None:
    """Call the program's `train`; each faulty step fails once."""
    from megatron.training import get_args, training

    if not hasattr(training.train_step, "__wrapped__"):
        stock = training.train_step

        def faulty(*words: object, **named: object) -> object:
            if get_args().curr_iteration in FAULTY_STEPS:
                FAULTY_STEPS.remove(get_args().curr_iteration)
                # The lock that another training would find in this folder.
                print("lock:", Path(get_args().save, "training.lock").read_bytes(), flush=True)
                raise RuntimeError(f"fault after {get_args().curr_iteration} steps")
            return stock(*words, **named)

        faulty.__wrapped__ = stock  # type: ignore[attr-defined]
        training.train_step = faulty
    train(*arguments, **options)


def again_and_again() -> None:
    """Restart as NVRx does, in one process."""
    on_cpu = pretrain.prepare()
    from megatron.remoe.start.run_lock import RunLock
    from megatron.training.inprocess_restart import destroy_state

    with contextlib.ExitStack() as at_the_end:
        lock = RunLock(at_the_end)
        while True:
            try:
                with contextlib.ExitStack() as after_attempt:
                    train_with_faults(on_cpu, None, lock, after_attempt)
                return
            except RuntimeError as error:
                print(error)
                print("lock:", Path(sys.argv[sys.argv.index("--save") + 1], "training.lock").read_bytes(), flush=True)
                destroy_state()
                torch.distributed.destroy_process_group()


if __name__ == "__main__":
    how = sys.argv.pop(1)
    if how == "plain":
        again_and_again()
        sys.exit()
    from nvidia_resiliency_ext.inprocess import Wrapper
    from nvidia_resiliency_ext.inprocess.finalize import ThreadedFinalize

    ThreadedFinalize.__call__ = lambda self, state: (self.fn(), state)[1]
    Wrapper._construct_restart_health_check = lambda self: setattr(self, "restart_health_check", None)
    pretrain.prepare()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    pretrain.train = train_with_faults
    sys.argv += ["--inprocess-restart", "--inprocess-granularity", "rank"]
    pretrain.main()
