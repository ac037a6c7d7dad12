"""Starts `command`."""

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

try:
    from tools.sweep.command import main
except ModuleNotFoundError as missing:
    python = os.environ.get("PYTHON", sys.executable)
    sys.exit(f"error: PYTHON={python} has no {missing.name}: run scripts/setup.sh, or set PYTHON to one that has it")

if __name__ == "__main__":
    sys.exit(main())
