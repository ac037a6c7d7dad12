"""Starts `command`, on the CPU also where there is an accelerator."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.common.on_cpu import megatron_on_cpu  # noqa: E402

megatron_on_cpu()

from tools.export_hf.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
