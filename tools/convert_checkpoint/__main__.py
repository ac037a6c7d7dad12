"""Starts `command`, on the CPU also where there is an accelerator."""

import signal
import sys
from pathlib import Path
from typing import NoReturn

TOOLS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(path) for path in (TOOLS, TOOLS.parent)]

from megatron.remoe import console, cpu  # noqa: E402

console.hide_unhelpful_warnings()
cpu.install()

from convert_checkpoint.command import main  # noqa: E402


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(main())
