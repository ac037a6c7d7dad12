"""Starts `command`."""

import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.common.running import interrupt_at  # noqa: E402
from tools.report.command import main  # noqa: E402

if __name__ == "__main__":
    interrupt_at(signal.SIGTERM)
    sys.exit(main())
