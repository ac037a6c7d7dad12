"""Start this tool: python tools/NAME."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.start import start  # noqa: E402

sys.exit(start(Path(__file__).parent.name, sys.argv[1:]))
