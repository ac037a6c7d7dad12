"""Starts `command`, on the CPU also where there is an accelerator."""

import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from megatron.remoe import cpu  # noqa: E402
from megatron.remoe.preflight import console, machine  # noqa: E402

console.hide_unhelpful_warnings()
machine.do_without_what_is_missing(on_cpu=True)
cpu.install()

from tools.common.running import interrupt_at  # noqa: E402
from tools.export_hf.command import main  # noqa: E402

if __name__ == "__main__":
    interrupt_at(signal.SIGTERM)
    sys.exit(main())
