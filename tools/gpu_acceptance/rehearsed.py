"""Runs a program over the CUDA that does nothing, as `tools/rehearse` does: python rehearsed.py SHARE PROGRAM ...

SHARE is the active share of the (token, expert) pairs that trainings read from it; PROGRAM a file, or a module's name.
"""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch  # noqa: E402

import pretrain_gpt  # noqa: E402
from tools.rehearse import world  # noqa: E402
from tools.rehearse.values import Pairs  # noqa: E402

WITHOUT_TRAINING = ("kernels.py",)  # builds layers itself


def main() -> None:
    """Stand in for the other ranks and for values, then run the program."""
    share, program = float(sys.argv[1]), sys.argv[2]
    sys.argv = sys.argv[2:]
    torch.backends.cudnn.enabled = False  # the one library that is not stood in for
    torch.backends.cuda.enable_cudnn_sdp(False)
    world.join(0, 1, 1)
    run = pretrain_gpt.main

    def run_on_made_up_values(observe: Callable[[Any], None] | None = None) -> None:
        def observe_too(model_cfg: Any) -> None:
            Pairs(share).put_in()
            if observe is not None:
                observe(model_cfg)

        run(observe_too)

    pretrain_gpt.main = run_on_made_up_values
    if Path(program).name in WITHOUT_TRAINING:
        Pairs(share).put_in()
    if program.endswith(".py"):
        sys.path.insert(0, str(Path(program).parent))  # as Python does for a program
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
