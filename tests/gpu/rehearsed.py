"""Run pytest or a program on the no-op CUDA, as `remoe rehearse` does.

python -m tests.gpu.rehearsed pytest ...        run pytest; it and its subprocesses see an H100 that does not exist
python rehearsed.py SHARE PROGRAM ...           run a program of the tests as the only rank; its training runs read
                                                SHARE as the active share of the (token, expert) pairs
"""

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch  # noqa: E402

from tools.plan import no_op_cuda  # noqa: E402


def h100() -> dict[str, str]:
    """Return the environment in which a process sees one H100."""
    return no_op_cuda.environment("h100", devices=1) | {"CUDA_VISIBLE_DEVICES": "0"}


def run_program(share: float, program: str) -> None:
    """Install stand-ins for ranks and for values read from the device, then run the program."""
    from megatron.remoe import pretrain
    from tools.plan import fake_ranks
    from tools.plan.fake_ranks import FakePairCounts

    torch.backends.cudnn.enabled = False  # the one library without a stand-in
    torch.backends.cuda.enable_cudnn_sdp(False)
    fake_ranks.join(0, 1, 1)
    run = pretrain.main

    def run_on_made_up_values(observe: Callable[[Any], None] | None = None) -> None:
        def observe_too(model_cfg: Any) -> None:
            FakePairCounts(share).install()
            if observe is not None:
                observe(model_cfg)

        run(observe_too)

    pretrain.main = run_on_made_up_values
    sys.path.insert(0, str(Path(program).parent))  # as Python does for a program
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "pytest":
        os.execve(sys.executable, [sys.executable, "-m", *sys.argv[1:]], os.environ | h100())
    share, sys.argv = float(sys.argv[1]), sys.argv[2:]
    run_program(share, sys.argv[0])
