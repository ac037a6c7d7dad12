"""Starts `command`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from megatron.remoe.preflight import console  # noqa: E402

console.hide_unhelpful_warnings()

from tools.generate.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
