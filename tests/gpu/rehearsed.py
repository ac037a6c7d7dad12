"""Run a program over the CUDA that does nothing, as `tools/rehearse` does: python rehearsed.py SHARE PROGRAM ...

SHARE is the active share of the (token, expert) pairs that trainings read from it.
"""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch  # noqa: E402

from megatron.remoe import pretrain  # noqa: E402
from tools.rehearse import fake_ranks  # noqa: E402
from tools.rehearse.host_reads import Pairs  # noqa: E402


def main() -> None:
    """Stand in for other ranks and for values, then run the program."""
    share, program = float(sys.argv[1]), sys.argv[2]
    sys.argv = sys.argv[2:]
    torch.backends.cudnn.enabled = False  # the one library that is not stood in for
    torch.backends.cuda.enable_cudnn_sdp(False)
    fake_ranks.join(0, 1, 1)
    run = pretrain.main

    def run_on_made_up_values(observe: Callable[[Any], None] | None = None) -> None:
        def observe_too(model_cfg: Any) -> None:
            Pairs(share).put_in()
            if observe is not None:
                observe(model_cfg)

        run(observe_too)

    pretrain.main = run_on_made_up_values
    sys.path.insert(0, str(Path(program).parent))  # as Python does for a program
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
